"""One rank of the ledger: a trainer without a model, whose one weight a sample counts how often it was learned from.

    python -m tests.distributed.ledger_worker CONFIG RUN_DIR WORKERS finish|go

Loader, reduction, optimizer and checkpoints are the trainer's own. The gradient of sample i's weight is minus the
number of times it stands in the step, and SGD at rate 1 adds it. So what a checkpoint holds is the number of times
that each sample counted, whatever was killed, lost and done again in between. With `finish` the run ends at the first
step that ends a pass over the set; with `go` it only ends by being killed.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader, training_steps
from listen_dist.data.mixture import Mixture
from listen_dist.data.schedule import TokenCost
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.engine import checkpoint
from listen_dist.engine.checkpoint import TrainState
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import Config

COST = TokenCost(fixed=5, audio_tokens_per_second=10.0)
PER_STEP = 3


class Ledger(nn.Module):
    """A weight a sample."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(samples))


def run(config: Config, finish: bool) -> None:
    reader = BatchReader([ShardIndex.load(config.data.train[0].path)], LogMel.from_pretrained(
        config.model.speech_encoder), TextEncoder(load_tokenizer(config.model.llm), config.model), config.data, True)
    (index,) = reader.indexes
    row_of = {name: i for i, name in enumerate(name for shard in range(len(index.counts))
                                              for name in index.shard_table(shard).ids)}
    ledger, folder = Ledger(index.samples), Path(config.run_dir)
    replicated, optimizer = ReplicatedTrainables(ledger), torch.optim.SGD(ledger.parameters(), lr=1.0)
    state = TrainState()
    found = checkpoint.newest(folder / "checkpoints")
    if found:
        state = checkpoint.read_state(found)
        checkpoint.load_trainables(found, ledger)
    mixture = Mixture([index], config.data.train, config.train.seed)
    steps = training_steps(reader, mixture, COST, config.data, config.train.seed, PER_STEP, dist.rank(),
                           dist.world_size(), state.loader)
    for batches, loader_state in steps:
        replicated.zero_grads()
        for batch in batches:
            for name in batch.ids:
                ledger.counts.grad[row_of[name]] -= 1  # type: ignore[index]
        time.sleep(0.02)  # room for a kill in mid-step
        replicated.reduce(torch.zeros(()), stop=False)
        optimizer.step()
        state = replace(state, step=state.step + 1, loader=loader_state)
        over = finish and state.loader.samples % index.samples == 0
        if dist.is_main() and (state.step % config.train.save_every == 0 or over):
            checkpoint.write(folder / "checkpoints", checkpoint.snapshot(config, state, ledger, optimizer))
        if dist.is_main():
            with (folder / "steps.log").open("a") as file:
                file.write(f"{state.step} {os.getpid()} {dist.world_size()} {config.data.workers}\n")
        if over:
            break
    steps.close()


def main() -> None:
    config_file, run_dir, workers, end = sys.argv[1:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    run(configuration.load(config_file, [f"run_dir={run_dir}", f"data.workers={workers}"]), end == "finish")
    dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main()
