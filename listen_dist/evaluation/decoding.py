"""Decode a set on all ranks: every sample once, texts gathered on every rank.

Where the LLM lies whole on every rank, each works through its share at its own pace. Where it stays
sharded, every forward needs all ranks: they go in rounds, and a rank with nothing left to do computes on
a filler whose result is dropped.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from listen_dist import dist, logs
from listen_dist.data.loader import BatchReader, decoding_batches, find_filler
from listen_dist.data.shards import ShardError, ShardIndex
from listen_dist.engine.assembly import Parts
from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import PartialFile, Prediction
from listen_dist.schema import Config, ConfigError, EvalConfig, SetConfig
from listen_dist.structures import Batch, SkippedSample
from listen_dist.tasks import get_task, token_limit

logger = logging.getLogger(__name__)


class UnscorableError(ListenError):
    """A set has no result for every sample."""


@dataclass(frozen=True)
class Decoder:
    """How samples are answered."""

    parts: Parts
    config: EvalConfig
    k: int
    """Prompts a row."""
    whole: bool
    """The LLM is whole on every rank (`sharding.whole()` is open, or it is replicated)."""

    def decode_set(self, reader: BatchReader, done: Sequence[Prediction] = (), partial: PartialFile | None = None,
                   ) -> tuple[list[Prediction], list[SkippedSample]]:
        """Decode what is not done of the reader's only set. Every rank must call it.

        Args:
            done: taken over from an interrupted evaluation, the same on every rank.
            partial: where finished predictions go at once.

        Returns:
            all ranks' predictions in the order of ids, and the samples that could not be read.

        Raises:
            UnscorableError: a sample is missing or came twice; on all ranks.
        """
        (index,) = reader.indexes
        batches, rounds = decoding_batches(reader, self.parts.token_cost(self.k), self.config.batch_tokens,
                                           self.parts.config.data.workers, dist.rank(), dist.world_size(),
                                           self.config.limit, {row.id for row in done})
        predictions: list[Prediction] = []
        skipped: list[SkippedSample] = []
        answered = self._at_own_pace(batches) if self.whole else self._in_rounds(batches, rounds, reader)
        for batch, rows in logs.progress(answered, f"decoding {index.folder}"):
            skipped += batch.skipped
            predictions += rows
            if partial is not None and rows:
                partial.add(index.fingerprint, rows)
        both = dist.gather_objects((predictions, skipped))
        everything = sorted([*done, *(p for theirs, _ in both for p in theirs)], key=lambda p: p.id)
        left_out = [s for _, theirs in both for s in theirs]
        names = [row.id for row in (*everything, *left_out)]
        expected = min(self.config.limit or index.samples, index.samples)
        if len(names) != expected or len(set(names)) != expected:
            cure = "delete the partial results and evaluate again" if done else "write the shards anew"
            raise UnscorableError(f"{index.folder}: {len(names)} results ({len(set(names))} different ids) for "
                                  f"{expected} samples; {cure}")
        return everything, left_out

    def _at_own_pace(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Prediction]]]:
        for batch in batches:
            closed, free = self._split(batch)
            yield batch, [*(self.choose(closed) if len(closed) else ()), *(self.generate(free) if len(free) else ())]

    def _in_rounds(self, batches: Iterator[Batch], rounds: int, reader: BatchReader,
                   ) -> Iterator[tuple[Batch, list[Prediction]]]:
        try:
            filler = find_filler(reader)
        except ShardError as error:  # on all ranks, which read the same
            raise UnscorableError(str(error)) from None
        filler = replace(filler, choices=[("",)], choice_ids=[[[self.parts.text.frame.eos] * 2]], skipped=[])
        nothing = filler.select([])
        for batch in itertools.islice(itertools.chain(batches, itertools.repeat(nothing)), rounds):
            closed, free = self._split(batch) if len(batch) else (nothing, nothing)
            any_closed, any_free = dist.sum_(torch.tensor([len(closed), len(free)],
                                                          device=self.parts.model.device)).tolist()
            rows: list[Prediction] = []
            if any_closed:
                rows += self.choose(closed if len(closed) else filler)[: len(closed)]
            if any_free:
                rows += self.generate(free if len(free) else filler)[: len(free)]
            yield batch, rows

    def answer(self, batch: Batch) -> list[Prediction]:
        """Answer every row of a batch of one task, without other ranks."""
        return next(self._at_own_pace(iter([batch])))[1]

    def _split(self, batch: Batch) -> tuple[Batch, Batch]:
        """Rows answered by likelihood, and rows answered by generating."""
        chosen = [self.config.choices == "likelihood" and bool(choices) for choices in batch.choices]
        return (batch.select([row for row, by_likelihood in enumerate(chosen) if by_likelihood]),
                batch.select([row for row, by_likelihood in enumerate(chosen) if not by_likelihood]))

    def choose(self, batch: Batch) -> list[Prediction]:
        """The likeliest choice of each row."""
        likelihoods, matched = self.parts.model.score(batch, self.k)
        return [Prediction(batch.ids[i], batch.tasks[i], batch.choices[i][int(row.argmax())], batch.answers[i],
                           tuple(matched.indices[i].tolist()), tuple(matched.scores[i].tolist()), batch.choices[i],
                           tuple(row.tolist()), batch.languages[i])
                for i, row in enumerate(likelihoods)]

    def generate(self, batch: Batch, limit: int | None = None, **options: object) -> list[Prediction]:
        """What the LLM says to each row of a batch of one task.

        Args:
            limit: most tokens of an answer; default: by task and length of the clip.
            options: for Hugging Face's `generate`.
        """
        limits = [limit or token_limit(task, seconds) for task, seconds in zip(batch.tasks, batch.seconds, strict=True)]
        config, text, task = self.config, self.parts.text, get_task(batch.tasks[0])
        free, stops = task.answers == "text", text.line_ends if task.one_line else ()
        ids, matched = self.parts.model.generate(
            batch, self.k, limits, stops, num_beams=config.beams,
            repetition_penalty=config.repetition_penalty if free else 1.0,
            no_repeat_ngram_size=config.no_repeat_ngram_size if free else 0,
            length_penalty=config.length_penalty if config.beams > 1 else None, synced_gpus=not self.whole, **options)

        def ended(row: list[int], limit: int) -> str:
            return "line" if row and row[-1] in stops else "limit" if len(row) >= limit else "eos"

        return [Prediction(batch.ids[i], batch.tasks[i], first_line(text.decode(row)) if stops else text.decode(row),
                           batch.answers[i], tuple(matched.indices[i].tolist()), tuple(matched.scores[i].tolist()),
                           batch.choices[i], language=batch.languages[i], ended=ended(row, limits[i]))
                for i, row in enumerate(ids)]


def check_ids(split: str, config: Config) -> None:
    """Every id of a set stands in it once, as results go by ids.

    Raises:
        ConfigError: two folders joined by braces share one; both are named.
        ShardError: a set can't be read.
    """
    sets: list[SetConfig] = getattr(config.data, split)
    for entry in sets:
        _check_ids(f"data.{split}", ShardIndex.load(entry.path, config.data))


def _check_ids(key: str, index: ShardIndex) -> None:
    seen: dict[str, int] = {}
    for shard in range(len(index.shards)):
        for name in index.shard_table(shard).ids:
            if name in seen:
                first, second = (index.folder / index.shards[number].name for number in (seen[name], shard))
                raise ConfigError(f"{key}: the id {name!r} stands in {first} and in {second}; give each folder a set "
                                  "of its own instead of joining them by braces")
            seen[name] = shard


def first_line(text: str) -> str:
    """What stands before the first line end."""
    return re.split(r"[\r\n]", text.strip(), maxsplit=1)[0].strip()
