#!/usr/bin/env bash
# Runs .ci/run (fresh environment, README's test command, lint, types) for every supported Python found.
# Looks for python3.11 ... on the PATH and among pyenv's versions. Exits non-zero if any fails.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0 tried=0
for minor in 11 12 13; do
  python=$(command -v "python3.$minor" || ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3 2>/dev/null | tail -1)
  if [ -z "$python" ] || ! "$python" --version >/dev/null 2>&1; then
    python=$(ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3 2>/dev/null | tail -1)
  fi
  [ -n "$python" ] || { echo "python 3.$minor: not found, skipped"; continue; }
  tried=$((tried + 1))
  log=$(mktemp)
  if PYTHON=$python bash .ci/run >"$log" 2>&1; then
    echo "python 3.$minor: passed: $(grep -E '[0-9]+ passed' "$log" | tail -1)"
  else
    echo "python 3.$minor: FAILED; the end of $log:"
    tail -40 "$log"
    status=1
  fi
done
[ "$tried" -gt 0 ] || { echo "no supported Python found"; status=1; }
exit "$status"
