"""Time top-k matching against the eager reference and torch.compile of it, on one device.

    python tools/bench_topk.py --json > topk.json             # the whole table on a GPU, < 10 minutes
    python tools/bench_topk.py --device cpu --quick           # smoke test: the reference alone

Each row is a shape and a pass (forward, or forward and backward). Its share of the limit is
max(bytes / bandwidth, operations / rate) / time, with bandwidth and fp32 rate measured on the same
device at the start; bytes and operations are what no implementation can avoid (`count`).
The op is timed as called and as a captured CUDA graph; torch.compile in its default mode with dynamic
shapes on every row, and as max-autotune (static, capturing graphs itself) on the rows of the paper's
sizes. Speed-ups compare the best of the op with the best of its rival; against eager, as called.
Before a shape is timed, its scores must agree with the reference's. A row that can't be measured, for
memory or another reason, is listed in `failed` and costs no other row; what the time budget doesn't
reach is listed in `left_out`, never guessed. Behind the paper's pool, rows come in even samples of the
table, so that those that were reached speak for the rest.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from listen_dist import exits
from listen_dist.kernels.topk_match.op import topk_match
from listen_dist.kernels.topk_match.plan import forward_plan
from listen_dist.kernels.topk_match.reference import topk_match_reference

LAUNCH_BOUND_SECONDS = 20e-6
"""Rows whose limit is below it are about launches, not about memory."""
LARGE_BYTES = 256e6
SAMPLES = 7
"""The table is gone through in so many even samples (odd: forward and backward rows alternate in it)."""
TABLE_SHARE = 0.8
"""Of the budget; the rest is for max-autotune, which compiles every row anew."""
BACKWARD_LAUNCHES = 3


@dataclass(frozen=True)
class Shape:
    """One row's sizes, letters as in `structures`."""

    B: int
    T: int
    N: int
    D: int
    k: int
    backward: bool


@dataclass
class Row:
    """What a row measured: seconds a call by implementation, and what it moved."""

    shape: Shape
    launches: int
    bytes: int
    operations: int
    limit_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)

    def best(self, *names: str) -> float | None:
        """The least of those that were measured."""
        return min((self.seconds[name] for name in names if name in self.seconds), default=None)

    @property
    def share(self) -> float | None:
        """Of the limit, for the op at its best (without a GPU: for the reference)."""
        best = self.best("triton", "triton_graph") or self.best("eager")
        return None if best is None else self.limit_seconds / best

    def speedup(self, op: tuple[str, ...], rivals: tuple[str, ...]) -> float | None:
        mine, theirs = self.best(*op), self.best(*rivals)
        return None if mine is None or theirs is None else theirs / mine

    def as_json(self) -> dict[str, object]:
        return {
            **asdict(self.shape), "launches": self.launches, "bytes": self.bytes, "operations": self.operations,
            "limit_seconds": self.limit_seconds, "seconds": self.seconds, "limit_share": self.share,
            "speedup_eager": self.speedup(("triton",), ("eager",)),
            "speedup_compile": self.speedup(("triton", "triton_graph"), ("compile", "compile_max")),
        }  # fmt: skip


def shapes(quick: bool) -> list[Shape]:
    """The table, the paper's sizes first; quick: two small shapes."""
    grid = itertools.product((1, 8, 64, 512, 4096), (32, 256), (50, 1000, 16384, 65536), (576, 2048, 4096), (1, 20, 64))
    if quick:
        grid = itertools.product((1, 8), (32,), (50,), (576,), (20,))
    found = [Shape(*sizes, backward) for sizes in grid if sizes[4] <= sizes[2] for backward in (False, True)]
    found.sort(key=lambda s: (s.B * s.T * s.D + s.N * s.D + s.B * s.N, s.N, s.k, s.backward))
    paper, rest = ([s for s in found if (s.N == 50) == small] for small in (True, False))
    return paper + [s for first in range(SAMPLES) for s in rest[first::SAMPLES]]


def is_paper_s(shape: Shape) -> bool:
    """Rows that max-autotune is tried on."""
    return (shape.N, shape.k, shape.D) == (50, 20, 4096) and shape.B <= 64


