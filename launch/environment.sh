# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with radit_jax, and memory settings.
# Python 3.11 or later and pip are all it needs.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: Python 3.11 or later is needed; name one: PYTHON=python3.12 bash $0" >&2
      exit 1
    fi
    "${PYTHON:-python3}" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

# install EXTRAS: radit_jax with the given extras ("" for none), once per change of the
# requirements.
install() {
  local stamp="$VIRTUAL_ENV/.radit_jax-${1:-base}"
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing radit_jax${1:+[$1]} into $VIRTUAL_ENV ..."
    python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
    touch "$stamp"
  fi
}

# Large pages for malloc: a training step on a CPU touches gigabytes of fresh memory, and
# faulting it in by 4 KiB pages takes a fifth of the time. glibc 2.35 and later; ignored
# elsewhere.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
