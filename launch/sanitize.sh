#!/usr/bin/env bash
# NVIDIA's compute-sanitizer on the native CUDA kernels: accesses outside buffers, then races in shared memory.
# Needs a GPU, and compute-sanitizer on the PATH (it is part of the CUDA toolkit). About 20 s each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # buffers of their own: an access past one is not inside its neighbour
for tool in memcheck racecheck; do
  compute-sanitizer --tool "$tool" --kernel-name kns=commq --error-exitcode 9 \
    python -m pytest -q -p no:cacheprovider "tests/test_codecs_same_bytes.py::test_native_on_cuda[${1:-0}]"
done
