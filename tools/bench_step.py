#!/usr/bin/env python3
"""Measure the training step against what one would use instead, on the same clips, in one run.

    python tools/bench_step.py --json                                # the demo models, on the CPU's cores
    python tools/bench_step.py --json projector.kind=qformer projector.hidden=768 \
        projector.window=0.3333                                      # 3 audio tokens a second
    python tools/bench_step.py --json --random 7b                    # on a GPU: random models of the paper's size
    python tools/bench_step.py --quick --random small                # does it run?

All ways take turns on the same clips and models with as many clips a step, in one process, and all run the encoder
(`cached features` apart). The figures are medians over the rounds:

    research   as LiSTEN's research code does it: clips filled up to 30 s, padding on the right, logits for all
               positions, a fixed number of clips a batch, one `.item()` a batch
    trainer    Hugging Face's Trainer over the same modules: true lengths, padding on the right, logits for all
               positions, a fixed number of clips a batch
    ours       the trainer's own step with `model.compile`; then with one thing changed at a time

Real tokens: the LLM's input without padding and silence. FLOPs: 4 · parameters of the layers for each real token
(forward, and backward to the input; frozen weights have no gradient), and of the head for each target. The share is of
the rate of one large matrix product measured in the same run, over the whole step and over the LLM's part of it.
Peak memory is counted from what was in use before the models were loaded, of the process on a CPU, of the allocator
on a GPU; on a CPU the allocator keeps what an earlier way has freed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

sys.path[:] = [str(Path(__file__).resolve().parents[1]),
               *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]

import torch
import transformers

from listen_dist import config as configuration
from listen_dist import dist, exits
from listen_dist.command_line import ConfigParser
from listen_dist.model_sizes import Sizes
from listen_dist.models.llm import DTYPES, has_compiler
from listen_dist.planner import Cluster, plan_memory
from listen_dist.planner import Shape as BatchShape
from listen_dist.schema import Config, PoolConfig, ProjectorConfig
from tools.step_bench import worlds
from tools.step_bench.clock import PHASES, in_use, matrix_rate
from tools.step_bench.ways import Bench, Measured, Turn, Way

RIVALS = (Way("research", "research", padded=True, by_count=True), Way("trainer", "trainer", by_count=True))
VARIANTS = (Way("ours"), Way("true lengths off", padded=True), Way("token budget off", by_count=True),
            Way("target-only logits off", all_logits=True), Way("recomputed activations", recompute=True),
            Way("cached features", stored=True), Way("fused selection off", backend="reference"))
ROUNDS, MATRIX_CPU, MATRIX_GPU = 3, 2048, 8192


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    clips: int
    steps: int
    rounds: int
    rows: int
    made_up_factor: float = 1.0


def ways(device: torch.device, bench: Bench, budgets: Sequence[int]) -> list[Way]:
    """All that can be compared here; ours with the LLM's layers compiled, where a CPU's compiler is there."""
    chosen = [way for way in VARIANTS
              if (way.backend == "auto" or device.type == "cuda") and (bench.has_stored or not way.stored)]
    chosen += [Way(f"ours, {budget} tokens a batch", budget=budget) for budget in budgets]
    if has_compiler(device):
        chosen = [*(replace(way, compiled=True) for way in chosen), Way("compile off")]
    return [*RIVALS, *chosen]


def measure(bench: Bench, chosen: Sequence[Way], size: Size, sizes: Sizes, rate: float) -> list[dict[str, Any]]:
    """A row a way; they take turns. An unmeasured one warms each up: of a few clips, or of all sizes to be compiled."""
    found: dict[str, list[tuple[Turn, Measured]]] = {way.name: [] for way in chosen}
    for number in range(size.rounds + 1):
        turn = bench.turn(max(1, number))  # the first one twice
        few = replace(turn, refs=turn.refs[: size.rows * size.steps])
        for way in chosen:
            note(f"round {number} of {size.rounds}: {way.name}")
            measured = bench.run(way, turn if number or way.compiled else few, max(1, number))
            if number:
                found[way.name].append((turn, measured))
    return [row(way, found[way.name], bench.config, sizes, rate) for way in chosen]


def row(way: Way, runs: Sequence[tuple[Turn, Measured]], config: Config, sizes: Sizes, rate: float) -> dict[str, Any]:
    def median(value: Any) -> float:
        return statistics.median(value(turn, measured) for turn, measured in runs)

    llm = sizes.llm
    seconds = sum(measured.seconds for _, measured in runs)
    phases = {phase: sum((m.phases or {}).get(phase, 0.0) for _, m in runs) for phase in PHASES}
    flops = sum(4 * (llm.layer * llm.layers * turn.real_tokens + llm.vocabulary * llm.width * turn.target_tokens)
                for turn, _ in runs)
    llm_seconds = phases["llm_forward"] + phases["backward"]
    result = {
        "way": way.name,
        "clips_per_second": median(lambda turn, m: len(turn.refs) / m.seconds),
        "clips_per_cpu_second": median(lambda turn, m: len(turn.refs) / m.cpu_seconds),
        "target_tokens_per_second": median(lambda turn, m: turn.target_tokens / m.seconds),
        "real_tokens_per_second": median(lambda turn, m: turn.real_tokens / m.seconds),
        "padding_share": 1 - sum(t.real_tokens for t, _ in runs) / max(1, sum(m.padded_tokens for _, m in runs)),
        "shares": {phase: spent / seconds for phase, spent in phases.items()} | {
            "other": 1 - sum(phases.values()) / seconds},
        "peak_mib": max(m.peak_bytes for _, m in runs) / 2**20,
        "flop_share": flops / seconds / rate, "llm_flop_share": flops / llm_seconds / rate}
    if way.kind == "ours":
        tokens, targets, length, audio = max(m.largest for _, m in runs)
        config = replace(config, model=replace(config.model, checkpointing=way.recompute))
        shape = BatchShape(tokens, targets, length, 0.0 if way.stored else audio)
        plan = plan_memory(config, sizes, Cluster(1, 1), config.parallel.llm, shape)
        result["planned_mib"] = plan.total / 2**20
    return result


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast ours is: by the clock, and by processor time, which a busy machine changes less."""
    speed = {row["way"]: row for row in rows}
    result = {}
    for prefix, ours in (("", "ours"), ("cached_", "cached features")):
        for rival, name in (("research", "over_research"), ("trainer", "over_hf_trainer")):
            if ours in speed:
                for suffix, key in (("", "clips_per_second"), ("_cpu_time", "clips_per_cpu_second")):
                    result[f"{prefix}{name}{suffix}"] = speed[ours][key] / speed[rival][key]
    return result


