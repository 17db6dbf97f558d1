#!/usr/bin/env bash
# Lint, types, tests. With arguments: pytest alone, with them, as in  launch/test.sh tests/test_layout.py -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" dev
cd "$ROOT"

if (($#)); then
  exec python -m pytest "$@"
fi
python -m ruff check
python -m ruff format --check
python -m mypy
exec python -m pytest -n 2 --durations=10
