#!/usr/bin/env bash
# One worker of a slice, run there by tpu_vm.sh:
#   install           Python, the environment with extra tpu, tmux
#   start ARGUMENTS   python -m radit_jax.main ARGUMENTS in tmux; appends to ~/radit_jax.log
#   state             running, none (nothing runs or ran), or the last run's exit status
#   stop              ask the run to save and stop
# The folder that holds the checkout is where log and exit status go as well.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
log="$folder/radit_jax.log" status="$folder/radit_jax.exit" session=radit_jax

goes_on() {
  tmux has-session -t "$session" 2>/dev/null
}

command="$1"
shift
case "$command" in
  install)
    # Ubuntu 22.04, which TPU VMs run, brings Python 3.10: uv fetches a later one.
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install --quiet --user uv
      python3 -m uv python install 3.11
      PYTHON="$(python3 -m uv python find 3.11)"
      export PYTHON
    fi
    # shellcheck source=launch/environment.sh
    source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
    install tpu
    command -v tmux >/dev/null || sudo apt-get install --yes --quiet tmux
    ;;
  start)
    if goes_on; then
      echo "error: a run goes on here; stop it first" >&2
      exit 1
    fi
    rm -f "$status"
    # Several words: tmux runs them as they are, without a shell that would split them.
    tmux new-session -d -s "$session" bash "${BASH_SOURCE[0]}" session "$@"
    ;;
  session)
    code=0
    (
      # shellcheck source=launch/environment.sh
      source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
      # Without its accelerators a run should stop, not go on with the CPU.
      export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
      exec python -m radit_jax.main "$@"
    ) >>"$log" 2>&1 || code=$?
    # Last, so that who finds it knows that the run is over.
    echo "$code" >"$status"
    ;;
  state)
    if goes_on; then
      echo running
    elif [ -e "$status" ]; then
      cat "$status"
    else
      echo none
    fi
    ;;
  stop) tmux send-keys -t "$session" C-c ;;
esac
