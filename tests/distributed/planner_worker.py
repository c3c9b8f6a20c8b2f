"""One rank of test_planner.py: steps of the trainer on one batch, with memory watched, first with recomputation.

    python -m tests.distributed.planner_worker CONFIG TINY_CONFIG OUT

The ranks meet over the file store that STORE names.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  its import belongs to the state before loading
import torch
import torch.distributed
from safetensors.torch import save_file

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.models.llm import recompute_activations
from listen_dist.planner import Shape
from listen_dist.schema import Config


def in_use(device: torch.device) -> int:
    """Bytes of this process: RssAnon on a CPU, what tensors hold on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Peak(threading.Thread):
    """The most that is in use while it is open: a CPU is looked at every 2 ms, a GPU counts by itself."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._device = device
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            self.bytes = max(self.bytes, in_use(self._device))
            time.sleep(0.002)

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(minutes=10))
    torch.set_num_threads(1)
    config, out = configuration.load(sys.argv[1]), Path(sys.argv[3])
    take_steps(configuration.load(sys.argv[2]), 0)  # what is imported and started only then is no part of the plan
    gc.collect()
    found, grads = take_steps(config, in_use(torch.device(config.device)))
    save_file(grads, out / f"grads-{dist.rank()}.safetensors")
    (out / f"memory-{dist.rank()}.json").write_text(json.dumps(found))
    dist.shutdown()


def take_steps(config: Config, before: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Steps on one batch of 24 clips; peaks above `before` bytes and gradients, with recomputation and without."""
    device = torch.device(config.device)
    parts = assemble(config, device)
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    reader = parts.reader(config.data.train, with_targets=True)
    batch = reader[[SampleRef(0, number // 5, number % 5) for number in range(24)]]
    found: dict[str, Any] = {"held": parts.sharding.bytes_held()}
    grads = {}
    loaded = in_use(device) - before
    for name, active in (("recomputed", True), ("kept", False)):
        recompute_activations(parts.model.train().llm, active)
        for _ in range(2):  # the first step has no trace to fetch ahead by
            gc.collect()
            with Peak(device) as peak:
                result = train_step(parts.model, replicated, optimizer, config, 0, 9, [batch], batch)
        grads[name] = replicated.grads.clone()
        (_, output), = result.outputs
        longest = max(map(len, batch.target_ids))
        shape = Shape(output.padded_tokens, len(batch) * (longest + 1), output.padded_tokens // len(batch),
                      len(batch) * max(batch.seconds))
        found[name] = {"peak": peak.bytes - before, "shape": asdict(shape), "loaded": loaded}
    return found, grads


if __name__ == "__main__":
    main()
