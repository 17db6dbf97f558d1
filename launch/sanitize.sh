#!/usr/bin/env bash
# NVIDIA's compute-sanitizer on the native CUDA kernels. Needs a GPU, and compute-sanitizer on the PATH (it is part of
# the CUDA toolkit).
#
#     launch/sanitize.sh [CASE]          accesses outside buffers, then races in shared memory, codec by codec; 20 s each
#     launch/sanitize.sh step [RECIPE]   accesses outside buffers in whole training steps, DDP with two ranks over NCCL
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # buffers of their own: an access past one is not inside its neighbour

sanitize() {
  local tool=$1
  shift
  compute-sanitizer --tool "$tool" --kernel-name kns=commq --error-exitcode 9 "$@"
}

if [[ "${1:-}" == step ]]; then
  recipe=${2:-int4}
  out=$(mktemp -d)/step.jsonl
  export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29517} PYTHONPATH=$PWD
  ranks=()
  for rank in 0 1; do
    # NCCL shares a GPU only between what seem to be hosts.
    if [[ $(nvidia-smi -L | wc -l) -lt 2 ]]; then
      export NCCL_HOSTID=$rank NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
    fi
    RANK=$rank LOCAL_RANK=$rank sanitize memcheck python3 bench/step.py --worker --device cuda --model tiny \
      --rates unshaped --ranks-per-host 2 --recipes "$recipe" --methods "commq $recipe" --out "$out" &
    ranks+=($!)
  done
  for rank in "${ranks[@]}"; do wait "$rank"; done
  grep -q "\"commq $recipe\".*median_ms" "$out"  # a method that failed is a row without times
  exit
fi

for tool in memcheck racecheck; do
  sanitize "$tool" python3 -m pytest -q -p no:cacheprovider "tests/test_codecs_same_bytes.py::test_native_on_cuda[${1:-0}]"
done
