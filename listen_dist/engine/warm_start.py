"""Initial values of the projector's last layer, by least squares.

Speech-to-text alignment comes late: at first the LLM cannot use the audio, so the projector gets
no useful gradient. A rough guess shortens that. Assume that a clip's target tokens are spoken at an
even pace, and ask the last linear layer to map each window onto the embedding of the token at
that place. With hidden vectors h (from the random layers below) and embeddings e,

    W = (Σ (h − h̄)(h − h̄)ᵀ + r·I)⁻¹ Σ (h − h̄)(e − ē)ᵀ,    b = ē − h̄ W

with r = RIDGE times the mean diagonal of the first sum. It takes seconds and no gradient step.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

import torch
import torch.distributed

from listen_dist import dist
from listen_dist.models.listen import Listen
from listen_dist.structures import Batch

logger = logging.getLogger(__name__)

RIDGE = 1e-2
SAMPLES = 2000
"""Transcribed clips (task `asr`) that take part: there alone the target is what is spoken."""


@torch.no_grad()
def fit_last_layer(model: Listen, batches: Iterable[Batch]) -> None:
    """Solve `projector.out` on the first transcribed clips of `batches`.

    Every rank must pass the same batches.

    Raises:
        ValueError: no transcribed clip among the first ones.
    """
    projector = model.projector
    width, out = projector.out.in_features, projector.out.out_features
    gram, cross = (torch.zeros(width, n, dtype=torch.float64, device=model.device) for n in (width, out))
    hidden_sum, target_sum = (torch.zeros(n, dtype=torch.float64, device=model.device) for n in (width, out))
    windows = samples = 0
    for batch in itertools.islice(batches, SAMPLES):
        spoken = [i for i, task in enumerate(batch.tasks) if task == "asr"]
        if not spoken:
            continue
        hidden, target = _pairs(model, batch, spoken)
        gram += hidden.T @ hidden
        cross += hidden.T @ target
        hidden_sum += hidden.sum(0)
        target_sum += target.sum(0)
        windows, samples = windows + len(hidden), samples + len(spoken)
        if samples >= SAMPLES:
            break
    if not samples:
        raise ValueError("projector.start = 'least_squares' needs clips of task asr in data.train; set it to random")
    hidden_mean, target_mean = hidden_sum / windows, target_sum / windows
    gram -= windows * torch.outer(hidden_mean, hidden_mean)
    cross -= windows * torch.outer(hidden_mean, target_mean)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, cross)
    projector.out.weight.copy_(weight.T)
    projector.out.bias.copy_(target_mean - hidden_mean @ weight)
    if dist.world_size() > 1:  # the same bits everywhere, even where ranks add in another order
        torch.distributed.broadcast(projector.out.weight.data, src=0)
        torch.distributed.broadcast(projector.out.bias.data, src=0)
    logger.info("projector: last layer solved by least squares on %d windows of %d clips", windows, samples)


def _pairs(model: Listen, batch: Batch, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden vectors [windows, hidden] of some rows, and the embedding [windows, D] of the token at each place."""
    hidden, counts = model.projector.hidden(*model.frames(batch))
    tokens = []
    for i in rows:
        ids, count = torch.tensor(batch.target_ids[i][:-1] or batch.target_ids[i]), int(counts[i])  # EOS is not spoken
        tokens.append(ids[((torch.arange(count) + 0.5) / count * len(ids)).long()])
    target = model.llm.get_input_embeddings()(torch.cat(tokens)[None].to(model.device))[0]
    return torch.cat([hidden[i, : counts[i]] for i in rows]).double(), target.double()
