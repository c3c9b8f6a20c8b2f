"""One rank of test_between_nodes.py: takes the trainer's steps and counts what leaves its node meanwhile.

    python -m tests.distributed.traffic_worker CONFIG OUT INTERFACE NAME:KEY=VALUE,KEY=VALUE …
"""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.loader import find_filler, training_steps
from listen_dist.engine.assembly import assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.schema import Config
from listen_dist.structures import LoaderState

WARM_UP, COUNTED = 2, 3
"""Steps before counting (DeepSpeed learns the order of weights meanwhile), and steps counted."""


def sent(interface: str) -> int:
    """Bytes that left through an interface so far, counted when all ranks are here."""
    dist.barrier()
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text(encoding="utf-8"))


def run(config: Config, interface: str) -> dict[str, object]:
    start = sent(interface)
    parts = assemble(config, torch.device("cpu"))
    loaded = sent(interface)
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    reader = parts.reader(config.data.train, with_targets=True)
    steps = training_steps(reader, parts.mixture(reader), parts.token_cost(config.pool.k_max),
                           config.data, config.train.seed, dist.world_size(), dist.rank(), dist.world_size(),
                           LoaderState())
    before = 0
    for step in range(WARM_UP + COUNTED):
        if step == WARM_UP:
            before = sent(interface)
        train_step(parts.model.train(), replicated, optimizer, config, step, config.train.max_steps, next(steps)[0],
                   find_filler(reader))
    return {"host": socket.gethostname(), "loading": loaded - start, "step": (sent(interface) - before) / COUNTED,
            "gradients": 4 * replicated.grads.numel(), "held": parts.sharding.bytes_held()}


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    config_file, out, interface, *scenarios = sys.argv[1:]
    found = {}
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        found[name] = run(configuration.load(config_file, words.split(",")), interface)
    (Path(out) / f"traffic-{dist.rank()}.json").write_text(json.dumps(found))
    dist.shutdown()


if __name__ == "__main__":
    main()
