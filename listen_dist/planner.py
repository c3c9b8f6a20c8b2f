"""Memory, traffic and time of a training step, from a config alone: will it fit, and what will it cost?

    python -m listen_dist.planner --config configs/multitask_7b.yaml --gpus 64 --gpus-per-node 8 --gpu-memory 24
    python -m listen_dist.planner --config configs/multitask_7b.yaml --gpus 8,64,1024 data.batch_tokens=4096

Of the models their config.json is read, no weight. Formulas stand in the docstrings below and, with what they were
held against, in docs/scaling.md. R ranks, G of them on a node; W the LLM's bytes; T tokens of a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os.path import expanduser
from typing import Any

from listen_dist import config as configuration
from listen_dist import exits
from listen_dist.command_line import ConfigParser
from listen_dist.model_sizes import BEATS_HEADS, LLMSize, Sizes, sizes_of, window_frames
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import ENCODER_RATE

MIB, GIB = 2**20, 2**30
LAYOUTS = ("full", "node", "replicated")
PREFETCH = 50_000_000
"""Largest number of LLM parameters that ZeRO-3 fetches ahead in one go (engine/zero3.py)."""
PERSISTENT = 10_000
"""An LLM tensor of no more parameters stays whole on every rank (likewise)."""
TARGET_SHARE, AUDIO_SHARE = 0.4, 0.6
"""Most of a batch's tokens that are targets (transcripts), and most that are audio (captions of long clips)."""


@dataclass(frozen=True)
class Shape:
    """A micro-batch on one rank, padding included."""

    tokens: int
    """Input tokens of the LLM."""
    targets: int
    """Positions that logits are computed at."""
    row: int
    """Tokens of a row; matters for `model.attention = eager` alone."""
    seconds: float
    """Audio of all rows; 0 where stored features are read."""


