"""One rank of test_gathered.py: a few steps and an evaluation, with the LLM's gathered weights counted after each.

    python -m tests.distributed.gathered_worker CONFIG OUT NAME:KEY=VALUE,KEY=VALUE …

The ranks meet over the file store that STORE names.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.schema import Config

PERSISTENT = 10_000
"""ZeRO-3 keeps weights of no more numbers gathered (engine/zero3.py)."""


def gathered(llm: nn.Module) -> int:
    """Frozen weights that lie whole on this rank now, without those that are so small that they always do."""
    total = 0
    for p in llm.parameters():
        if p.requires_grad:
            continue
        if hasattr(p, "ds_tensor"):
            total += p.data.numel() if p.data.numel() > PERSISTENT else 0
        elif not isinstance(p, DTensor):
            total += p.data.numel()
    return total


def run(config: Config, out: Path) -> None:
    parts = assemble(config, torch.device("cpu"))
    llm, limit = parts.model.llm, config.parallel.max_live_parameters
    replicated = ReplicatedTrainables(parts.model.trainable)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    reader = parts.reader(config.data.train, with_targets=True)
    batch = reader[[SampleRef(0, dist.rank(), row) for row in range(4)]]
    steps, grads, losses = [], torch.empty(0), []
    for step in range(4):
        result = train_step(parts.model.train(), replicated, optimizer, config, step, 9, [batch], batch)
        steps.append(gathered(llm))
        losses.append(float(result.outputs[0][1].row_loss.detach().sum()))
        grads = replicated.grads.clone() if step == 0 else grads
    parts.model.eval()
    for _ in range(2):
        with torch.no_grad():
            parts.model(batch, 3)
        steps.append(gathered(llm))
    save_file({"grads": grads}, out / f"{config.run_dir}-{dist.rank()}.safetensors")
    (out / f"{config.run_dir}-{dist.rank()}.json").write_text(
        json.dumps({"gathered": steps, "limit": limit, "losses": losses}))


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    config_file, out, *scenarios = sys.argv[1:]
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        run(configuration.load(config_file, [*words.split(","), f"run_dir={name}"]), Path(out))
    dist.shutdown()


if __name__ == "__main__":
    main()
