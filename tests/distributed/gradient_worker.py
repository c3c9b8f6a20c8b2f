"""One rank of test_gradients.py and test_layouts.py: takes the trainer's own steps and writes down what it holds.

    python -m tests.distributed.gradient_worker CONFIG OUT NAME:KEY=VALUE,KEY=VALUE …

The ranks meet over the file store that STORE names.
"""

from __future__ import annotations

import json
import os
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.loader import BatchReader, find_filler, training_steps
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.schema import Config
from listen_dist.structures import LoaderState

PROBED = [SampleRef(0, 0, 0), SampleRef(0, 0, 1), SampleRef(0, 0, 3), SampleRef(1, 0, 0), SampleRef(1, 0, 1)]
PROBE_K = 3


def probe(parts: Parts, reader: BatchReader) -> dict[str, list[float]]:
    """Row loss and prompts of the same clips in batches that differ from rank to rank."""
    cut = 1 + dist.rank()
    turned = PROBED[dist.rank() :] + PROBED[: dist.rank()]
    found = {}
    with torch.no_grad():
        for refs in (turned[:cut], turned[cut:]):
            batch = reader[refs]
            out = parts.model(batch, PROBE_K)
            for i, name in enumerate(batch.ids):
                found[name] = [float(out.row_loss[i]), *map(float, out.prompt_indices[i])]
    return found


def trainables(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parts.model.trainable.named_parameters()}


def statistics(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in parts.model.trainable.named_buffers()}


def bytes_resident(parts: Parts) -> int:
    """Bytes of LLM weights, sharded or gathered, that modules hold on this rank."""
    weights = (p.to_local() if isinstance(p, DTensor) else p.data for p in parts.model.llm.parameters())
    return sum(held.numel() * held.element_size() for held in weights)


def decode(parts: Parts) -> dict[str, Any]:
    """What this rank's clips are decoded to: with whole weights, and by all ranks together with shards.

    Ranks take unequal numbers of batches of the first, and as many but longer ones of the second.
    """
    reader = parts.reader(parts.config.data.train, with_targets=False)
    mine = reader[[PROBED[dist.rank() % len(PROBED)]]]
    longest = [2 + 2 * dist.rank()]
    with parts.sharding.whole():
        for _ in range(1 + dist.rank()):
            whole, _ = parts.model.generate(mine, PROBE_K, longest)
    between = bytes_resident(parts)
    sharded, _ = parts.model.generate(mine, PROBE_K, longest, synced_gpus=dist.world_size() > 1)
    return {"whole": whole, "sharded": sharded, "resident_after": between}


def generic_module_can_be_defined() -> bool:
    """Whether a later class can be a torch module and a typing.Generic (as in aac_metrics)."""
    T = TypeVar("T")
    try:
        base = types.new_class("Base", (torch.nn.Module, Generic[T]))  # type: ignore[misc]
        base[int]  # type: ignore[index]
    except (TypeError, AttributeError):
        return False
    return True


def run(config: Config, out: Path) -> None:
    parts = assemble(config, torch.device("cpu"))
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    reader = parts.reader(config.data.train, with_targets=True)
    exact = config.model.dtype == "float32"  # else rounding, which depends on the batch, would decide
    probed = probe(parts, reader) if exact else {}
    before, statistics_before = trainables(parts), statistics(parts)
    per_step = config.train.batches_per_step
    steps = training_steps(reader, parts.mixture(reader), parts.token_cost(config.pool.k_max), config.data,
                           config.train.seed, per_step, dist.rank(), dist.world_size(), LoaderState())
    notes = []
    for step in range(3):
        batches, _ = next(steps)
        result = train_step(parts.model.train(), replicated, optimizer, config, step, config.train.max_steps, batches,
                            find_filler(reader))
        if step == 0:
            grads = {name: p.grad.clone() for name, p in parts.model.trainable.named_parameters()
                     if p.grad is not None}
        notes.append({"ids": [batch.ids for batch in batches], "tokens": sum(b.target_tokens for b in batches),
                      "loss": sum(float(out.token_loss_sum.detach()) for _, out in result.outputs),
                      "k": result.k, "grad_norm": float(result.grad_norm)})
    resident = bytes_resident(parts)
    decoded = decode(parts) if exact else {}
    out.mkdir(parents=True, exist_ok=True)
    save_file(before, out / f"before-{dist.rank()}.safetensors")
    save_file(grads, out / f"grads-{dist.rank()}.safetensors")
    save_file(trainables(parts), out / f"after-{dist.rank()}.safetensors")
    save_file(statistics_before, out / f"statistics-before-{dist.rank()}.safetensors")
    save_file(statistics(parts), out / f"statistics-after-{dist.rank()}.safetensors")
    (out / f"notes-{dist.rank()}.json").write_text(json.dumps({
        "steps": notes, "probed": probed, "decoded": decoded, "probed_again": probe(parts, reader) if exact else {},
        "checksum": replicated.checksum(),
        "held": parts.sharding.bytes_held(), "resident": resident, "generic_works": generic_module_can_be_defined()}))


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    config_file, out, *scenarios = sys.argv[1:]
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        run(configuration.load(config_file, words.split(",")), Path(out) / name)
    dist.shutdown()


if __name__ == "__main__":
    main()