def measure_set(config: Config, shape: worlds.Shape | None, device: torch.device, size: Size,
                options: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """All rows of one training set."""
    base = in_use(device)
    parts = worlds.build(config, shape, device)
    bench = Bench(parts, size.clips, size.steps, size.rows, base)
    sizes = worlds.sizes(parts, shape)
    return measure(bench, ways(device, bench, options.batch_tokens), size, sizes, rate)


def measure_sharded(config: Config, shape: worlds.Shape | None, device: torch.device, size: Size,
                    rate: float) -> list[dict[str, Any]]:
    """ZeRO-3 on one rank, with and without fetching ahead: what its bookkeeping costs beside the row `ours`."""
    dist.setup(device.type, 5)
    rows = []
    for name, live in (("ZeRO-3", config.parallel.max_live_parameters), ("ZeRO-3, nothing fetched ahead", 0)):
        parallel = replace(config.parallel, llm="full", max_live_parameters=live)
        base = in_use(device)
        parts = worlds.build(replace(config, parallel=parallel), shape, device)
        bench = Bench(parts, size.clips, size.steps, size.rows, base)
        rows += measure(bench, [Way(name)], size, worlds.sizes(parts, shape), rate)
        del parts, bench
        release(device)
    return rows


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepared(config: Config, random: bool, small: bool) -> Config:
    """Alike for all ways: one process, a fixed k, clips as audio; the paper's projector and pool for random models."""
    if random:
        projector = ProjectorConfig(hidden=48, heads=4) if small else ProjectorConfig()
        config = replace(config, projector=projector, pool=PoolConfig(),
                         model=replace(config.model, attention="sdpa"), data=replace(config.data, batch_tokens=2048))
    return replace(config, pool=replace(config.pool, stochastic_k=False),
                   data=replace(config.data, stored_features=False, workers=0),
                   parallel=replace(config.parallel, llm="replicated"),
                   model=replace(config.model, checkpointing=False, compile=False))


def machine(device: torch.device) -> str:
    cpus = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")] if Path("/proc/cpuinfo").is_file() else []
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpus[0] if cpus else platform.processor()}"
    return (f"{name}, {len(cpus)} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; torch "
            f"{torch.__version__}, transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="a few clips, one round")
    parser.add_argument("--random", choices=list(worlds.SHAPES), help="random models of this shape instead of the "
                        "config's, of which the tokenizer and the log-mel's settings are still read; measures a "
                        "made-up set with LibriSpeech's lengths too, and ZeRO-3")
    parser.add_argument("--clips", type=int, help="clips a turn (default 32; 128 with --random)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a turn (default 2)")
    parser.add_argument("--rows", type=int, default=8, help="clips a batch where they are counted (default 8)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each way (default {ROUNDS})")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[], help="more rows with these budgets")
    options = parser.parse_args(argv)
    if options.random == "7b" and not options.batch_tokens:
        options.batch_tokens = [4096, 8192, 16384]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    return exits.run(lambda: show(parse_arguments(argv)))


