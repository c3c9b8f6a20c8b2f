"""From prepared samples to a padded Batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from listen_dist.structures import Batch, Record, SkippedSample


@dataclass(frozen=True)
class Prepared:
    """One sample ready for a batch."""

    record: Record
    audio: torch.Tensor
    """float32 [mels, M] log-mel, or float16 [F, E] stored encoder frames."""
    after_ids: list[int]
    target_ids: list[int]
    seconds: float
    choices: tuple[str, ...] = ()
    choice_ids: tuple[list[int], ...] = ()
    fbank: torch.Tensor | None = None
    """float32 [M, 128] for the audio encoder, where there is one and the features are not stored."""


def collate(samples: list[Prepared], is_features: bool, skipped: list[SkippedSample]) -> Batch:
    """Pad to the longest row, keep true lengths. No sample gives an empty batch that names what was skipped."""
    fbanks = [sample.fbank for sample in samples if sample.fbank is not None]
    time = 0 if is_features else 1
    lengths = [sample.audio.shape[time] for sample in samples]
    return Batch(
        ids=[sample.record.id for sample in samples],
        tasks=[sample.record.task for sample in samples],
        audio=_pad([sample.audio for sample in samples], time) if samples else torch.zeros(0, 0, 0),
        audio_lengths=torch.tensor(lengths, dtype=torch.long),
        is_features=is_features,
        after_ids=[sample.after_ids for sample in samples],
        target_ids=[sample.target_ids for sample in samples],
        answers=[sample.record.answers for sample in samples],
        languages=[sample.record.language for sample in samples],
        seconds=[sample.seconds for sample in samples],
        choices=[sample.choices for sample in samples],
        choice_ids=[list(sample.choice_ids) for sample in samples],
        skipped=skipped,
        fbank=_pad(fbanks, 0) if fbanks else None,
        fbank_lengths=torch.tensor([len(bank) for bank in fbanks], dtype=torch.long) if fbanks else None,
    )


def _pad(rows: list[torch.Tensor], time: int) -> torch.Tensor:
    """Rows of different lengths along dimension `time` as one tensor, zeros behind the short ones."""
    shape = list(rows[0].shape)
    shape[time] = max(row.shape[time] for row in rows)
    padded = rows[0].new_zeros(len(rows), *shape)
    for place, row in zip(padded, rows, strict=True):
        place.narrow(time, 0, row.shape[time]).copy_(row)
    return padded
