"""What is defined at the edges: ties, zeros, NaN, empty rows; and that the bits never vary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparing import assert_agrees, make_case, run

from listen_dist.kernels.topk_match import plan, triton_backward
from listen_dist.kernels.topk_match import triton as kernels
from listen_dist.kernels.topk_match.op import Backend, TopkMatch, topk_match, topk_match_query

BACKENDS: tuple[Backend, ...] = ("reference", "triton")
# (B, N) on each way through the kernels. "split" is given chunks of 64 keys, so that the merge has
# three lists to merge without thousands of keys to interpret.
WAYS = {"fused": (3, 50), "vector": (3, 140), "split": (2, 150), "matrix": (9, 140)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=WAYS)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    if request.param == "split":
        monkeypatch.setattr(kernels, "forward_plan", in_chunks_of_64)
    return WAYS[request.param]


def in_chunks_of_64(rows: int, pool: int, width: int, k: int) -> plan.ForwardPlan:
    best = 16 if k <= 16 else 64
    return replace(plan.forward_plan(rows, pool, width, k), chunk=64, chunks=-(-pool // 64), best=best)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Entries from -1, 0, 1: sums and products are exact in any order."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_all_keys_tie(backend: Backend, size: tuple[int, int], device: str) -> None:
    rows, pool = size
    keys = whole_numbers(1, 16).expand(pool, -1).to(device)
    context = whole_numbers(rows, 2, 16, seed=1).to(device)
    for k in (1, 5, pool):
        match = topk_match(context, None, keys, keys, k, backend=backend)
        assert match.indices.tolist() == [list(range(k))] * rows
        torch.testing.assert_close(match.row_mass, torch.full((rows,), k / pool, device=device))


def test_ties_within_the_order(backend: Backend, size: tuple[int, int], device: str) -> None:
    """Four levels of exact similarity, shuffled over the pool, across chunks: each level by index."""
    rows, pool = size
    level = torch.randint(0, 4, (pool,), generator=torch.Generator().manual_seed(2))
    axes = torch.tensor([[2.0, 0, 0, 0], [0, -0.0, 0, 2], [-2, 0, 0, 0], [1, 1, 1, 1]])  # cosines 1, 0, -1, 1/2
    keys = axes[level].to(device)
    context = torch.tensor([4.0, 0, 0, 0], device=device).expand(rows, 3, 4)
    k = min(pool, 100)
    expected = torch.cat([(level == which).nonzero().flatten() for which in (0, 3, 1, 2)])[:k]
    match = topk_match(context, None, keys, keys, k, backend=backend)
    assert match.indices.tolist() == [expected.tolist()] * rows


def test_negative_zero_ties_with_zero(backend: Backend, device: str) -> None:
    """-0.0 equals 0.0, though its bits sort behind."""
    keys = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-0.0, -1.0]], device=device)
    query = torch.tensor([[-0.0, 0.0], [1.0, 0.0], [-1.0, -0.0]], device=device)
    match = topk_match_query(query, keys, keys, 3, backend=backend)
    assert match.indices.tolist() == [[0, 1, 2]] * 3
    # Cosines of -1e-48 and 1e-48: they round to zeros of either sign.
    match = topk_match_query(torch.tensor([[1e18, 1e-30]], device=device), keys, keys, 3, backend=backend)
    assert match.indices.tolist() == [[0, 1, 2]]


def test_rows_that_count_nowhere(backend: Backend, size: tuple[int, int], device: str) -> None:
    """A zero query: every score 1/N, the first k chosen, no gradient for what had no direction."""
    rows, pool = size
    context = whole_numbers(rows, 5, 16).to(device).requires_grad_()
    keys, values = torch.randn(2, pool, 16, device=device).unbind()
    keys.requires_grad_()
    nowhere = torch.zeros(rows, 5, dtype=torch.bool, device=device)
    for mask in (nowhere, nowhere.sum(1)):
        match = topk_match(context, mask, keys, values, 4, backend=backend)
        assert match.indices.tolist() == [[0, 1, 2, 3]] * rows
        torch.testing.assert_close(match.scores, torch.full((rows, 4), 1 / pool, device=device))
        for gradient in torch.autograd.grad(match.scores.square().sum(), [context, keys]):
            assert gradient.eq(0).all()


def test_what_is_masked_may_be_nan(backend: Backend, size: tuple[int, int], device: str) -> None:
    case = make_case(size[0], 4, 12, size[1], 3, masked="mask", device=device)
    clean, clean_gradients = run(case, backend)
    case.context = case.context.masked_fill(~case.mask[..., None], torch.nan)
    match, gradients = run(case, backend)
    assert all(torch.equal(x, y) for x, y in zip([*match, *gradients], [*clean, *clean_gradients], strict=True))


def test_zero_keys(backend: Backend, size: tuple[int, int], device: str) -> None:
    """A zero key has cosine 0 and gradient 0."""
    rows, pool = size
    keys = torch.randn(pool, 8, generator=torch.Generator().manual_seed(0)).to(device)
    keys[::3] = 0
    keys.requires_grad_()
    context = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1)).to(device)
    match = topk_match(context, None, keys, keys.detach(), pool, backend=backend)
    of_zeros = match.scores[match.indices % 3 == 0].view(rows, -1)
    assert torch.equal(of_zeros, of_zeros[:, :1].expand_as(of_zeros))
    (gradient,) = torch.autograd.grad((match.scores * torch.rand_like(match.scores)).sum(), keys)
    assert gradient[::3].eq(0).all() and gradient[1::3].ne(0).any()


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 1e30])
def test_unusable_keys_are_never_chosen(poison: float, backend: Backend, size: tuple[int, int], device: str) -> None:
    rows, pool = size
    case = make_case(rows, 3, 8, pool, 40, device=device)
    case.keys[::4, 2] = poison
    match, gradients = run(case, backend)
    assert (match.indices % 4 != 0).logical_or(match.indices < 0).all()
    usable = pool - len(range(0, pool, 4))
    assert ((match.indices >= 0).sum(1) == min(40, usable)).all()
    assert all(x.isfinite().all() for x in (*match, *gradients))
    kept = [n for n in range(pool) if n % 4]
    without = topk_match(case.context, case.mask, case.keys[kept], case.values[kept], min(40, usable), backend=backend)
    torch.testing.assert_close(match.scores[:, :usable], without.scores)
    assert gradients[1][::4].eq(0).all()


def test_too_few_usable_keys(backend: Backend, size: tuple[int, int], device: str) -> None:
    """Places left over: index -1, score 0, a prompt of zeros, no gradient."""
    rows, pool = size
    case = make_case(rows, 3, 8, pool, 5, device=device)
    case.keys[2:] = torch.nan
    match, gradients = run(case, backend)
    assert (match.indices.sort(descending=True).values == torch.tensor([1, 0, -1, -1, -1], device=device)).all()
    assert match.scores[:, 2:].eq(0).all() and match.prompts[:, 2:].eq(0).all()
    torch.testing.assert_close(match.row_mass, torch.ones(rows, device=device))
    assert gradients[2][2:].eq(0).all() and gradients[2][:2].ne(0).any()


def test_nan_in_one_row_stays_there(backend: Backend, size: tuple[int, int], device: str) -> None:
    rows, pool = size
    case = make_case(rows, 3, 8, pool, 5, masked="none", device=device)
    clean, clean_gradients = run(case, backend)
    case.context[1, 2, 3] = torch.nan
    match, gradients = run(case, backend)
    assert match.indices[1].eq(-1).all() and match.prompts[1].eq(0).all() and match.row_mass[1] == 0
    assert gradients[0][1].eq(0).all() and all(x.isfinite().all() for x in gradients)
    others = torch.arange(rows) != 1
    for name in ("prompts", "scores", "indices", "row_mass"):
        assert torch.equal(getattr(match, name)[others], getattr(clean, name)[others])
    assert torch.equal(gradients[0][others], clean_gradients[0][others])


def test_debug_names_unusable_rows(backend: Backend, device: str) -> None:
    case = make_case(3, 4, 8, 20, 2, masked="mask", device=device)

    def match(debug: bool) -> TopkMatch:
        return topk_match(case.context, case.mask, case.keys, case.values, 2, backend=backend, debug=debug)

    match(debug=True)
    case.context[~case.mask] = torch.nan
    match(debug=True)
    case.context[2, case.mask[2].nonzero()[0]] = torch.nan
    match(debug=False)
    with pytest.raises(ValueError, match=r"context row \[2\]"):
        match(debug=True)
    case.context.zero_()
    case.keys[7, 1] = torch.inf
    with pytest.raises(ValueError, match=r"key \[7\]"):
        match(debug=True)


@pytest.mark.parametrize("way", WAYS)
def test_fifty_repeats_give_the_same_bits(way: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Every way through the kernels, on one small shape, since an interpreter takes its time."""
    rows, pool = WAYS[way]
    forward = replace(in_chunks_of_64(rows, pool, 8, 4), chunk=16, best=16, chunks=3)
    if way != "split":
        forward = replace(plan.forward_plan(rows, pool, 8, 4), chunk=64, chunks=1)
    backward = plan.backward_plan(rows)
    monkeypatch.setattr(kernels, "forward_plan", lambda *shape: forward)
    monkeypatch.setattr(triton_backward, "backward_plan", lambda *shape: backward)
    case = make_case(2, 2, 8, 40, 4, device=device)
    assert_agrees(case)
    first, first_gradients = run(case, "triton")
    for _ in range(49):
        match, gradients = run(case, "triton")
        assert all(torch.equal(x, y) for x, y in zip([*match, *gradients], [*first, *first_gradients], strict=True))


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    """Alone, and among others on the same way through the kernels, a row gets the same bits."""
    for pool in (50, 140):
        case = make_case(4, 5, 24, pool, 5, device=device)
        together = topk_match(case.context, case.mask, case.keys, case.values, 5, backend="triton")
        padded = torch.cat([case.context, torch.full_like(case.context, torch.nan)], 1)
        mask = torch.cat([case.mask, torch.zeros_like(case.mask)], 1)
        apart = topk_match(padded, mask, case.keys, case.values, 5, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(together, apart, strict=True))
        for b in range(4):
            row = slice(b, b + 1)
            alone = topk_match(case.context[row], case.mask[row], case.keys, case.values, 5, backend="triton")
            assert torch.equal(alone.indices[0], together.indices[b])
            torch.testing.assert_close(alone.scores[0], together.scores[b], atol=0, rtol=1e-6)
