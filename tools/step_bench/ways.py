"""The ways of doing the same clips, and what one turn of each takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import Mixture, SampleRef
from listen_dist.data.schedule import costs_of, cut_evenly
from listen_dist.engine.assembly import Parts
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.models.llm import CompiledLayers, recompute_activations
from listen_dist.structures import Batch
from tools.step_bench.clock import Clock, Peak
from tools.step_bench.rivals import PADDED_SECONDS, PaddedLogMel, TrainerModel, research_step, run_trainer


@dataclass(frozen=True)
class Way:
    """How the clips of a turn are trained on."""

    name: str
    kind: Literal["research", "trainer", "ours"] = "ours"
    padded: bool = False
    """Every clip is filled up to 30 s."""
    by_count: bool = False
    """So many clips a batch in random order, instead of a budget of tokens and like lengths."""
    all_logits: bool = False
    stored: bool = False
    """Read the encoder's output from the shards."""
    recompute: bool = False
    """`model.checkpointing`."""
    backend: Literal["auto", "reference"] = "auto"
    """Of the top-k selection."""
    compiled: bool = False
    """`model.compile`."""
    budget: int = 0
    """Another `data.batch_tokens`."""


@dataclass(frozen=True)
class Turn:
    """The clips of a turn, alike for all ways."""

    refs: list[SampleRef]
    target_tokens: int
    real_tokens: int
    """The LLM's input without padding or silence."""


