"""Top-k matching as one op: checks, the choice of backend, and autograd around the kernels.

The Triton backend is two functional `torch.library` ops, `listen_dist::topk_match` and its
backward, with fake implementations, so that `torch.compile`, activation checkpointing and CUDA
graphs see one opaque node, and `topk_match_into` for the output buffer. The reference backend
is plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from listen_dist.kernels.topk_match.reference import TopkMatch, masked_mean, topk_match_reference

__all__ = ["Backend", "TopkMatch", "choose_backend", "topk_match", "topk_match_query"]

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What a context may be for the kernels; the reference takes fp64 too."""
HAS_TRITON = importlib.util.find_spec("triton") is not None


def topk_match(
    context: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    backend: Backend = "auto",
    out: Tensor | None = None,
    debug: bool = False,
) -> TopkMatch:
    """Match the masked mean of a context against the keys; the values of the best k.

    context: [B, T, D] fp32, bf16 or fp16, B >= 1; mask: [B, T] bool (true counts), [B] integer
    lengths, or None (all positions count); keys, values: [N, D] fp32; 1 <= k <= N. Formulas, the
    order of ties and what zeros and NaN do: `reference.py`.
    backend: "auto" takes Triton for tensors on a GPU, the reference elsewhere, and logs it once.
    out: [B, >= k, D], any float dtype: its first k rows take the prompts, in place, and `prompts`
    is a view of them. Gradients flow through those rows to the values.
    debug: look for unusable rows first (waits for the device).

    Raises ValueError for shapes, dtypes, devices or k that don't fit, for an unusable query or key
    under `debug`, and for the reference while fp32 products may be rounded (TF32 could change
    which prompts are picked); RuntimeError for "triton" where Triton can't run.
    """
    _check(context, mask, keys, values, k, out)
    chosen = choose_backend(backend, context.device)
    if debug:
        _check_usable(context, mask, keys)
    if chosen == "reference":
        _check_products()
        return _copied(topk_match_reference(context, mask, keys, values, k), out)
    _check_kernel_dtypes(context, keys, values)
    # Dynamo traces a function that writes in place, but gives the rows it wrote over a gradient.
    if out is None or torch.compiler.is_compiling():
        return _copied(TopkMatch(*torch.ops.listen_dist.topk_match(context, mask, keys, values, k)[:5]), out)
    written, *rest = _Into.apply(context, mask, keys, values, k, out)
    return TopkMatch(written[:, :k], *rest)


def topk_match_query(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    backend: Backend = "auto",
    out: Tensor | None = None,
    debug: bool = False,
) -> TopkMatch:
    """As `topk_match`, from a ready query [B, D]: a context of one position."""
    if query.dim() != 2:
        raise ValueError(f"query must be [B, D], got {list(query.shape)}")
    return topk_match(query[:, None], None, keys, values, k, backend=backend, out=out, debug=debug)


def choose_backend(backend: Backend, device: torch.device) -> Literal["triton", "reference"]:
    """The backend that runs; "auto" says once which one it took and why, and on a GPU checks the kernels first.

    Raises ValueError for another name, RuntimeError where "triton" was asked for and can't run.
    """
    if backend == "reference":
        return "reference"
    obstacle = _obstacle(device)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"backend 'triton' can't run here: {obstacle}")
        return "triton"
    if backend != "auto":
        raise ValueError(f"backend must be 'auto', 'triton' or 'reference', got {backend!r}")
    # Tensors on a CPU can reach the kernels through the interpreter: right for tests, which ask for it.
    chosen: Literal["triton", "reference"] = "reference" if obstacle or device.type == "cpu" else "triton"
    if torch.compiler.is_compiling():
        return chosen
    if chosen == "triton" and (wrong := _fault(device)):
        chosen, obstacle = "reference", f"the kernels failed their check on {device}: {wrong}"
    _say_once(chosen, obstacle or f"tensors are on {device.type}")
    return chosen


def _obstacle(device: torch.device) -> str:
    """Why Triton can't run on the device; empty if it can."""
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return "" if HAS_TRITON else "triton is not installed"
    return f"tensors are on {device.type} (set TRITON_INTERPRET=1 before the start to interpret kernels on cpu)"


@functools.cache
def _say_once(chosen: str, why: str) -> None:
    logger.info("topk_match: backend auto took %s: %s", chosen, why)


@functools.cache
def _fault(device: torch.device) -> str:
    """What `self_check` found on a device, with a warning; empty where the kernels are right."""
    found = str(_kernels("self_check").fault(device))
    if found:
        logger.warning("topk_match: the Triton kernels failed their check on %s (%s); plain PyTorch is used instead, "
                       "which is slower and right", device, found)
    return found


