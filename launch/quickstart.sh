#!/usr/bin/env bash
# Trains a small GPT with each recipe and compares them; --help lists the options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train
exec python "$ROOT/launch/quickstart.py" "$@"