@dataclass(frozen=True)
class Cluster:
    """Ranks and how fast they are. The defaults: an A100 at 40 % of its peak, NVLink, 200 Gb/s a node."""

    ranks: int
    per_node: int
    tflops: float = 125.0
    """Sustained bf16 TFLOP/s of one rank."""
    node_link: float = 200.0
    """GB/s into one rank from the others of its node."""
    network: float = 25.0
    """GB/s into one node from the others."""

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node

    def group(self, layout: str) -> int:
        """Ranks that share one copy of the LLM."""
        return {"full": self.ranks, "node": self.per_node, "replicated": 1}[layout]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank at the worst moment of a step."""

    llm_held: int
    """Shards of the frozen LLM (all of it where it is replicated)."""
    llm_gathered: int
    """Most weights gathered at once while it computes, small ones that stay so included."""
    buffers: int
    """Where a gather's pieces arrive before they are put in order."""
    encoders: int
    trainables: int
    """fp32 parameters, flat gradient, AdamW's two moments, and one temporary of the optimizer."""
    activations: int
    """Kept from forward to backward for one micro-batch."""
    workspace: int
    """On top for the moment: logits and their gradient, a layer's backward pass, or the encoders' forward pass."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def lines(self) -> list[str]:
        """One line an item, in MiB, for the start-up summary."""
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)] + [("total", self.total)]
        return [f"  planned {name:<13} {size / MIB:10.1f} MiB" for name, size in rows]


@dataclass(frozen=True)
class StepPlan:
    """Traffic and time of one optimizer step."""

    gathers: int
    """Times that the whole LLM is gathered."""
    in_rank: float
    """Bytes into one rank, from wherever."""
    in_node: float
    """Bytes into one node from the others."""
    compute_seconds: float
    traffic_seconds: float
    """The slower of both kinds of links, all at full speed."""

    @property
    def seconds(self) -> tuple[float, float]:
        """With all traffic hidden behind computation, and with none."""
        return max(self.compute_seconds, self.traffic_seconds), self.compute_seconds + self.traffic_seconds


def usual_shape(config: Config) -> Shape:
    """The fullest micro-batch to expect: the budget used up, many targets, and (in another batch) much audio."""
    tokens = config.data.batch_tokens
    seconds = AUDIO_SHARE * tokens * window_frames(config.projector) / ENCODER_RATE
    return Shape(tokens, round(TARGET_SHARE * tokens), min(tokens, 256), seconds)


def plan_memory(config: Config, sizes: Sizes, cluster: Cluster, layout: str, shape: Shape | None = None) -> MemoryPlan:
    """One rank's memory with the LLM laid out as `layout` ("full", "node" or "replicated").

    - held: each tensor cut in equal parts over its group of ranks, the last part filled up;
    - gathered: `parallel.max_live_parameters` and the tensor at work; with checkpointing at least a whole layer and
      the largest tensor. Small tensors stay whole;
    - trainables: 4 (value) + 4 (gradient) + 8 (moments) + 4 (temporary) bytes each; frozen ones 4;
    - activations: see `kept_by_layer`; with checkpointing the input of each layer alone.
    """
    shape = shape or usual_shape(config)
    item, llm = item_size(config), sizes.llm
    group = cluster.group(layout)
    live = config.parallel.max_live_parameters
    small = sum(n for n in llm.tensors if n <= PERSISTENT)
    at_work = max(live, llm.layer) if config.model.checkpointing else live
    gathered = min(llm.parameters, at_work + llm.largest + small)
    arriving = min(llm.parameters, max(llm.largest, min(live, PREFETCH)))
    learned = sizes.pool + (0 if config.projector.freeze else sizes.projector)
    per_layer = kept_by_layer(config, llm, shape.row)
    kept = shape.tokens * kept_by_llm(config, llm, per_layer) + kept_by_projector(config, sizes, shape)
    layer = shape.tokens * (3 * llm.inner * item + 16 * llm.width)  # gradients inside one layer
    if config.model.checkpointing:
        layer += shape.tokens * per_layer
    loss = 12 * shape.targets * llm.vocabulary
    return MemoryPlan(
        llm_held=item * sum(math.ceil(n / group) for n in llm.tensors),
        llm_gathered=item * gathered if group > 1 else 0,
        buffers=item * arriving * (2 if config.device == "cpu" else 1) if group > 1 else 0,  # gloo copies it once more
        encoders=4 * (sizes.speech_parameters + sizes.audio_parameters),  # fp32 in any case
        trainables=20 * learned + (4 * sizes.projector if config.projector.freeze else 0),
        activations=kept,
        workspace=max(loss, layer, encoding(config, sizes, shape) - kept))


def item_size(config: Config) -> int:
    """Bytes of one frozen weight."""
    return 2 if config.model.dtype == "bfloat16" else 4


def kept_by_layer(config: Config, llm: LLMSize, row: int) -> int:
    """Bytes a token that a frozen Llama-like layer of width D and inner width F keeps for its backward pass.

    A frozen matrix needs no input for it. What is kept: the fp32 input of both norms (8 D); q, k, v and the output
    of attention (4 D); gate, its activation and up (3 F). Eager attention keeps its weights too, in fp32 and as used.
    """
    item = item_size(config)
    scores = llm.heads * row * (4 + item) if config.model.attention == "eager" else 0
    return 8 * llm.width + 4 * llm.attention_width * item + 3 * llm.inner * item + scores


def kept_by_llm(config: Config, llm: LLMSize, per_layer: int) -> int:
    """The same for all layers, the last norm (4 D) and the input as it is put together (6 D)."""
    item = item_size(config)
    layer = llm.width * item if config.model.checkpointing else per_layer
    return llm.layers * layer + 4 * llm.width + 6 * llm.width * item


def kept_by_projector(config: Config, sizes: Sizes, shape: Shape) -> int:
    """fp32, a frame: the input of the norm and of what follows (2 E); keys and values of the Q-Former's layers."""
    frame = 2 * (sizes.speech_width + sizes.audio_width)
    if config.projector.kind == "qformer":
        frame += 2 * config.projector.layers * config.projector.hidden
    return round(4 * frame * shape.seconds * ENCODER_RATE)


def encoding(config: Config, sizes: Sizes, shape: Shape) -> int:
    """Most bytes that the encoders' forward pass takes: about 10 E a frame, and BEATs' attention weights four times."""
    item, frames = item_size(config), shape.seconds * ENCODER_RATE
    scores = 4 * BEATS_HEADS * min(config.data.max_seconds, shape.seconds) * ENCODER_RATE if sizes.audio_width else 0
    return round(item * frames * max(10 * sizes.speech_width, 10 * sizes.audio_width + scores))


def room_for_whole(config: Config, size: LLMSize) -> int:
    """Bytes that decoding needs on one rank beyond its shard when the LLM is gathered whole.

    The weights, keys and values of a batch while it decodes (as if grouped queries saved nothing, and once
    more for what Hugging Face copies when they grow), and one step's logits.
    """
    item = item_size(config)
    tokens = config.eval.batch_tokens * config.eval.beams
    cache = 2 * tokens * size.layers * 2 * size.width * item
    logits = tokens * size.vocabulary // 8 * 4  # a row has eight tokens or more
    return size.parameters * item + cache + logits


