"""From prepared samples to a padded Batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

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
    rows = [sample.audio if is_features else sample.audio.T for sample in samples]  # each [time, width]
    padded = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, 0)
    fbanks = [sample.fbank for sample in samples if sample.fbank is not None]
    return Batch(
        ids=[sample.record.id for sample in samples],
        tasks=[sample.record.task for sample in samples],
        audio=padded if is_features else padded.transpose(1, 2),
        audio_lengths=torch.tensor([len(row) for row in rows], dtype=torch.long),
        is_features=is_features,
        after_ids=[sample.after_ids for sample in samples],
        target_ids=[sample.target_ids for sample in samples],
        answers=[sample.record.answers for sample in samples],
        seconds=[sample.seconds for sample in samples],
        choices=[sample.choices for sample in samples],
        choice_ids=[list(sample.choice_ids) for sample in samples],
        skipped=skipped,
        fbank=pad_sequence(fbanks, batch_first=True) if fbanks else None,
        fbank_lengths=torch.tensor([len(bank) for bank in fbanks], dtype=torch.long) if fbanks else None,
    )
