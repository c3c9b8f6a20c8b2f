#!/usr/bin/env bash
# Decode and score a run on the nodes and GPUs that Slurm gives.
#
#   sbatch --nodes 1 --gpus-per-node 8 --ntasks-per-node 8 --cpus-per-task 8 slurm/evaluate.sh \
#     runs/multitask_7b/config.yaml [key=value ...]
#
#SBATCH --job-name=listen-evaluate
#SBATCH --output=listen-evaluate-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
# shellcheck source=slurm/launch.sh
source slurm/launch.sh

config=${1:?the config.yaml of a run folder}
shift
start_ranks listen_dist/evaluate.py --config "$config" "$@"
if [[ $code -ne 0 ]]; then
  report_failure
  exit "$code"
fi
cat "$logs/rank-0.log"