def plan_step(config: Config, sizes: Sizes, cluster: Cluster, layout: str, shape: Shape | None = None) -> StepPlan:
    """Traffic and time of an optimizer step.

    A gather over g ranks brings W (g − 1)/g into each rank; ranks stand in a ring, so that the same amount enters each
    node where a group spans several. The LLM is gathered for the forward and for the backward pass, once more where
    activations are recomputed and a layer does not stay gathered in between, and only once where all of it may stay.
    The trainables' fp32 gradient (4 bytes each) goes round twice, 2 · 4 n (R − 1)/R, once a step.
    Computation, for P parameters and t tokens: 2 P t forward, 2 P t for the gradient of the input (frozen weights have
    none of their own), 2 P t recomputed; the encoders forward alone; trainables 6 P t.
    """
    shape = shape or usual_shape(config)
    llm, group = sizes.llm, cluster.group(layout)
    micro = math.ceil((config.train.batches_per_step or cluster.ranks) / cluster.ranks)
    recompute = config.model.checkpointing
    parallel, gathers = config.parallel, 0
    if group > 1 and parallel.backend == "deepspeed" and parallel.max_live_parameters >= llm.parameters:
        gathers = micro
    elif group > 1:
        gathers = micro * (2 + (recompute and parallel.max_live_parameters < llm.layer))
    gathered = gathers * item_size(config) * llm.parameters * (group - 1) / group
    learned = sizes.pool + (0 if config.projector.freeze else sizes.projector)
    reduced = 8 * learned * (cluster.ranks - 1) / cluster.ranks
    in_rank = gathered + reduced
    in_node = (gathered if layout == "full" else 0) + reduced if cluster.nodes > 1 else 0.0
    frames = shape.seconds * ENCODER_RATE
    flops = micro * (
        (6 if recompute else 4) * llm.layers * llm.layer * shape.tokens + 4 * llm.width * llm.vocabulary * shape.targets
        + 2 * (sizes.speech_parameters + sizes.audio_parameters) * frames + 6 * sizes.projector * frames)
    return StepPlan(gathers, in_rank, in_node, flops / (cluster.tflops * 1e12),
                    max(in_rank / (cluster.node_link * 1e9), in_node / (cluster.network * 1e9)))


def cures(config: Config, sizes: Sizes, cluster: Cluster, layout: str, limit: float) -> tuple[list[str], int]:
    """Config changes, cheapest first, until one rank needs at most `limit` bytes.

    Returns:
        `key=value` words, and the bytes with all of them (above the limit where they are not enough).
    """
    words: dict[str, str] = {}
    total = plan_memory(config, sizes, cluster, layout).total
    while total > limit:
        for key, value, changed, where in _changes(config, sizes, cluster, layout):
            after = plan_memory(changed, sizes, cluster, where).total
            if after < total:
                words[key], config, layout, total = value, changed, where, after
                break
        else:
            break
    return [f"{key}={value}" for key, value in words.items()], total


def _changes(config: Config, sizes: Sizes, cluster: Cluster, layout: str) -> Iterator[tuple[str, str, Config, str]]:
    """Single changes that may save memory, the one that costs least first: key, value, config and layout with it."""
    model, parallel, data = config.model, config.parallel, config.data
    if not model.checkpointing:
        yield "model.checkpointing", "true", replace(config, model=replace(model, checkpointing=True)), layout
    live = 2 * sizes.llm.layer
    if parallel.max_live_parameters > live:
        less = replace(config, parallel=replace(parallel, max_live_parameters=live))
        yield "parallel.max_live_parameters", str(live), less, layout
    for wider in reversed(LAYOUTS[: LAYOUTS.index(layout)]):
        if cluster.group(wider) > cluster.group(layout):
            yield "parallel.llm", wider, config, wider
    tokens = data.batch_tokens // 2
    if tokens >= 512:
        yield "data.batch_tokens", str(tokens), replace(config, data=replace(data, batch_tokens=tokens)), layout


