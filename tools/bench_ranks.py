#!/usr/bin/env python3
"""Measure the training step on several ranks of this machine: speed by layout of the LLM, and bytes of its calls.

    python tools/bench_ranks.py --json                      # 2 and 4 ranks
    python tools/bench_ranks.py --ranks 2 --steps 10 data.batch_tokens=1536

The layouts come one after the other on the same batches, with as many micro-batches a step as ranks. Half of the ranks
play one node. One more step of each, which is not timed, counts every collective call: an all-gather of W bytes over g
ranks brings W (g - 1)/g into each, an all-reduce of n bytes over R ranks sends 2 n (R - 1)/R round the ring. A ring
leaves each node on one link, so as much leaves a node where the group of a call spans several. Beside them stands what
the planner says. The time of the reduction holds the wait for the slowest rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:] = [str(Path(__file__).resolve().parents[1]),
               *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from listen_dist import config as configuration
from listen_dist import dist, exits
from listen_dist.command_line import ConfigParser, user_path
from listen_dist.data.loader import find_filler, training_steps
from listen_dist.engine import sharding
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.engine.zero3 import Zero3
from listen_dist.model_sizes import sizes_of
from listen_dist.models.llm import has_compiler
from listen_dist.planner import Cluster, plan_step
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import Batch, LoaderState
from tools.step_bench.clock import Clock

LIVE = 30_000_000
ALL_LIVE = 10**12
"""More parameters than any LLM has: all stay gathered from the forward to the backward pass."""
WARM_UP = 2
"""Steps of each layout before the clock starts: DeepSpeed learns the order of weights."""


@dataclass(frozen=True)
class Layout:
    """One way for the frozen LLM to lie on the ranks."""

    name: str
    parallel: dict[str, Any]
    fetch_ahead: bool = True
    compiled: bool = False


LAYOUTS = (
    Layout("full (ZeRO-3)", {"llm": "full", "max_live_parameters": LIVE}),
    Layout("full, nothing fetched ahead", {"llm": "full", "max_live_parameters": LIVE}, fetch_ahead=False),
    Layout("full, gathered once a micro-batch", {"llm": "full", "max_live_parameters": ALL_LIVE}),
    Layout("full (FSDP2)", {"llm": "full", "backend": "fsdp2"}),
    Layout("node (ZeRO-3)", {"llm": "node", "max_live_parameters": LIVE}),
    Layout("replicated", {"llm": "replicated"}),
    Layout("replicated, compiled", {"llm": "replicated"}, compiled=True),
)


class NothingAhead(Zero3):
    """ZeRO-3 that gathers a weight when it is used, and none before."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self._config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


@dataclass
class Traffic:
    """What one rank's calls of a step move, in bytes."""

    gathers: int = 0
    gathered: float = 0.0
    """Into this rank by all-gathers."""
    reductions: int = 0
    reduced: float = 0.0
    """Sent by this rank in all-reduces."""
    other_calls: int = 0
    leaves_node: float = 0.0
    """Of both, what leaves this rank's node for another."""


