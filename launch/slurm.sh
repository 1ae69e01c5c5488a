#!/usr/bin/env bash
#SBATCH --job-name=radit_jax
#SBATCH --output=radit_jax-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Several nodes of a SLURM cluster, from the checkout's folder on a file system that all of
# them share; the options above are defaults:
#   sbatch --nodes=4 --account=... launch/slurm.sh --config configs/lm_ft.py ...
# One process per GPU: JAX takes from SLURM who is who and gives each process the GPU of
# its number on the node. Without GPUs (--gpus-per-node=0) --ntasks-per-node=1.
# Five minutes before the time is over the run is asked to save and stop; the job then
# queues again and goes on. --dry-run before the other arguments (bash launch/slurm.sh
# --dry-run ...) prints the commands and runs none of them.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
fail() {
  echo "error: $1" >&2
  exit 1
}
[ $# -gt 0 ] ||
  fail "what is to run? Give a recipe: sbatch launch/slurm.sh --config configs/lm_ft.py"
# SLURM runs a copy of this file that lies elsewhere.
cd "${SLURM_SUBMIT_DIR:-.}"
[ -e launch/environment.sh ] ||
  fail "$PWD is not the folder of the checkout; submit from there: sbatch launch/slurm.sh"

gpus="${SLURM_GPUS_ON_NODE:-0}"
tasks="${SLURM_NTASKS_PER_NODE:-1}"
extra=""
if [ "$gpus" -gt 0 ]; then
  [ "$tasks" = "$gpus" ] ||
    fail "$tasks processes and $gpus GPUs a node: each process drives one GPU; give \
--ntasks-per-node=$gpus"
  extra=cuda
  # Without its GPUs a run should stop, not go on with the CPU.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
fi
# A process that ends early leaves the others time to finish a checkpoint; that one is
# lost for good is noticed by JAX. srun forgets --cpus-per-task unless told again.
command=(srun --kill-on-bad-exit=0 --wait=0 --gpu-bind=none)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || command+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
command+=(python -m radit_jax.main "$@")
if [ -n "$dry" ]; then
  echo "source launch/environment.sh && install '$extra'"
  line="$(printf '%q ' "${command[@]}")"
  echo "${line% }"
  exit 0
fi
# Once, before any of the processes starts.
# shellcheck source=launch/environment.sh
source launch/environment.sh
install "$extra"
code=0
"${command[@]}" || code=$?
if [ "$code" = 75 ]; then
  echo "stopped by a signal after saving; the job queues again and goes on"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