def report(config: Config, sizes: Sizes, cluster: Cluster, limit: float) -> dict[str, Any]:
    """All figures of one cluster, by layout, as plain values."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        memory, step = plan_memory(config, sizes, cluster, layout), plan_step(config, sizes, cluster, layout)
        words, total = cures(config, sizes, cluster, layout, limit)
        found[layout] = {"memory": asdict(memory) | {"total": memory.total}, "fits": memory.total <= limit,
                         "step": asdict(step) | {"seconds": step.seconds}, "changes": words, "total_changed": total}
    return found


def table(config: Config, sizes: Sizes, cluster: Cluster, limit: float) -> str:
    """One cluster in full: an item a line, a layout a column."""
    plans = report(config, sizes, cluster, limit)
    lines = [f"{cluster.ranks} GPUs, {cluster.per_node} a node; GiB on one GPU{'':<12}" +
             "".join(f"{layout:>12}" for layout in LAYOUTS)]
    for name in plans["full"]["memory"]:
        row = "".join(f"{plans[layout]['memory'][name] / GIB:12.2f}" for layout in LAYOUTS)
        lines.append(f"  {name:<44}"[:44] + row)
    steps = {layout: plans[layout]["step"] for layout in LAYOUTS}
    rows = {"GB into a GPU a step": [f"{steps[x]['in_rank'] / 1e9:.2f}" for x in LAYOUTS],
            "GB into a node a step": [f"{steps[x]['in_node'] / 1e9:.2f}" for x in LAYOUTS],
            "seconds to compute": [f"{steps[x]['compute_seconds']:.2f}" for x in LAYOUTS],
            "seconds of traffic": [f"{steps[x]['traffic_seconds']:.2f}" for x in LAYOUTS],
            "seconds a step": ["{:.2f}-{:.2f}".format(*steps[x]["seconds"]) for x in LAYOUTS]}
    lines += [f"{name:<44}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items()]
    return "\n".join(lines + [verdict(layout, plan, limit) for layout, plan in plans.items()])


def verdict(layout: str, plan: dict[str, Any], limit: float) -> str:
    """Whether a layout fits, and what to change where it does not."""
    need, most = plan["memory"]["total"] / GIB, f"{limit / GIB:.1f} GiB"
    if plan["fits"]:
        return f"{layout}: fits ({need:.1f} of {most})"
    words, total = plan["changes"], plan["total_changed"]
    after = f"{' '.join(words)} makes it {total / GIB:.1f} GiB" if words else "no key of the config helps"
    enough = "" if total <= limit else "; that is not enough: more GPUs to shard over, larger ones, or a smaller LLM"
    return f"{layout}: does NOT fit ({need:.1f} of {most}): {after}{enough}"


def overview(config: Config, sizes: Sizes, clusters: Sequence[Cluster], limit: float) -> str:
    """Several clusters in brief, as a Markdown table."""
    lines = ["| GPUs | parallel.llm | GiB a GPU | fits | GB into a GPU | GB into a node | s a step |",
             "|---:|---|---:|---|---:|---:|---:|"]
    for cluster in clusters:
        for layout, plan in report(config, sizes, cluster, limit).items():
            step = plan["step"]
            lines.append(f"| {cluster.ranks} | {layout} | {plan['memory']['total'] / GIB:.1f} | "
                         f"{'yes' if plan['fits'] else 'no'} | {step['in_rank'] / 1e9:.2f} | "
                         f"{step['in_node'] / 1e9:.2f} | {step['seconds'][0]:.2f}-{step['seconds'][1]:.2f} |")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, required=True, help="YAML file, see configs/")
    parser.add_argument("--gpus", required=True, metavar="N[,N…]", help="ranks; several numbers give a brief table")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GiB")
    parser.add_argument("--reserve", type=float, default=1.5, metavar="GiB",
                        help="left for the CUDA context, NCCL and what the allocator cannot use (default 1.5)")
    for name, what in (("tflops", "sustained bf16 TFLOP/s of a GPU"), ("node-link", "GB/s into a GPU within a node"),
                       ("network", "GB/s into a node")):
        default = getattr(Cluster, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what} (default {default:g})")
    parser.add_argument("--json", action="store_true", help="all figures as JSON, in bytes and seconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    return exits.run(lambda: plan(parse_arguments(argv)))


def plan(options: argparse.Namespace) -> None:
    """Print what the config needs on the clusters that are asked about."""
    clusters = []
    for word in options.gpus.split(","):
        ranks = int(word) if word.isdecimal() else 0
        per_node = min(ranks, options.gpus_per_node)
        if per_node < 1 or ranks % per_node:
            raise ConfigError(f"--gpus {word}: must be a multiple of --gpus-per-node {options.gpus_per_node}")
        clusters.append(Cluster(ranks, per_node, options.tflops, options.node_link, options.network))
    config = configuration.load(options.config, options.overrides)
    sizes = sizes_of(config)
    limit = (options.gpu_memory - options.reserve) * GIB
    if options.json:
        print(json.dumps({str(cluster.ranks): report(config, sizes, cluster, limit) for cluster in clusters}, indent=1))
    elif len(clusters) == 1:
        print(table(config, sizes, clusters[0], limit))
    else:
        print(overview(config, sizes, clusters, limit))


if __name__ == "__main__":
    sys.exit(main())