class CallCounter(TorchDispatchMode):
    """Sees each collective call that torch dispatches, whoever makes it."""

    def __init__(self, node_size: int) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._node_size = node_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        found, boxed = self.traffic, next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = torch.distributed.get_process_group_ranks(torch.distributed.ProcessGroup.unbox(boxed))
        share = (len(ranks) - 1) / len(ranks)
        if "allgather" in name:
            moved = share * _bytes(args[0])
            found.gathers, found.gathered = found.gathers + 1, found.gathered + moved
        elif "allreduce" in name:
            moved = 2 * share * _bytes(args[0])
            found.reductions, found.reduced = found.reductions + 1, found.reduced + moved
        else:
            found.other_calls += 1
            return
        if len({rank // self._node_size for rank in ranks}) > 1:
            found.leaves_node += moved


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


@dataclass
class World:
    """The model in one layout, and what its turns took."""

    layout: Layout
    parts: Parts
    replicated: ReplicatedTrainables
    optimizer: torch.optim.Optimizer
    filler: Batch
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def build(cls, config: Config, layout: Layout) -> World:
        config = replace(config, parallel=replace(config.parallel, **layout.parallel),
                         model=replace(config.model, compile=layout.compiled))
        with mock.patch.object(sharding, "Zero3", Zero3 if layout.fetch_ahead else NothingAhead):
            parts = assemble(config, torch.device("cpu"))
        reader = parts.reader(config.data.train, with_targets=True)
        return cls(layout, parts, ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed),
                   build_optimizer(parts.model.trainable, config.train), find_filler(reader))

    def step(self, batches: Sequence[Batch], number: int) -> None:
        config = self.parts.config
        dist.barrier()
        begin = time.perf_counter()
        train_step(self.parts.model.train(), self.replicated, self.optimizer, config, number, config.train.max_steps,
                   batches, self.filler)
        dist.barrier()
        self.seconds.append(time.perf_counter() - begin)


def draw_batches(config: Config, steps: int) -> list[list[Batch]]:
    """This rank's micro-batches of so many steps, alike for all layouts."""
    parts = assemble(replace(config, parallel=replace(config.parallel, llm="replicated")), torch.device("cpu"))
    reader = parts.reader(config.data.train, with_targets=True)
    coming = training_steps(reader, parts.mixture(reader), parts.training_cost(reader), config.data, config.train.seed,
                            dist.world_size(), dist.rank(), dist.world_size(), LoaderState())
    return [next(coming)[0] for _ in range(steps)]


def work(config: Config, steps: int, out: Path) -> None:
    """One rank: all layouts in turns; rank 0 writes the rows."""
    dist.setup("cpu", 10)
    world = dist.world_size()
    node_size = max(1, world // 2)
    config = replace(config, device="cpu", parallel=replace(config.parallel, node_size=node_size),
                     data=replace(config.data, workers=0), train=replace(config.train, batches_per_step=world))
    layouts = [layout for layout in LAYOUTS if not layout.compiled or has_compiler(torch.device("cpu"))]
    batches = draw_batches(config, WARM_UP + steps + 1)
    counts = [[sum(map(len, step)), sum(batch.target_tokens for batch in step)] for step in batches[WARM_UP:-1]]
    clips, tokens = dist.sum_(torch.tensor(counts).sum(0)).tolist()
    rows = []
    for layout in layouts:
        one = World.build(config, layout)
        clock = Clock(torch.device("cpu"))
        for number in range(WARM_UP + steps):
            note(f"{world} ranks, {layout.name}: step {number + 1}")
            with clock.watch(one.replicated, "reduce", "warm-up" if number < WARM_UP else "reduction"):
                one.step(batches[number], number)
        with CallCounter(node_size) as counter:
            one.step(batches[-1], WARM_UP + steps)
        rows.append({**row(one, clips, tokens, counter.traffic, world, node_size),
                     "reduction_share": clock.seconds["reduction"] / sum(one.seconds[WARM_UP:-1])})
        del one
        gc.collect()
    if dist.is_main():
        out.write_text(json.dumps(rows), encoding="utf-8")
    dist.shutdown()


def row(one: World, clips: int, tokens: int, traffic: Traffic, world: int, node_size: int) -> dict[str, Any]:
    config, timed = one.parts.config, one.seconds[WARM_UP:-1]
    plan = plan_step(config, sizes_of(config), Cluster(world, node_size), config.parallel.llm)
    return {"ranks": world, "layout": one.layout.name, "clips_per_second": clips / sum(timed),
            "target_tokens_per_second": tokens / sum(timed), "median_step_seconds": statistics.median(timed),
            **asdict(traffic), "planned_into_rank": plan.in_rank, "planned_into_node": plan.in_node,
            "llm_bytes_held": one.parts.sharding.bytes_held()}


def launch(options: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """Run `work` on `ranks` ranks as the trainer is run, and read what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = Path(folder) / "rows.json"
        words = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(port),
                 __file__, "--config", options.config, "--steps", str(options.steps), "--out", str(out),
                 *options.overrides]
        variables = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": sys.path[0]}
        done = subprocess.run(words, env={**os.environ, **variables}, stdout=sys.stderr, check=False)
        if done.returncode or not out.exists():
            raise ConfigError(f"{ranks} ranks ended with {done.returncode}; what they said stands above")
        return json.loads(out.read_text(encoding="utf-8"))


def note(text: str) -> None:
    if dist.is_main():
        print(text, file=sys.stderr, flush=True)


def report(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["ranks", "layout", "clips/s", "s a step", "reduction", "MB gathered", "in calls", "MB reduced",
             "MB leaving a node", "planned into a rank", "planned into a node"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for one in rows:
        cells = [one["ranks"], one["layout"], f"{one['clips_per_second']:.1f}", f"{one['median_step_seconds']:.2f}",
                 f"{one['reduction_share']:.0%}", f"{one['gathered'] / 1e6:.1f}", one["gathers"],
                 f"{one['reduced'] / 1e6:.1f}", f"{one['leaves_node'] / 1e6:.1f}",
                 f"{one['planned_into_rank'] / 1e6:.1f}", f"{one['planned_into_node'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default 2 and 4)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each layout (default 6)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=user_path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    return exits.run(lambda: measure(parse_arguments(argv)))


def measure(options: argparse.Namespace) -> None:
    """As one of the ranks: its share of the work. Otherwise: launch them, and print the figures."""
    config = configuration.load(options.config, options.overrides)
    if options.out:
        work(config, options.steps, options.out)
        return
    rows = [row for ranks in options.ranks for row in launch(options, ranks)]
    print(json.dumps({"threads_a_rank": 1, "rows": rows}, indent=1) if options.json else report(rows))


if __name__ == "__main__":
    sys.exit(main())
