# shellcheck shell=bash
# Shared by the batch scripts: one task a GPU over all nodes of the job, each with its rank in the environment.

# start_ranks SCRIPT ARGUMENT...: run it on every rank; sets `code` (the highest exit code) and `logs`.
start_ranks() {
  local head per_node
  # The head node, under the address that Slurm itself reaches it at, and a port that follows from the job's number.
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  export MASTER_ADDR MASTER_PORT
  per_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
  logs=$LOG_FOLDER/$SLURM_JOB_ID
  mkdir -p "$logs"
  code=0
  # A rank that leaves early doesn't end the others: they say what they waited for, and end by themselves.
  # shellcheck disable=SC2016  # expanded on the rank, not here
  srun --ntasks-per-node="$per_node" --kill-on-bad-exit=0 --wait=120 --open-mode=append --output="$logs/rank-%t.log" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' \
    rank "$PYTHON" -u "$@" 2>> "$logs/srun.log" || code=$?
}

# report_failure: the reason first, then where to read more.
report_failure() {
  grep -h -s -m 1 '^error:' "$logs"/rank-*.log | sort -u || true
  tail -n 5 "$logs/srun.log"
  echo "failed with code $code; logs of the ranks: $logs"
}
