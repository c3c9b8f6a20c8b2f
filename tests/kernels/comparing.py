"""What the kernel tests share: inputs, one run forward and backward, and when two runs agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from listen_dist.kernels.topk_match.op import Backend, TopkMatch, topk_match


@dataclass
class Case:
    """Inputs of one match, and weights that turn its results into one scalar."""

    context: Tensor
    mask: Tensor | None
    keys: Tensor
    values: Tensor
    k: int
    prompt_weights: Tensor  # [N, D]: by key, so that the order of near ties doesn't matter
    score_weights: Tensor  # [N]
    mass_weights: Tensor  # [B]


def make_case(
    rows: int, length: int, width: int, pool: int, k: int, *,
    masked: str = "mask", dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu",
) -> Case:  # fmt: skip
    """Random inputs; masked: "mask" (bool), "lengths" or "none". Row 0 of several counts nowhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = None
    if masked == "mask":
        mask = torch.rand(rows, length, generator=generator) > 0.3
    elif masked == "lengths":
        mask = torch.randint(1, length + 1, (rows,), generator=generator)
    if mask is not None and rows > 1:
        mask[0] = 0
    tensors = (
        normal(rows, length, width).to(dtype), mask, normal(pool, width), normal(pool, width),
        normal(pool, width), normal(pool), normal(rows),
    )  # fmt: skip
    context, mask, keys, values, *weights = (x if x is None else x.to(device) for x in tensors)
    return Case(context, mask, keys, values, k, *weights)


def run(case: Case, backend: Backend, compute: torch.dtype = torch.float32) -> tuple[TopkMatch, list[Tensor]]:
    """Match and differentiate: the results, and the gradients of context, keys and values.

    compute: fp64 runs the reference on the same numbers in double precision.
    """
    if compute == torch.float64:
        leaves = [x.detach().double().requires_grad_() for x in (case.context, case.keys, case.values)]
    else:
        leaves = [x.detach().requires_grad_() for x in (case.context, case.keys, case.values)]
    context, keys, values = leaves
    match = topk_match(context, case.mask, keys, values, case.k, backend=backend)
    gradients = torch.autograd.grad(scalar(case, match), leaves)
    return TopkMatch(*(x.detach() for x in match)), list(gradients)


def scalar(case: Case, match: TopkMatch) -> Tensor:
    """One number that every result has a part in."""
    chosen = match.indices.clamp(min=0)
    total = (match.prompts * case.prompt_weights[chosen]).sum() + (match.scores * case.score_weights[chosen]).sum()
    return total + 3 * match.match_loss + (match.row_mass * case.mass_weights).sum()


def gradients_of_choice(case: Case, indices: Tensor) -> list[Tensor]:
    """The true gradients in fp64 had these keys been chosen: for choices that differ by near ties."""
    leaves = [x.detach().double().requires_grad_() for x in (case.context, case.keys, case.values)]
    context, keys, values = leaves
    everything = topk_match(context, case.mask, keys, values, len(keys), backend="reference")
    place = everything.indices.argsort(dim=1).gather(1, indices)
    scores = everything.scores.gather(1, place)
    mass = scores.sum(1)
    match = TopkMatch(values[indices], scores, indices, -mass.mean(), mass)
    return list(torch.autograd.grad(scalar(case, match), leaves))


def assert_agrees(case: Case, backend: Backend = "triton") -> None:
    """Values, choice and every gradient against the reference in fp64."""
    match, gradients = run(case, backend)
    truth, true_gradients = run(case, "reference", torch.float64)
    close(match.scores, truth.scores, 2e-6)
    close(match.row_mass, truth.row_mass, 2e-6)
    close(match.match_loss, truth.match_loss, 2e-6)
    if not same_choice(case, match, truth):
        true_gradients = gradients_of_choice(case, match.indices)
    assert torch.equal(match.prompts, case.values[match.indices])
    half = case.context.dtype != torch.float32
    for name, gradient, true, tolerance in zip(
        ("context", "keys", "values"), gradients, true_gradients, (1e-2 if half else 1e-4, 1e-4, 1e-5), strict=True
    ):
        assert gradient.shape == true.shape, name
        # In one dimension the cosine is flat: what is left of the gradient is rounding, over the norm.
        floor = 0.1 if case.keys.shape[1] == 1 and name != "values" else 0.0
        close(gradient, true, tolerance, name, floor)


def close(x: Tensor, y: Tensor, tolerance: float, name: str = "", floor: float = 0.0) -> None:
    """Equal within the tolerance times the largest magnitude (or the floor), and finite."""
    assert x.isfinite().all(), name
    scale = max(y.abs().max().item(), floor)
    assert (x.double() - y.double()).abs().max().item() <= tolerance * scale + 1e-12, name


def same_choice(case: Case, match: TopkMatch, truth: TopkMatch) -> bool:
    """Whether the indices are the same; asserts that those that differ are a rounding of fp32 apart."""
    assert all(row.unique().numel() == row.numel() for row in match.indices), "a key was chosen twice"
    differ = match.indices != truth.indices
    if not differ.any():
        return True
    everything = topk_match(
        case.context.double(), case.mask, case.keys.double(), case.values.double(), len(case.keys), backend="reference"
    )
    score = torch.empty_like(everything.scores).scatter_(1, everything.indices, everything.scores)
    apart = (score.gather(1, match.indices) - truth.scores)[differ].abs().max() * len(case.keys)
    assert apart.item() < 1e-5, "other keys were chosen than the best"
    return False
