#!/usr/bin/env bash
# One machine with one or several NVIDIA GPUs, all of them driven by one process. Arguments
# are those of the front door:
#   bash launch/gpu.sh --config configs/lm_ft.py --config.mesh.fsdp=-1 ...
# With --dry-run in front of them it prints the commands and runs none of them.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
if [ $# -eq 0 ]; then
  echo "error: what is to run? Give a recipe: bash launch/gpu.sh --config configs/lm_ft.py" >&2
  exit 1
fi
# Without its GPUs a run should stop, not go on with the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
if [ -n "$dry" ]; then
  echo "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader"
  echo "source launch/environment.sh && install cuda"
  line="$(printf '%q ' env JAX_PLATFORMS="$JAX_PLATFORMS" python -m radit_jax.main "$@")"
  echo "${line% }"
  exit 0
fi
if ! command -v nvidia-smi >/dev/null; then
  echo "error: nvidia-smi is not there: NVIDIA's driver is missing, or this machine has no" \
    "GPU. On a CPU: bash launch/demo.sh" >&2
  exit 1
fi
if ! gpus="$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader)" ||
  [ -z "$gpus" ]; then
  echo "error: nvidia-smi shows no GPU: ${gpus:-no output}" >&2
  exit 1
fi
echo "$gpus"
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install cuda
exec python -m radit_jax.main "$@"
