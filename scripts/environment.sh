# Sourced by the other scripts: an environment of the project's own in .venv, made once per constraints file.
# FLOWSTEER_PYTHON chooses the interpreter (3.11 to 3.13).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=$(cat constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1)
if [ ! -f .venv/stamp ] || [ "$(cat .venv/stamp)" != "$stamp" ]; then
  echo "installing into .venv (once)"
  "${FLOWSTEER_PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,test]"
  echo "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_TELEMETRY=1
