"""The op as callers meet it: opcheck, compile, checkpoint, autocast, the output buffer, errors."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from comparing import Case, close, make_case, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from listen_dist.kernels.topk_match import op, plan, triton, triton_backward
from listen_dist.kernels.topk_match.op import Backend, topk_match, topk_match_query
from listen_dist.kernels.topk_match.reference import topk_match_reference

BACKENDS: tuple[Backend, ...] = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture
def case(device: str) -> Case:
    return make_case(3, 4, 20, 30, 5, device=device)


def test_gradcheck_of_the_reference() -> None:
    """The reference's gradients against finite differences in fp64, zero rows and k = N included."""
    for pool, k, masked in ((9, 4, "mask"), (9, 9, "lengths"), (1, 1, "none")):
        case = make_case(3, 4, 6, pool, k, masked=masked)
        leaves = [x.double().requires_grad_() for x in (case.context, case.keys, case.values)]

        def results(context: Tensor, keys: Tensor, values: Tensor, case: Case = case) -> tuple[Tensor, ...]:
            match = topk_match_reference(context, case.mask, keys, values, case.k)
            return match.prompts, match.scores, match.match_loss, match.row_mass

        assert torch.autograd.gradcheck(results, leaves)


def test_reference_follows_the_formulas(case: Case) -> None:
    """Against a loop over rows in plain numbers."""
    match = topk_match(case.context, case.mask, case.keys, case.values, 5, backend="reference")
    for b in range(1, 3):
        query = case.context[b][case.mask[b]].mean(0)
        cosine = torch.nn.functional.cosine_similarity(query[None], case.keys)
        scores = cosine.softmax(0)
        best = sorted(range(30), key=lambda n: (-cosine[n].item(), n))[:5]
        assert match.indices[b].tolist() == best
        torch.testing.assert_close(match.scores[b], scores[best])
        torch.testing.assert_close(match.row_mass[b], scores[best].sum())
        assert torch.equal(match.prompts[b], case.values[best])
    torch.testing.assert_close(match.match_loss, -match.row_mass.mean())


@pytest.mark.parametrize("masked", ["mask", "lengths", "none"])
@pytest.mark.parametrize("pool", [30, 140])
def test_opcheck(pool: int, masked: str, device: str) -> None:
    case = make_case(3, 4, 20, pool, 5, masked=masked, device=device)
    leaves = [x.requires_grad_() for x in (case.context, case.keys, case.values)]
    ops = torch.ops.listen_dist
    torch.library.opcheck(ops.topk_match, (leaves[0], case.mask, leaves[1], leaves[2], 5))
    if masked != "mask":
        return
    context, keys, values = (x.detach() for x in leaves)
    out = torch.zeros(3, 8, 20, device=device)
    torch.library.opcheck(ops.topk_match_into, (context, case.mask, keys, values, 5, out))
    results = ops.topk_match(context, case.mask, keys, values, 5)
    saved = (case.mask, keys, results[1], results[2], *results[5:], 4, torch.bfloat16)
    prompts = torch.randn_like(results[0])
    torch.library.opcheck(ops.topk_match_backward, (prompts, None, None, results[4], *saved, [True, True, True]))
    torch.library.opcheck(ops.topk_match_backward, (prompts, None, None, None, *saved, [False, False, True]))
    torch.library.opcheck(ops.topk_match_backward, (None, results[1], results[3], None, *saved, [True, False, False]))


def test_not_twice_differentiable(case: Case) -> None:
    keys = case.keys.requires_grad_()
    match = topk_match(case.context, case.mask, keys, case.values, 5, backend="triton")
    (gradient,) = torch.autograd.grad(match.row_mass.sum(), keys, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


def loss(context: Tensor, mask: Tensor, keys: Tensor, values: Tensor, backend: Backend, k: int = 5) -> Tensor:
    match = topk_match(context * 2, mask, keys, values, k, backend=backend)
    return match.prompts.square().sum() + match.match_loss


def gradients(function: Callable[..., Tensor], case: Case, *args: object) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (case.context, case.keys, case.values)]
    function(leaves[0], case.mask, leaves[1], leaves[2], *args).backward()
    return [x.grad for x in leaves]


