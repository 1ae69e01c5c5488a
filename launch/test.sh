#!/usr/bin/env bash
# Lint, format, types and tests, on eight fake CPU devices. Further arguments go to
# pytest, for example: bash launch/test.sh tests/test_llama.py -k rope
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install test
ruff check .
ruff format --check .
mypy
# All of them: file by file on two processes, which two cores can feed.
workers=()
if [[ $# -eq 0 ]]; then
    workers=(--numprocesses 2 --dist loadfile)
fi
python -m pytest --durations=15 -m "not slow" ${workers[@]+"${workers[@]}"} "$@"
