"""Decode a set on all ranks: every sample once, texts gathered on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from listen_dist import dist, logs
from listen_dist.config import EvalConfig
from listen_dist.data.loader import BatchReader, decoding_batches
from listen_dist.engine.assembly import Parts
from listen_dist.structures import Batch, SkippedSample
from listen_dist.tasks import get_task, token_limit


@dataclass(frozen=True)
class Prediction:
    """One decoded sample."""

    id: str
    task: str
    text: str
    answers: tuple[str, ...]
    prompts: tuple[int, ...]
    """Indices of the prompts picked, best first."""
    scores: tuple[float, ...]
    choices: tuple[str, ...] = ()
    """The closed set that `text` comes from; empty where the text was generated."""
    likelihoods: tuple[float, ...] = ()
    """log p(choice and EOS | input) of each."""


def decode_set(parts: Parts, reader: BatchReader, config: EvalConfig, k: int,
               ) -> tuple[list[Prediction], list[SkippedSample]]:
    """Decode the reader's set with k prompts; call inside `sharding.whole()`.

    Ranks may take different numbers of batches: nothing here waits for another rank
    until all are done.

    Returns:
        all ranks' predictions in the order of ids, and the samples that could not be read.
    """
    batches = decoding_batches(reader, parts.token_cost(k), config.batch_tokens, parts.config.data.workers,
                               dist.rank(), dist.world_size(), config.limit)
    predictions: list[Prediction] = []
    skipped: list[SkippedSample] = []
    name = reader.indexes[0].folder
    for batch in logs.progress(batches, f"decoding {name}"):
        skipped += batch.skipped
        predictions += decode(parts, batch, config, k)
    both = dist.gather_objects((predictions, skipped))
    everything = sorted((p for theirs, _ in both for p in theirs), key=lambda p: p.id)
    return everything, [s for _, theirs in both for s in theirs]


def decode(parts: Parts, batch: Batch, config: EvalConfig, k: int) -> list[Prediction]:
    """Answer every row of a batch of one task: by the likelihood of its choices, or by generating."""
    by_likelihood = [config.choices == "likelihood" and bool(choices) for choices in batch.choices]
    closed = batch.select([row for row, chosen in enumerate(by_likelihood) if chosen])
    free = batch.select([row for row, chosen in enumerate(by_likelihood) if not chosen])
    answers = [*(choose(parts, closed, k) if len(closed) else ()),
               *(generate(parts, free, config, k) if len(free) else ())]
    return answers


def choose(parts: Parts, batch: Batch, k: int) -> Iterator[Prediction]:
    """The likeliest choice of each row (the first among equals)."""
    likelihoods, matched = parts.model.score(batch, k)
    for i, row in enumerate(likelihoods):
        yield Prediction(batch.ids[i], batch.tasks[i], batch.choices[i][int(row.argmax())], batch.answers[i],
                         tuple(matched.indices[i].tolist()), tuple(matched.scores[i].tolist()),
                         batch.choices[i], tuple(row.tolist()))


def generate(parts: Parts, batch: Batch, config: EvalConfig, k: int) -> Iterator[Prediction]:
    """What the LLM says to each row of a batch of one task."""
    limits = [token_limit(task, seconds) for task, seconds in zip(batch.tasks, batch.seconds, strict=True)]
    penalty = config.repetition_penalty if get_task(batch.tasks[0]).answers == "text" else 1.0
    ids, matched = parts.model.generate(batch, k, limits, num_beams=config.beams,
                                        length_penalty=config.length_penalty if config.beams > 1 else None,
                                        repetition_penalty=penalty)
    for i, row in enumerate(ids):
        yield Prediction(batch.ids[i], batch.tasks[i], parts.text.decode(row), batch.answers[i],
                         tuple(matched.indices[i].tolist()), tuple(matched.scores[i].tolist()))
