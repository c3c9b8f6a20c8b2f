"""The losses as sums over rows and tokens; the caller divides by the global batch's counts."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED = -100
"""Label of a position that the loss skips."""


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over each row's target tokens.

    Args:
        logits: [B, P, V], the position at p predicting labels[:, p].
        labels: int64 [B, P], IGNORED where there is no target.

    Returns:
        float32 [B].
    """
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED,
                                      reduction="none")
    return losses.view(labels.shape).sum(1)
