"""The truth about top-k matching, in plain PyTorch.

For context c [B, T, D], keys K [N, D], values V [N, D] (letters as in `structures`):

    q_b   = mean of c_bt over the positions t that count; 0 where none counts
    unit  u(x) = x / |x|; 0 where |x| <= 1e-12
    s_bn  = u(q_b) . u(K_n)                     cosine, in [-1, 1]
    Z_b   = sum_n exp(s_bn - 1)                 no maximum is needed: s never exceeds 1
    p_bn  = exp(s_bn - 1) / Z_b                 softmax over the pool, temperature 1
    S_b   = the k best n by (s_bn descending, n ascending): ties go to the lower index
    prompts_bj = V_n, score_bj = p_bn           for the j-th n of S_b, unweighted
    m_b   = sum over S_b of p_bn                the row's mass; match_loss = -mean_b m_b

The selection is by similarity rather than by rounded score: the score grows with it, but two
similarities a rounding apart may share one score.

Zero query or key: similarity 0 and gradient 0. A zero-length row is a zero query, so it scores
1/N everywhere and picks 0 ... k-1. A query or key whose squared norm isn't finite (NaN, infinity,
overflow) is unusable: its similarity counts as -inf and it is never chosen. Places that no usable
key can fill hold index -1, score 0 and a prompt of zeros, and pass no gradient.

Gradients. Let G_bj be the gradient that reaches score_bj plus the one that reaches m_b, and
A_b = sum over S_b of G_bj p_bj. Then ds_bn = p_bn (G_bn [n in S_b] - A_b), and with x = u(x)|x|

    dK_n = (sum_b ds_bn u(q_b) - (sum_b ds_bn s_bn) u(K_n)) / |K_n|
    dq_b = (sum_n ds_bn u(K_n) - (sum_n ds_bn s_bn) u(q_b)) / |q_b|
    dc_bt = dq_b / count_b where t counts, else 0
    dV_n = sum of the prompts' gradients over the (b, j) that chose n

so values learn from the prompts alone, keys and context from the scores and the mass alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MIN_NORM_SQUARED = 1e-24
"""At or under it a vector counts as zero (norm 1e-12)."""


class TopkMatch(NamedTuple):
    """What matching gives, best prompt first."""

    prompts: Tensor
    """[B, k, D] chosen values, in the dtype of the values (or a view of the output buffer)."""
    scores: Tensor
    """[B, k] softmax over the whole pool at the chosen keys, fp32."""
    indices: Tensor
    """[B, k] int64; -1 where no usable key was left."""
    match_loss: Tensor
    """Scalar: minus the mean over rows of the mass, fp32."""
    row_mass: Tensor
    """[B] sum of a row's scores, fp32: for callers that average over a larger batch."""


def topk_match_reference(context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int) -> TopkMatch:
    """Match as the module's docstring defines it, in fp32 (fp64 where the keys are fp64).

    context: [B, T, D]; mask: [B, T] bool (true counts), [B] integer lengths, or None (all count);
    keys, values: [N, D]; 1 <= k <= N. Shapes are checked by `op.topk_match`.
    """
    with torch.autocast(context.device.type, enabled=False):
        compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
        query, query_usable = _unit(masked_mean(context.to(compute), mask))
        unit_keys, key_usable = _unit(keys.to(compute))
        usable = query_usable[:, None] & key_usable  # [B, N]
        similarity = (query @ unit_keys.T).masked_fill(~usable, -torch.inf)

        weights = torch.exp(similarity - 1)
        total = weights.sum(-1, keepdim=True)
        probability = weights / torch.where(total > 0, total, 1)

        order = similarity.detach().argsort(dim=-1, descending=True, stable=True)[:, :k]
        chosen = usable.gather(1, order)
        scores = probability.gather(1, order)
        row_mass = scores.sum(-1)
        # Embedding's backward adds in a fixed order, index_put's need not.
        prompts = functional.embedding(order, values).masked_fill(~chosen[..., None], 0)
        indices = order.masked_fill(~chosen, -1)
        return TopkMatch(prompts, scores, indices, -row_mass.mean(), row_mass)


def masked_mean(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [B, D] over the positions that count; what doesn't count may even be NaN."""
    if mask is None:
        return context.mean(1)
    if mask.dim() == 1:
        mask = torch.arange(context.shape[1], device=mask.device) < mask[:, None]
    total = context.masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1).clamp(min=1)[:, None]


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D] scaled to norm 1 (zero rows stay zero), and which [R] are usable."""
    usable = x.detach().square().sum(-1).isfinite()
    x = x.masked_fill(~usable[:, None], 0)
    squared = x.square().sum(-1, keepdim=True)
    nonzero = squared > MIN_NORM_SQUARED
    inverse = torch.where(nonzero, squared, 1).rsqrt().masked_fill(~nonzero, 0)
    return x * inverse, usable