@functools.cache
def _kernels(name: str) -> ModuleType:
    """The modules that import Triton or this one, loaded at the first use of a kernel."""
    return importlib.import_module(f"listen_dist.kernels.topk_match.{name}")


def _check(context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int, out: Tensor | None) -> None:
    """Raise ValueError unless the shapes and devices fit."""
    if context.dim() != 3 or 0 in context.shape:
        raise ValueError(f"context must be [B, T, D] with no empty dimension, got {list(context.shape)}")
    rows, length, width = context.shape
    if keys.dim() != 2 or keys.shape != values.shape or keys.shape[1] != width:
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} must both be [N, {width}]")
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"k must be from 1 to the {keys.shape[0]} keys, got {k}")
    if mask is not None:
        lengths = mask.shape == (rows,) and mask.dtype in (torch.int32, torch.int64)
        if not lengths and not (mask.shape == (rows, length) and mask.dtype == torch.bool):
            raise ValueError(
                f"mask must be bool [{rows}, {length}] or integer lengths [{rows}], got {mask.dtype} {list(mask.shape)}"
            )
    if out is not None and (out.dim() != 3 or out.shape[::2] != (rows, width) or out.shape[1] < k):
        raise ValueError(f"out must be [{rows}, at least {k}, {width}], got {list(out.shape)}")
    devices = {x.device for x in (context, mask, keys, values, out) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {sorted(map(str, devices))}")


def _check_kernel_dtypes(context: Tensor, keys: Tensor, values: Tensor) -> None:
    if context.dtype not in FLOATS or keys.dtype != torch.float32 or values.dtype != torch.float32:
        raise ValueError(
            f"the kernels take a context of fp32, bf16 or fp16 and a pool of fp32, "
            f"got {context.dtype}, {keys.dtype} and {values.dtype}"
        )


def _check_usable(context: Tensor, mask: Tensor | None, keys: Tensor) -> None:
    """Raise ValueError naming the first rows whose squared norm isn't finite."""
    for name, rows in (("context row", masked_mean(context.detach().float(), mask)), ("key", keys.detach())):
        bad = ~rows.float().square().sum(-1).isfinite()
        if bad.any():
            raise ValueError(f"{name} {bad.nonzero().flatten().tolist()[:8]} holds NaN, infinity or overflows")


def _products_are_rounded() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


# What torch.compiler.assume_constant_result does, without its import of all of Dynamo (and of Triton).
_products_are_rounded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_products() -> None:
    if _products_are_rounded():
        raise ValueError(
            "the reference needs torch.set_float32_matmul_precision('highest'): "
            "rounded products may change which prompts are picked"
        )


def _copied(match: TopkMatch, out: Tensor | None) -> TopkMatch:
    """The match with its prompts moved to the output buffer, if there is one."""
    if out is None:
        return match
    k = match.prompts.shape[1]
    out[:, :k] = match.prompts.to(out.dtype)
    return match._replace(prompts=out[:, :k])


_RESULT = "Tensor scores, Tensor indices, Tensor match_loss, Tensor row_mass, Tensor query, Tensor query_scale, \
Tensor key_scale, Tensor similarity, Tensor total"
_INPUT = "Tensor context, Tensor? mask, Tensor keys, Tensor values, SymInt k"

torch.library.define("listen_dist::topk_match", f"({_INPUT}) -> (Tensor prompts, {_RESULT})")
torch.library.define("listen_dist::topk_match_into", f"({_INPUT}, Tensor(a!) out) -> ({_RESULT})")
torch.library.define(
    "listen_dist::topk_match_backward",
    "(Tensor? grad_prompts, Tensor? grad_scores, Tensor? grad_loss, Tensor? grad_mass, Tensor? mask, Tensor keys, "
    "Tensor scores, Tensor indices, Tensor query, Tensor query_scale, Tensor key_scale, Tensor similarity, "
    "Tensor total, SymInt length, ScalarType context_dtype, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


def _forward(context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(context):  # Triton launches on the current device, wherever the tensors are
        return tuple(_kernels("triton").match_forward(context, mask, keys, values, k))


def _forward_into(
    context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int, out: Tensor
) -> tuple[Tensor, ...]:
    with torch.cuda.device_of(context):
        return tuple(_kernels("triton").match_forward(context, mask, keys, values, k, out))[1:]


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """The backward op; an op has no optional results, so an empty tensor stands for none."""
    keys = args[5]
    with torch.cuda.device_of(keys):
        gradients = _kernels("triton_backward").match_backward(*args)
    return tuple(keys.new_empty(0) if x is None else x for x in gradients)


def _fake_results(context: Tensor, keys: Tensor, k: int) -> tuple[Tensor, ...]:
    rows, _, width = context.shape
    pool = keys.shape[0]
    shapes = ((rows, k), (rows, k), (), (rows,), (rows, width), (rows,), (pool,), (rows, pool), (rows,))
    dtypes = [torch.int64 if place == 1 else torch.float32 for place in range(len(shapes))]
    return tuple(keys.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _forward_fake(context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int) -> tuple[Tensor, ...]:
    prompts = values.new_empty(context.shape[0], k, context.shape[2])
    return prompts, *_fake_results(context, keys, k)


def _forward_into_fake(
    context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int, out: Tensor
) -> tuple[Tensor, ...]:
    return _fake_results(context, keys, k)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_prompts, grad_scores, grad_loss, grad_mass, _, keys, _, _, query = args[:9]
    length, context_dtype, needs = args[13:]
    scored = any(x is not None for x in (grad_scores, grad_loss, grad_mass))
    none = keys.new_empty(0)
    return (
        query.new_empty(query.shape[0], length, query.shape[1], dtype=context_dtype) if needs[0] and scored else none,
        torch.empty_like(keys, memory_format=torch.contiguous_format) if needs[1] and scored else keys.new_empty(0),
        keys.new_empty(keys.shape) if needs[2] and grad_prompts is not None else keys.new_empty(0),
    )


def _save(ctx: Any, context: Tensor, mask: Tensor | None, keys: Tensor, results: tuple[Tensor, ...]) -> None:
    """Keep what the backward needs; never the context itself. `results` as `_RESULT` names them."""
    scores, indices, _, _, query, query_scale, key_scale, similarity, total = results
    ctx.save_for_backward(mask, keys, scores, indices, query, query_scale, key_scale, similarity, total)
    ctx.mark_non_differentiable(indices, query, query_scale, key_scale, similarity, total)
    ctx.set_materialize_grads(False)
    ctx.length, ctx.context_dtype = context.shape[1], context.dtype


def _gradients(
    ctx: Any,
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    grad_loss: Tensor | None,
    grad_mass: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of context, mask, keys, values and k."""
    needs = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    gradients = torch.ops.listen_dist.topk_match_backward(
        grad_prompts, grad_scores, grad_loss, grad_mass, *ctx.saved_tensors, ctx.length, ctx.context_dtype, needs
    )
    context, keys, values = (x if x.numel() else None for x in gradients)
    return context, None, keys, values, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    context, mask, keys, _, _ = inputs
    _save(ctx, context, mask, keys, output[1:])


def _autograd(
    ctx: Any, grad_prompts: Tensor | None, grad_scores: Tensor | None, grad_indices: None,
    grad_loss: Tensor | None, grad_mass: Tensor | None, *grad_residuals: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return _gradients(ctx, grad_prompts, grad_scores, grad_loss, grad_mass)


def _not_twice(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("topk_match can't be differentiated twice by the triton backend; use the reference")


def _register() -> None:
    """Give the ops their implementations. Any device is let through: `choose_backend` has judged it."""
    forms: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "topk_match": (_forward, _forward_fake),
        "topk_match_into": (_forward_into, _forward_into_fake),
        "topk_match_backward": (_backward, _backward_fake),
    }
    for name, (implementation, fake) in forms.items():
        torch.library.impl(f"listen_dist::{name}", ("cpu", "cuda"), implementation)
        torch.library.register_fake(f"listen_dist::{name}", fake)
    torch.library.register_autograd("listen_dist::topk_match", _autograd, setup_context=_setup_context)
    torch.library.register_autograd("listen_dist::topk_match_backward", _not_twice)


_register()


class _Into(torch.autograd.Function):
    """`topk_match` into an output buffer: the op that writes in place, and the gradients around it.

    Its first output is the buffer, whose earlier gradient loses the rows that were written over.
    """

    @staticmethod
    def forward(
        ctx: Any, context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int, out: Tensor
    ) -> tuple[Tensor, ...]:
        results = torch.ops.listen_dist.topk_match_into(context, mask, keys, values, k, out)
        ctx.mark_dirty(out)
        ctx.k = k
        _save(ctx, context, mask, keys, results)
        return out, *results[:4]

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_scores: Tensor | None, grad_indices: None,
        grad_loss: Tensor | None, grad_mass: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        grad_prompts = None if grad_out is None else grad_out[:, : ctx.k]
        gradients = _gradients(ctx, grad_prompts, grad_scores, grad_loss, grad_mass)
        if grad_out is None or not ctx.needs_input_grad[5]:
            return *gradients, None
        grad_out = grad_out.clone()
        grad_out[:, : ctx.k] = 0
        return *gradients, grad_out
