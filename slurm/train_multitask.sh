#!/usr/bin/env bash
# Train on the nodes and GPUs that Slurm gives; stopped, preempted or out of time, the job goes on by itself.
#
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 --cpus-per-task 8 slurm/train_multitask.sh [config] [key=value ...]
#
#SBATCH --job-name=listen
#SBATCH --output=listen-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
# The signal reaches every rank 180 s before the time limit: more than a step and a checkpoint take.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
# shellcheck source=slurm/environment.sh
source slurm/environment.sh
# shellcheck source=slurm/launch.sh
source slurm/launch.sh

config=configs/multitask_7b.yaml
if [[ $# -gt 0 && $1 != *=* ]]; then
  config=$1
  shift
fi

trap : TERM USR1  # of a preemption or requeue: the ranks get it too, and this script waits for them
start_ranks listen_dist/train.py --config "$config" "$@"

restarts=${SLURM_RESTART_COUNT:-0}
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [[ $code -eq 0 ]]; then
  echo "finished; logs of the ranks: $logs"
elif [[ $code -eq 75 && $state == RUNNING ]]; then
  echo "saved on a signal; requeued (restart $((restarts + 1)))"
  scontrol requeue "$SLURM_JOB_ID"
elif [[ $code -eq 75 ]]; then
  echo "saved; Slurm itself ends or requeues this job"
  exit "$code"
elif [[ ($code -eq 76 || $code -ge 128) && $state == RUNNING && $restarts -lt $MAX_RESTARTS ]] && ! faults > /dev/null; then
  # No rank has named a fault: with one, the next start would come to the same clips and end alike.
  report_failure
  echo "a rank was lost; requeued (restart $((restarts + 1)) of at most $MAX_RESTARTS)"
  scontrol requeue "$SLURM_JOB_ID"
else
  report_failure
  exit "$code"
fi
