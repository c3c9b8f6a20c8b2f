# shellcheck shell=bash
# Shared by the batch scripts: one task a GPU over all nodes of the job, each with its rank in the environment.

# start_ranks SCRIPT ARGUMENT...: run it on every rank; sets `code` (the highest exit code), `logs` and `sizes`.
start_ranks() {
  local head per_node cpus log
  # The head node, under the address that Slurm itself reaches it at, and a port that follows from the job's number.
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_ADDR=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  export MASTER_ADDR MASTER_PORT
  per_node=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
  # srun takes neither sbatch's --cpus-per-task nor the rest of the node by itself: a rank would get one CPU.
  cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / per_node))}
  if [[ $cpus -lt 1 ]]; then
    echo "error: $per_node ranks a node and only $SLURM_CPUS_ON_NODE of its CPUs: add --ntasks-per-node=$per_node" \
      "--cpus-per-task=8 to sbatch"
    exit 2
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
  logs=$LOG_FOLDER/$SLURM_JOB_ID
  mkdir -p "$logs"
  declare -gA sizes=()  # of what earlier starts have written
  for log in "$logs"/rank-*.log; do
    [[ ! -f $log ]] || sizes[$log]=$(stat -c %s "$log")
  done
  code=0
  # A rank that leaves early doesn't end the others: they say what they waited for, and end by themselves.
  # Each takes the GPU of its local number, or the only one it sees, where Slurm binds them to tasks.
  # shellcheck disable=SC2016  # expanded on the rank, not here
  srun --ntasks-per-node="$per_node" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=120 \
    --open-mode=append --output="$logs/rank-%t.log" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
      [[ ${CUDA_VISIBLE_DEVICES:-,} == *,* ]] || LOCAL_RANK=0
      exec "$@"' \
    rank "$PYTHON" -u "$@" 2>> "$logs/srun.log" || code=$?
}

# errors: what the ranks of this start say they ended by.
errors() {
  local log
  for log in "$logs"/rank-*.log; do
    [[ ! -f $log ]] || tail -c "+$((${sizes[$log]:-0} + 1))" "$log"
  done | grep '^error:' | sort -u
}

# faults: those of them that say more than that another rank is gone; fails where there is none.
faults() {
  errors | grep -v '^error: a collective failed'
}

# report_failure: the reason first, then where to read more.
report_failure() {
  faults || errors || true
  tail -n 5 "$logs/srun.log"
  echo "failed with code $code; logs of the ranks: $logs"
}
