"""Initial values of the projector's last layer, by least squares.

Speech-to-text alignment comes late: at first the LLM cannot use the audio, so the projector gets
no useful gradient. A rough guess shortens that. Assume that a transcribed clip's target tokens are
spoken at an even pace, and ask the last linear layer to map each window onto the embedding of the
token at that place; in clips of the other tasks, whose answers are about the whole clip, map every
window onto the mean embedding of the target. With hidden vectors h (from the random layers below)
and embeddings e,

    W = c (Σ (h − h̄)(h − h̄)ᵀ + r·I)⁻¹ Σ (h − h̄)(e − ē)ᵀ,    b = ē − h̄ W

with r = RIDGE times the mean diagonal of the first sum. A guess that explains part of the variance
alone stays near the mean, and the norm behind the layer would make that all that the LLM sees; so c
gives the guesses the variance of the embeddings. It takes seconds and no gradient step.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

import torch
import torch.distributed

from listen_dist import dist
from listen_dist.errors import ListenError
from listen_dist.models.listen import Listen
from listen_dist.structures import Batch

logger = logging.getLogger(__name__)

RIDGE = 1e-2
SAMPLES = 3000
"""Clips that take part."""


@torch.no_grad()
def fit_last_layer(model: Listen, batches: Iterable[Batch]) -> None:
    """Solve `projector.out` on the first clips of `batches`, which every rank must pass alike.

    Raises:
        ListenError: none of the first batches holds a usable clip.
    """
    projector = model.projector
    width, out = projector.out.in_features, projector.out.out_features
    gram, cross = (torch.zeros(width, n, dtype=torch.float64, device=model.device) for n in (width, out))
    hidden_sum, target_sum = (torch.zeros(n, dtype=torch.float64, device=model.device) for n in (width, out))
    target_square = torch.zeros((), dtype=torch.float64, device=model.device)
    windows = samples = 0
    for batch in itertools.islice(batches, SAMPLES):
        if not len(batch):
            continue
        hidden, target = _pairs(model, batch)
        gram += hidden.T @ hidden
        cross += hidden.T @ target
        hidden_sum += hidden.sum(0)
        target_sum += target.sum(0)
        target_square += target.square().sum()
        windows, samples = windows + len(hidden), samples + len(batch)
        if samples >= SAMPLES:
            break
    if not samples:
        raise ListenError("projector.start = 'least_squares': no usable clip among the first; set it to random")
    hidden_mean, target_mean = hidden_sum / windows, target_sum / windows
    gram -= windows * torch.outer(hidden_mean, hidden_mean)
    cross -= windows * torch.outer(hidden_mean, target_mean)
    ridge = torch.eye(width, dtype=gram.dtype, device=gram.device) * RIDGE * gram.diagonal().mean()
    weight = torch.linalg.solve(gram + ridge, cross)
    variance = target_square - windows * target_mean.square().sum()
    weight *= (variance / (weight * (gram @ weight)).sum()).sqrt()
    projector.out.weight.copy_(weight.T)
    projector.out.bias.copy_(target_mean - hidden_mean @ weight)
    if dist.world_size() > 1:  # the same bits everywhere, even where ranks add in another order
        torch.distributed.broadcast(projector.out.weight.data, src=0)
        torch.distributed.broadcast(projector.out.bias.data, src=0)
    logger.info("projector: last layer solved by least squares on %d windows of %d clips", windows, samples)


def _pairs(model: Listen, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden vectors [windows, hidden] of a batch, and the embedding [windows, D] that each should give."""
    hidden, counts = model.projector.hidden(*model.frames(batch))
    spoken = [torch.tensor(ids[:-1] or ids) for ids in batch.target_ids]  # EOS is not spoken
    # One call: under ZeRO-3 each gathers the whole embedding.
    flat = model.llm.get_input_embeddings()(torch.cat(spoken)[None].to(model.device))[0]
    targets = []
    for task, tokens, count in zip(batch.tasks, flat.split([len(ids) for ids in spoken]), counts.tolist(), strict=True):
        if task == "asr":
            targets.append(tokens[((torch.arange(count) + 0.5) / count * len(tokens)).long()])
        else:
            targets.append(tokens.float().mean(0, keepdim=True).expand(count, -1))
    return (torch.cat([hidden[i, :count] for i, count in enumerate(counts.tolist())]).double(),
            torch.cat([target.double() for target in targets]))
