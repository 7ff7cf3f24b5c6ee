#!/usr/bin/env bash
# Everything that must hold: formatting, types, and the tests. `bash scripts/test.sh -m slow` runs the slow ones instead.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=1
mkdir -p .import-root && ln -sfn .. .import-root/flowsteer
ruff check .
ruff format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
pyright >"$types" & # a minute of one core, in which the tests' first processes start
failed=0
python -m pytest -n "${FLOWSTEER_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait $! || failed=1
cat "$types"
exit "$failed"
