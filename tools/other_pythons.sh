#!/usr/bin/env bash
# The fast tests under Python 3.12 and 3.13, where they are installed and the requirement for torch has a build without CUDA
# for them. Else it says what was not run, and checks the syntax alone. $1: as TORCH in the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$1 status=0
for release in 3.12 3.13; do
  python=python$release  # or one of pyenv's that is not on the path
  for other in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$release".*/bin/python; do
    "$python" -c '' 2>/dev/null || python=$other
  done
  "$python" -c '' 2>/dev/null || { echo "Python $release: not installed, not run"; continue; }
  PYTHONPYCACHEPREFIX=.venv/$release/pyc "$python" -m compileall -q src bench tools tests || status=1
  env=.venv/$release
  [ -x "$env/bin/python" ] || "$python" -m venv "$env"
  if ! "$env/bin/pip" download --quiet --no-deps --only-binary :all: --dest "$env/torch" "$torch+cpu" 2>/dev/null; then
    echo "Python $release: syntax checked; no build of $torch without CUDA is to be had, so no test was run"
    continue
  fi
  "$env/bin/pip" install --quiet "$env"/torch/torch-*.whl
  "$env/bin/pip" install --quiet --editable '.[dev]'
  "$env/bin/pytest" -m "not slow and not organism" && echo "Python $release: the fast tests passed" || status=1
done
exit $status
