#!/usr/bin/env bash
# The demo: a real language model learns to use retrieval, and its retriever what the
# model can use, on two CPU cores in half an hour to an hour.
# Downloads (180 MB of models and text, besides the Python packages) are kept in
# $RADIT_CACHE or ~/.cache/radit_jax; results go to runs/demo. A second run is over in
# seconds; an interrupted one goes on where it stopped.
# Further arguments are passed on, for example --config.workdir=DIR.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install ""
exec python -m radit_jax.main --config configs/radit.py:demo "$@"