def test_compile(backend: Backend, case: Case) -> None:
    """One graph, without a break; another k or batch size goes through as well."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for k, rows in ((5, 3), (3, 3), (4, 2), (6, 2)):
        part = Case(case.context[:rows], case.mask[:rows], *list(vars(case).values())[2:])
        for x, y in zip(gradients(compiled, part, backend, k), gradients(loss, part, backend, k), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here; test_aot.py shows what a graph asks")
@pytest.mark.parametrize("pool", [50, 140, 5000])
def test_cuda_graph(pool: int) -> None:
    """Captured once, forward and backward; replayed on other numbers it gives what a call gives."""
    case, other = (make_case(3, 4, 20, pool, 5, seed=seed, device="cuda") for seed in (0, 1))
    leaves = [x.requires_grad_() for x in (case.context, case.keys, case.values)]

    def both() -> tuple[Tensor, ...]:
        match = topk_match(leaves[0], case.mask, leaves[1], leaves[2], 5, backend="triton")
        return *match, *torch.autograd.grad(match.prompts.square().sum() + match.match_loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for leaf, x in zip(leaves, (other.context, other.keys, other.values), strict=True):
            leaf.copy_(x)
        case.mask.copy_(other.mask)
    graph.replay()
    found = [x.clone() for x in captured]
    assert all(torch.equal(x, y) for x, y in zip(found, both(), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend: Backend, reentrant: bool, case: Case) -> None:
    def checkpointed(*args: object) -> Tensor:
        return checkpoint(loss, *args, use_reentrant=reentrant)

    for x, y in zip(gradients(checkpointed, case, backend), gradients(loss, case, backend), strict=True):
        assert torch.equal(x, y)


def test_autocast_changes_nothing(backend: Backend, case: Case, device: str) -> None:
    def under_autocast(*args: object) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            match = topk_match(*args, 5, backend=backend)
        assert match.scores.dtype == match.prompts.dtype == match.match_loss.dtype == torch.float32
        return match.prompts.square().sum() + match.scores.square().sum()

    def plain(*args: object) -> Tensor:
        match = topk_match(*args, 5, backend=backend)
        return match.prompts.square().sum() + match.scores.square().sum()

    for x, y in zip(gradients(under_autocast, case), gradients(plain, case), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [30, 140])
def test_output_buffer(backend: Backend, pool: int, dtype: torch.dtype, device: str) -> None:
    """The first k rows are written, the rest stay; gradients come as from a concatenation."""
    case = make_case(3, 4, 20, pool, 5, dtype=dtype, device=device)
    rest = torch.randn(3, 9, 20, device=device).to(dtype)
    weights = torch.randn(3, 9, 20, device=device)

    def assembled(in_place: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in (case.context, case.keys, case.values, rest)]
        buffer = leaves[3] * 1
        out = buffer if in_place else None
        match = topk_match(leaves[0], case.mask, leaves[1], leaves[2], 5, backend=backend, out=out)
        if in_place:
            assert match.prompts.data_ptr() == buffer.data_ptr() and match.prompts.shape == (3, 5, 20)
        else:
            buffer = torch.cat([match.prompts.to(dtype), buffer[:, 5:]], 1)
        total = (buffer * weights).sum() + match.match_loss
        return buffer.detach(), list(torch.autograd.grad(total, leaves))

    written, found = assembled(in_place=True)
    expected, expected_gradients = assembled(in_place=False)
    # The interpreter cuts bits off where a GPU rounds to nearest.
    cut = backend == "triton" and dtype == torch.bfloat16 and device == "cpu"
    torch.testing.assert_close(written[:, :5], expected[:, :5], atol=0, rtol=2**-7 if cut else 0)
    assert torch.equal(written[:, 5:], rest[:, 5:])
    assert all(torch.equal(x, y) for x, y in zip(found[1:], expected_gradients[1:], strict=True))
    assert found[3][:, :5].eq(0).all()


def test_output_buffer_compiled(backend: Backend, case: Case) -> None:
    def into(context: Tensor, mask: Tensor, keys: Tensor, values: Tensor, rest: Tensor) -> Tensor:
        buffer = rest * 1
        match = topk_match(context, mask, keys, values, 5, backend=backend, out=buffer)
        return buffer.square().sum() + match.match_loss

    torch._dynamo.reset()
    rest = torch.randn(3, 9, 20, device=case.keys.device, requires_grad=True)
    compiled = gradients(torch.compile(into, fullgraph=True, backend="aot_eager"), case, rest)
    (of_rest,) = torch.autograd.grad(into(case.context, case.mask, case.keys, case.values, rest), rest)
    assert of_rest[:, :5].eq(0).all() and of_rest[:, 5:].ne(0).all()
    assert all(torch.equal(x, y) for x, y in zip(compiled, gradients(into, case, rest), strict=True))


def test_output_buffer_without_gradients(case: Case) -> None:
    buffer = torch.full((3, 6, 20), 7.0, device=case.keys.device)
    with torch.inference_mode():
        match = topk_match(case.context, case.mask, case.keys, case.values, 5, backend="triton", out=buffer)
    assert torch.equal(buffer[:, :5], case.values[match.indices]) and buffer[:, 5:].eq(7).all()


def test_from_a_query(backend: Backend, case: Case) -> None:
    query = case.context[:, 0].requires_grad_()
    match = topk_match_query(query, case.keys, case.values, 5, backend=backend)
    as_context = topk_match(query[:, None], None, case.keys, case.values, 5, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(match, as_context, strict=True))
    (gradient,) = torch.autograd.grad(match.row_mass.sum(), query)
    exact = topk_match_query(query.double(), case.keys.double(), case.values.double(), 5, backend="reference")
    (truth,) = torch.autograd.grad(exact.row_mass.sum(), query)
    close(gradient, truth, 1e-4)
    with pytest.raises(ValueError, match="query must be"):
        topk_match_query(case.context, case.keys, case.values, 5)


def test_a_training_run_gives_the_same_curve(device: str) -> None:
    """Thirty steps of a pool on both backends: the same prompts picked, the same losses."""
    curves, picked = {}, {}
    for backend in BACKENDS:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randn(4, 16, generator=generator).to(device)
        contexts = torch.randn(4, 5, 16, generator=generator).to(device)
        keys, values = (torch.nn.Parameter(torch.randn(30, 16, generator=generator).to(device)) for _ in range(2))
        optimizer = torch.optim.Adam([keys, values], lr=0.05)
        curves[backend], picked[backend] = [], []
        for step in range(30):
            match = topk_match(contexts, None, keys, values, 1 + step % 6, backend=backend)
            total = (match.prompts.mean(1) - targets).square().mean() + match.match_loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            curves[backend].append(total.item())
            picked[backend].append(match.indices.tolist())
    assert picked["triton"] == picked["reference"]
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=1e-5, atol=1e-6)
    assert curves["triton"][-1] < curves["triton"][0] - 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be"), ({"k": 31}, "k must be"), ({"keys": torch.zeros(30, 19)}, "must both be"),
        ({"values": torch.zeros(29, 20)}, "must both be"), ({"context": torch.zeros(3, 20)}, "context must be"),
        ({"context": torch.zeros(3, 0, 20)}, "no empty dimension"),
        ({"mask": torch.zeros(3, 5).bool()}, "mask must be"),
        ({"mask": torch.zeros(3, 4)}, "mask must be"), ({"mask": torch.zeros(3)}, "mask must be"),
        ({"out": torch.zeros(3, 4, 20)}, "out must be"), ({"backend": "cuda"}, "backend must be"),
        ({"keys": torch.zeros(30, 20, device="meta")}, "one device"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, object], message: str) -> None:
    case = make_case(3, 4, 20, 30, 5)
    arguments = {"context": case.context, "mask": case.mask, "keys": case.keys, "values": case.values, "k": 5}
    with pytest.raises(ValueError, match=message):
        topk_match(**(arguments | change))


def test_kernels_refuse_other_dtypes(case: Case) -> None:
    with pytest.raises(ValueError, match="pool of fp32"):
        topk_match(case.context, case.mask, case.keys.bfloat16(), case.values, 5, backend="triton")
    with pytest.raises(ValueError, match="context of fp32"):
        topk_match(case.context.double(), case.mask, case.keys, case.values, 5, backend="triton")


def test_reference_refuses_rounded_products(case: Case) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="may change which prompts"):
            topk_match(case.context, case.mask, case.keys, case.values, 5, backend="reference")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_auto_says_once_what_it_took(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    op._say_once.cache_clear()
    monkeypatch.setattr(op, "_fault", lambda _: "")  # no GPU is here to check the kernels on
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO, logger=op.logger.name):
        assert [op.choose_backend("auto", cpu) for _ in range(3)] == ["reference"] * 3
        assert op.choose_backend("auto", torch.device("cuda")) == "triton"
    assert [record.message for record in caplog.records] == [
        "topk_match: backend auto took reference: tensors are on cpu",
        "topk_match: backend auto took triton: tensors are on cuda",
    ]
    monkeypatch.setattr(op, "HAS_TRITON", False)
    assert op.choose_backend("auto", torch.device("cuda")) == "reference"
    with pytest.raises(RuntimeError, match="triton is not installed"):
        op.choose_backend("triton", torch.device("cuda"))


def test_triton_is_refused_where_it_cannot_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert op.choose_backend("auto", torch.device("cpu")) == "reference"
    with pytest.raises(RuntimeError, match="can't run here: tensors are on cpu"):
        topk_match(*(x.cpu() for x in (case.context, case.mask, case.keys, case.values)), 5, backend="triton")


def test_import_of_the_op_does_not_import_triton() -> None:
    """So that a machine without Triton has the reference, and tests can ask for the interpreter."""
    folder = "listen_dist.kernels.topk_match"
    check = f"import sys, {folder}.op; sys.exit('{folder}.triton' in sys.modules or 'triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel: object, counts: list[str], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.counts.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize(("rows", "pool", "forward"), [(3, 50, 2), (3, 140, 4), (9, 140, 4), (1, 2049, 5)])
def test_launches(rows: int, pool: int, forward: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Two launches forward at the paper's size, three backward at any."""
    launched: list[str] = []
    for module in (triton, triton_backward):
        for name in module.LAUNCHED:
            monkeypatch.setattr(module, name, Counting(getattr(module, name), launched, name))
    case = make_case(rows, 2, 4, pool, 3, device=device)
    topk_match(case.context, case.mask, case.keys, case.values, 3, backend="triton")
    assert len(launched) == forward == plan.forward_plan(rows, pool, 4, 3).launches
    run(case, "triton")
    assert len(launched) - 2 * forward == 3