def count(shape: Shape, context_bytes: int) -> tuple[int, int]:
    """Bytes that must move (each input read once, each output written once) and fp32 operations."""
    B, T, N, D, k = shape.B, shape.T, shape.N, shape.D, shape.k
    context = B * T * (D * context_bytes + 1)
    chosen = min(N, B * k) * D * 4
    moved = context + N * D * 4 + chosen + B * k * (D * 4 + 12)
    operations = B * T * D + 2 * B * N * D + 2 * N * D
    if shape.backward:
        # Read keys and the prompts' gradient; write the gradients of context, keys and values.
        moved += N * D * 4 + B * k * D * 4 + B * T * D * context_bytes + 2 * N * D * 4
        operations += 4 * B * N * D + B * k * D
    return moved, operations


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_a_call(function: Callable[[], object], device: str, at_least: float = 0.01) -> float:
    """Median over 3 rounds (one of slow calls); each as many calls as take `at_least` seconds, timed as a whole."""
    function()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    once = time.perf_counter() - start
    calls = max(1, min(50, math.ceil(at_least / once)))
    rounds = []
    for _ in range(3 if once < 0.1 else 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / calls)
    return sorted(rounds)[len(rounds) // 2]


def device_limits(device: str, quick: bool) -> tuple[float, float]:
    """Bytes a second of a copy, and fp32 operations a second of a matrix product, both large."""
    elements = 2**24 if quick else 2**29
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    bandwidth = 8 * elements / seconds_a_call(lambda: target.copy_(source), device)
    source = target = torch.empty(0)
    side = 512 if quick else 8192
    a, b = torch.randn(2, side, side, device=device).unbind()
    return bandwidth, 2 * side**3 / seconds_a_call(lambda: a @ b, device)


class Inputs:
    """Tensors of one shape; neighbours in the table share what they can."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.context = self.mask = self.keys = self.values = torch.empty(0)

    def prepare(self, shape: Shape) -> None:
        if self.context.shape != (shape.B, shape.T, shape.D):
            self.context = torch.empty(0)
            self.context = torch.randn(shape.B, shape.T, shape.D, device=self.device, dtype=self.dtype)
            self.mask = torch.ones(shape.B, shape.T, dtype=torch.bool, device=self.device)
        if self.keys.shape != (shape.N, shape.D):
            self.keys = self.values = torch.empty(0)
            self.keys, self.values = torch.randn(2, shape.N, shape.D, device=self.device).unbind()
        for x in (self.context, self.keys, self.values):
            x.requires_grad_(shape.backward)


def calling(match: Callable[..., tuple], inputs: Inputs, shape: Shape) -> Callable[[], object]:
    """A function without arguments that runs one pass of the shape."""
    c, m, keys, values = inputs.context, inputs.mask, inputs.keys, inputs.values
    if not shape.backward:
        return lambda: match(c, m, keys, values, shape.k)
    weights = torch.randn(shape.B, shape.k, shape.D, device=c.device)

    def both() -> tuple[Tensor, ...]:
        result = match(c, m, keys, values, shape.k)
        return torch.autograd.grad([result[0], result[3]], [c, keys, values], [weights, torch.ones_like(result[3])])

    return both


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """The function as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def triton_match(*args: object) -> tuple:
    return topk_match(*args, backend="triton")


def check(inputs: Inputs, shape: Shape) -> None:
    """Raise unless the op's scores agree with the reference's."""
    with torch.no_grad():
        args = (inputs.context, inputs.mask, inputs.keys, inputs.values, shape.k)
        torch.testing.assert_close(triton_match(*args)[1], topk_match_reference(*args)[1], rtol=1e-4, atol=1e-7)


def measure(row: Row, inputs: Inputs, compiled: Callable[..., tuple], device: str) -> None:
    """Fill in the row's seconds."""
    shape = row.shape
    inputs.prepare(shape)
    row.seconds["eager"] = seconds_a_call(calling(topk_match_reference, inputs, shape), device)
    if device != "cuda":
        return
    check(inputs, shape)
    function = calling(triton_match, inputs, shape)
    row.seconds["triton"] = seconds_a_call(function, device)
    row.seconds["triton_graph"] = seconds_a_call(captured(function), device)
    row.seconds["compile"] = seconds_a_call(calling(compiled, inputs, shape), device)


def measure_max_autotune(row: Row, inputs: Inputs) -> None:
    """Add what torch.compile gives when it may search for long."""
    inputs.prepare(row.shape)
    static = torch.compile(topk_match_reference, mode="max-autotune", dynamic=False)
    row.seconds["compile_max"] = seconds_a_call(calling(static, inputs, row.shape), "cuda")


def attempt(shape: Shape, failed: list[dict[str, object]], action: Callable[[], None]) -> bool:
    """Whether it went well; what went wrong is noted, and the next row gets the memory back."""
    try:
        action()
    except Exception as error:  # out of memory, a compiler's fault, scores that disagree: of this row alone
        failed.append(asdict(shape) | {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False
    return True


def geomean(values: list[float | None]) -> float | None:
    known = [math.log(x) for x in values if x is not None]
    return math.exp(sum(known) / len(known)) if known else None


def summarise(
    rows: list[Row], bandwidth: float, rate: float, left_out: list[Shape], failed: list[dict[str, object]]
) -> dict[str, object]:
    lines = [row.as_json() for row in rows]
    small = [x for row, x in zip(rows, lines, strict=True) if row.limit_seconds < LAUNCH_BOUND_SECONDS]
    large = [x["limit_share"] for row, x in zip(rows, lines, strict=True) if row.bytes > LARGE_BYTES]
    return {
        "speedup_eager_geomean": geomean([x["speedup_eager"] for x in small]),
        "speedup_compile_geomean": geomean([x["speedup_compile"] for x in small]),
        "limit_share_large": geomean(large),
        "limit_share_large_min": min(large, default=None),
        "rows_slower_than_compile": sum((x["speedup_compile"] or 1) < 1 for x in lines),
        "launch_bound_rows": len(small), "large_rows": len(large), "left_out": [asdict(s) for s in left_out],
        "failed": failed,
        "bandwidth_bytes_a_second": bandwidth, "fp32_operations_a_second": rate,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def table_line(row: Row) -> str:
    shape = "x".join(map(str, list(asdict(row.shape).values())[:5])) + (" fwd+bwd" if row.shape.backward else " fwd")
    times = "  ".join(f"{name} {seconds * 1e6:.1f}us" for name, seconds in row.seconds.items())
    return f"{shape:32} {row.launches} launches  {row.bytes / 1e6:10.2f} MB  limit {row.share or 0:6.1%}  {times}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    return exits.run(lambda: bench(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--json", action="store_true", help="rows and summary on standard output")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which rows are left out")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --quick times the reference alone")
    if not args.quick and args.device == "cpu":
        parser.error("the whole table is for a GPU; add --quick")
    return args


def bench(args: argparse.Namespace) -> int:
    """Time the rows, print table and summary; 1 where a row failed."""
    start = time.monotonic()
    dtype = getattr(torch, args.dtype)
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(topk_match_reference, dynamic=True)
    bandwidth, rate = device_limits(args.device, args.quick)
    inputs = Inputs(args.device, dtype)
    rows: list[Row] = []
    left_out: list[Shape] = []
    failed: list[dict[str, object]] = []
    for shape in shapes(args.quick):
        if time.monotonic() - start > TABLE_SHARE * args.budget:
            left_out.append(shape)
            continue
        moved, operations = count(shape, dtype.itemsize)
        launches = forward_plan(shape.B, shape.N, shape.D, shape.k).launches + BACKWARD_LAUNCHES * shape.backward
        row = Row(shape, launches, moved, operations, max(moved / bandwidth, operations / rate))
        if attempt(shape, failed, lambda row=row: measure(row, inputs, compiled, args.device)):
            rows.append(row)
            print(table_line(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    for row in (row for row in rows if args.device == "cuda" and is_paper_s(row.shape)):
        if time.monotonic() - start < args.budget:
            attempt(row.shape, failed, lambda row=row: measure_max_autotune(row, inputs))
    summary = summarise(rows, bandwidth, rate, left_out, failed)
    print(json.dumps({"rows": [row.as_json() for row in rows], "summary": summary} if args.json else summary, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
