# shellcheck shell=bash
# What differs from cluster to cluster. Edit it; the batch scripts read it on the first node of a job.

# Modules or containers that the nodes need, e.g.: module load cuda/12.8

PYTHON=${PYTHON:-.venv/bin/python}
LOG_FOLDER=${LOG_FOLDER:-runs/slurm}            # one folder a job, one log a rank
MAX_RESTARTS=${MAX_RESTARTS:-20}    # a job that lost a rank starts again by itself until it has been requeued so often

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=false

# The network that the ranks meet over, where Slurm's nodes have several, e.g.:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
