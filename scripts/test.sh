#!/usr/bin/env bash
# Everything that must hold: formatting, types, and the tests. `bash scripts/test.sh -m slow` runs the slow ones instead.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=1
mkdir -p .import-root && ln -sfn .. .import-root/flowsteer
ruff check .
ruff format --check .
pyright
exec python -m pytest -n "${FLOWSTEER_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
