"""The kernels against the reference: values, choice and every gradient, at odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparing import Case, assert_agrees, close, make_case, run, same_choice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from listen_dist.kernels.topk_match import plan
from listen_dist.kernels.topk_match.op import topk_match

MASKS = ("mask", "lengths", "none")

# (B, T, D, N, k): each value the kernels branch on, in company of others; the expensive ones once.
FUSED = [
    (1, 1, 1, 1, 1), (1, 63, 48, 50, 5), (3, 1, 576, 63, 63), (3, 63, 4096, 50, 5), (3, 63, 1, 50, 1),
    (17, 63, 48, 50, 50), (17, 1, 1, 63, 5), (17, 63, 144, 63, 1), (3, 63, 4096, 1, 1), (3, 2, 48, 128, 100),
]  # fmt: skip
TILES = [
    (1, 63, 48, 1000, 5), (2, 1, 48, 200, 20), (3, 1, 48, 1000, 1000), (1, 1, 48, 5000, 5000), (3, 63, 1, 5000, 1),
    (5, 7, 48, 300, 5), (17, 63, 48, 1000, 5), (9, 1, 16, 2100, 70), (40, 3, 48, 200, 3), (70, 3, 48, 100, 7),
    (66, 2, 192, 63, 5),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(FUSED + TILES)), ids=lambda i: "x".join(map(str, (FUSED + TILES)[i])))
def test_sizes(place: int, device: str) -> None:
    shape = (FUSED + TILES)[place]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[place % 3]
    assert plan.forward_plan(shape[0], *shape[3:1:-1], shape[4]).fused == (place < len(FUSED))
    assert_agrees(make_case(*shape, masked=MASKS[place // 2 % 3], dtype=dtype, seed=place, device=device))


@pytest.mark.parametrize("shape", [(1, 1, 4096, 5000, 5), (17, 1, 48, 5000, 70)])
def test_large_pools_forward(shape: tuple[int, ...], device: str) -> None:
    """The largest pools; their backward, alike at every size, is minutes of interpreting."""
    case = make_case(*shape, device=device)
    match = topk_match(case.context, case.mask, case.keys, case.values, case.k, backend="triton")
    truth, _ = run(case, "reference", torch.float64)
    close(match.scores, truth.scores, 2e-6)
    close(match.row_mass, truth.row_mass, 2e-6)
    same_choice(case, match, truth)
    assert torch.equal(match.prompts, case.values[match.indices])


@given(
    rows=st.integers(1, 19), length=st.integers(1, 70), width=st.integers(1, 140), pool=st.integers(1, 270),
    share=st.floats(0, 1), masked=st.sampled_from(MASKS), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(
    rows: int, length: int, width: int, pool: int, share: float, masked: str, seed: int, dtype: torch.dtype, device: str
) -> None:
    k = max(1, round(share * pool))
    assert_agrees(make_case(rows, length, width, pool, k, masked=masked, seed=seed, dtype=dtype, device=device))


def test_largest_tile(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The tile of very large batches, on a small one: it takes more rows than an interpreter can."""
    from listen_dist.kernels.topk_match import triton as kernels

    largest = plan.forward_plan(4096, 65536, 4096, 20)
    assert largest.row_block == 128
    monkeypatch.setattr(kernels, "forward_plan", lambda *shape: replace(largest, chunk=256, chunks=1, best=16))
    assert_agrees(make_case(129, 1, 20, 130, 2, device=device))


@pytest.mark.parametrize("shape", [(3, 5, 48, 50, 5), (3, 5, 20, 140, 5), (9, 5, 20, 140, 5)])
def test_strided_inputs(shape: tuple[int, ...], device: str) -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    case = make_case(*shape, device=device)
    rows, length, width, pool, _ = shape
    strided = Case(
        context=case.context.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        mask=torch.stack([case.mask, ~case.mask], 2)[..., 0],
        keys=case.keys.T.contiguous().T,
        values=torch.cat([case.values, case.values], 1)[:, :width],
        k=case.k,
        prompt_weights=case.prompt_weights, score_weights=case.score_weights, mass_weights=case.mass_weights,
    )  # fmt: skip
    assert not strided.context.is_contiguous() and not strided.mask.is_contiguous()
    assert not strided.keys.is_contiguous() and not strided.values.is_contiguous()
    match, gradients = run(strided, "triton")
    plain, plain_gradients = run(case, "triton")
    assert all(torch.equal(x, y) for x, y in zip(match, plain, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(gradients, plain_gradients, strict=True))
    assert_agrees(strided)
    expanded = replace(case, context=case.context[:, :1].expand(-1, length, -1), mask=None)
    assert_agrees(expanded)


@pytest.mark.parametrize("shape", [(3, 5, 20, 50, 5), (3, 5, 20, 140, 5), (9, 5, 20, 140, 5)])
@pytest.mark.parametrize("output", ["prompts", "scores", "match_loss", "row_mass"])
def test_each_output_alone(shape: tuple[int, ...], output: str, device: str) -> None:
    """Gradients of one output, the others unused, for each subset of inputs that wants one."""
    case = make_case(*shape, device=device)
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        found = [_gradients(case, backend, output, wanted) for backend in ("triton", "reference")]
        for x, y in zip(*found, strict=True):
            assert (x is None or not x.any()) == (y is None or not y.any())
            if x is not None and y is not None:
                close(x, y, 1e-4)


def _gradients(case: Case, backend: str, output: str, wanted: tuple[bool, ...]) -> list[torch.Tensor | None]:
    leaves = [
        x.detach().requires_grad_(want) for x, want in zip((case.context, case.keys, case.values), wanted, strict=True)
    ]
    match = topk_match(leaves[0], case.mask, leaves[1], leaves[2], case.k, backend=backend)
    result = getattr(match, output)
    if result.requires_grad:
        result.square().sum().backward()
    return [x.grad for x in leaves]