def show(options: argparse.Namespace) -> None:
    """Measure, and print the figures."""
    result = run(options)
    print(json.dumps(result, indent=1) if options.json else report(result))


def run(options: argparse.Namespace) -> dict[str, Any]:
    small = options.random == "small"
    size = Size(4, 1, 1, 2, 0.1 if small else 1.0) if options.quick else Size(
        options.clips or (128 if options.random else 32), options.steps, options.rounds, options.rows)
    config = prepared(configuration.load(options.config, options.overrides), bool(options.random), small)
    if config.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device, config = torch.device("cpu"), replace(config, device="cpu")
    shape = worlds.SHAPES[options.random] if options.random else None
    gpu = device.type == "cuda"
    rate = matrix_rate(device, DTYPES[config.model.dtype], MATRIX_GPU if gpu else MATRIX_CPU)
    result: dict[str, Any] = {"machine": machine(device), "clips_a_turn": size.clips, "steps_a_turn": size.steps,
                              "matrix_tflops": rate / 1e12, "rows": [], "summary": {}}
    with tempfile.TemporaryDirectory() as folder:
        sets = {"config": config}
        if options.random:
            entry = worlds.made_up_set(Path(folder) / "made-up", 4 * size.clips, size.made_up_factor)
            sets["made-up"] = worlds.with_sets(config, [entry])
        for label, of_set in sets.items():
            rows = measure_set(of_set, shape, device, size, options, rate)
            result["rows"] += [{"set": label, **row} for row in rows]
            prefix = "" if label == "config" else "made_up_"
            result["summary"] |= {prefix + key: value for key, value in summarize(rows).items()}
            release(device)
        if options.random:
            result["rows"] += [{"set": label, **row} for row in measure_sharded(of_set, shape, device, size, rate)]
            dist.shutdown()
    return result


def report(result: dict[str, Any]) -> str:
    heads = ["set", "way", "clips/s", "target tokens/s", "real tokens/s", "padding", *PHASES, "peak MiB", "planned MiB",
             "FLOP share", "of the LLM's time"]
    lines = [result["machine"], f"matrix product: {result['matrix_tflops']:.2f} TFLOP/s",
             "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["set"], row["way"], f"{row['clips_per_second']:.2f}", f"{row['target_tokens_per_second']:.0f}",
                 f"{row['real_tokens_per_second']:.0f}", f"{row['padding_share']:.0%}",
                 *(f"{row['shares'][phase]:.1%}" for phase in PHASES), f"{row['peak_mib']:.0f}",
                 f"{row['planned_mib']:.0f}" if "planned_mib" in row else "", f"{row['flop_share']:.1%}",
                 f"{row['llm_flop_share']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(f"{key}: {value:.2f}" for key, value in result["summary"].items())])


if __name__ == "__main__":
    sys.exit(main())