@dataclass
class Measured:
    """What one turn took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    phases: dict[str, float] | None = None
    padded_tokens: int = 0
    peak_bytes: int = 0
    largest: tuple[int, int, int, float] = (0, 0, 0, 0.0)
    """Of the largest micro-batch: input tokens, positions with logits, tokens of a row, seconds of audio."""


class Bench:
    """One model, and clips to train it on in several ways.

    Args:
        steps: optimizer steps of a turn.
        rows: clips of a micro-batch where they are counted.
        base: bytes that were in use before the models were loaded; peaks are counted from there.
    """

    def __init__(self, parts: Parts, clips: int, steps: int, rows: int, base: int) -> None:
        self.parts, self.model, self.config = parts, parts.model, parts.config
        self.steps, self.rows, self._clips, self._base = steps, rows, clips, base
        self.k = self.config.pool.k_max
        sets = self.config.data.train
        reader = parts.reader(sets, True)
        self._readers = {"audio": reader,
                         "padded": replace(parts, log_mel=PaddedLogMel(parts.log_mel)).reader(sets, True)}
        encoder = self.model.encoder.fingerprint  # a random one has made none of the sets' features
        self.has_stored = all(index.features and index.features.fingerprint == encoder for index in reader.indexes)
        if self.has_stored:
            stored = replace(self.config, data=replace(self.config.data, stored_features=True))
            self._readers["stored"] = replace(parts, config=stored).reader(sets, True)
        self._mixture: Mixture = parts.mixture(reader)
        self._cost = parts.training_cost(reader)
        self._optimizer = build_optimizer(self.model.trainable, self.config.train)
        self._replicated = ReplicatedTrainables(self.model.trainable, self.model.pool.observed)
        self._filler = reader[self._mixture.window(0, 1)]
        self._layers = CompiledLayers(self.model.llm)
        self.model.train()
        recompute_activations(self.model.llm, False)

    def turn(self, number: int) -> Turn:
        """The clips of a turn, as training draws them."""
        refs, frame = self._mixture.window(number, self._clips), self.parts.text.frame
        batch = self._readers["audio"][refs]
        audio = self.model.projector.tokens_of(self.model.encoder.frames_of(batch.audio_lengths)).sum()
        fixed = self.k + len(frame.bos) + len(frame.before)
        real = len(refs) * fixed + int(audio) + sum(map(len, batch.after_ids)) + batch.target_tokens
        return Turn(refs, batch.target_tokens, real)

    def run(self, way: Way, turn: Turn, number: int) -> Measured:
        """Do a turn's clips."""
        clock, found = Clock(self.model.device), Measured()
        with ExitStack() as stack:
            watched = ((self.model, "frames", "encoders"), (self.model.llm, "forward", "llm_forward"),
                       (torch.Tensor, "backward", "backward"), (self._replicated, "reduce", "reduction"))
            for owner, attribute, phase in watched:
                stack.enter_context(clock.watch(owner, attribute, phase))
            stack.enter_context(clock.watch_steps(self._optimizer))
            stack.enter_context(self._switched(way, found))
            peak = Peak(self.model.device)
            begin = [0.0, 0.0]

            def start() -> None:
                begin[:] = clock.now(), time.process_time()

            def end() -> None:
                found.seconds, found.cpu_seconds = clock.now() - begin[0], time.process_time() - begin[1]

            self._work(way, turn, number, clock, start, end, found)
            found.peak_bytes = peak.bytes() - self._base
        found.phases = clock.seconds
        return found

    def _work(self, way: Way, turn: Turn, number: int, clock: Clock, start: Any, end: Any, found: Measured) -> None:
        reader = self._readers["stored" if way.stored else "padded" if way.padded else "audio"]
        read = _Reading(reader, clock, found)
        weight = self.config.pool.match_weight
        if way.kind == "trainer":
            accumulate = max(1, round(len(turn.refs) / self.steps / self.rows))
            run_trainer(TrainerModel(self.model, self.k, weight), self._optimizer, turn.refs, read, self.rows,
                        accumulate, start, end)
            return
        start()
        for step, plan in enumerate(self._plan(way, turn, number)):
            batches = [read(refs) for refs in plan]
            if way.kind == "research":
                research_step(self.model, self._optimizer, batches, self.k, weight)
            else:
                train_step(self.model, self._replicated, self._optimizer, self.config, step, self.steps, batches,
                           self._filler)
        end()

    def _plan(self, way: Way, turn: Turn, number: int) -> list[list[list[SampleRef]]]:
        """For each step its micro-batches."""
        random = np.random.default_rng(number)
        order = random.permutation(len(turn.refs))
        if way.by_count:
            batches = [order[at : at + self.rows].tolist() for at in range(0, len(order), self.rows)]
        else:
            indexes = self._readers["audio"].indexes
            costs = costs_of(turn.refs, indexes, self._cost)
            if way.padded:
                seconds = np.array([indexes[ref.set].shard_table(ref.shard).seconds[ref.row] for ref in turn.refs])
                costs = costs + self._cost.audio_tokens_per_second * (PADDED_SECONDS - seconds)
            order = order[np.argsort(costs[order], kind="stable")]
            batches = cut_evenly(costs, order.tolist(), way.budget or self.config.data.batch_tokens)
            random.shuffle(batches)
        return [[[turn.refs[i] for i in batches[place]] for place in places]
                for places in np.array_split(np.arange(len(batches)), self.steps) if len(places)]

    @contextmanager
    def _switched(self, way: Way, found: Measured) -> Iterator[None]:
        """Switch on and off what the way asks for; note the size of each forward pass of the LLM."""
        llm, pool = self.model.llm, self.model.pool

        def note(_module: torch.nn.Module, _inputs: Any, options: dict[str, Any]) -> Any:
            rows, row = options["inputs_embeds"].shape[:2]
            found.padded_tokens += rows * row
            if rows * row > found.largest[0]:
                positions = rows * (options.get("logits_to_keep") or row)
                found.largest = (rows * row, positions, row, found.largest[3])
            return (_inputs, {**options, "logits_to_keep": 0}) if way.all_logits else None

        def cut(_module: torch.nn.Module, _inputs: Any, options: dict[str, Any], output: Any) -> Any:
            output.logits = output.logits[:, -options_kept.pop() :]
            return output

        options_kept: list[int] = []
        handles = [llm.register_forward_pre_hook(note, with_kwargs=True)]
        if way.all_logits:
            handles.append(llm.register_forward_pre_hook(
                lambda _m, _i, options: options_kept.append(options["logits_to_keep"]), with_kwargs=True, prepend=True))
            handles.append(llm.register_forward_hook(cut, with_kwargs=True))
        before = getattr(pool, "backend", "auto")
        if hasattr(pool, "backend"):
            pool.backend = way.backend
        if way.recompute:
            llm.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
            recompute_activations(llm, True)
        self._layers.switch(way.compiled)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if hasattr(pool, "backend"):
                pool.backend = before
            if way.recompute:
                llm.gradient_checkpointing_disable()
                recompute_activations(llm, False)
            self._layers.switch(False)


class _Reading:
    """A reader whose time counts as waiting for data; nothing is read ahead."""

    def __init__(self, reader: BatchReader, clock: Clock, found: Measured) -> None:
        self._reader, self._clock, self._found = reader, clock, found

    def __call__(self, refs: Sequence[SampleRef]) -> Batch:
        with self._clock.phase("data"):
            batch = self._reader[list(refs)]
        tokens, positions, row, seconds = self._found.largest
        self._found.largest = (tokens, positions, row, max(seconds, sum(batch.seconds)))
        return batch
