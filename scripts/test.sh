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
run_tests() { python -m pytest -n "${FLOWSTEER_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"; }
run_tests "$@" || failed=$?
if [[ "$*" != *tests/* ]]; then # packages that all other tests do without, see tests/quantization/conftest.py
  if [ "$(cat .venv/quantization/stamp 2>/dev/null)" != "$stamp" ]; then
    rm -rf .venv/quantization
    python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
      --target .venv/quantization torchao bitsandbytes
    echo "$stamp" >.venv/quantization/stamp
  fi
  code=0
  PYTHONPATH="$PWD/.venv/quantization:${PYTHONPATH:-}" run_tests tests/quantization "$@" || code=$?
  [ $code = 0 ] || { [ $code = 5 ] && [ $# -gt 0 ]; } || failed=1 # 5: the arguments chose none of them
fi
wait $! || failed=1
cat "$types"
exit "$failed"
