"""The kernels against the reference on this machine, before anybody relies on them."""

from __future__ import annotations

import torch

from listen_dist.kernels.topk_match.op import Backend, topk_match

SHAPES = ((3, 37, 96, 10, 4), (2, 1, 640, 50, 20), (1, 5, 64, 7, 7))
"""B, T, D, N, k: odd sizes, one position, all prompts."""
TOLERANCE = 1e-4


def fault(device: torch.device) -> str:
    """What the kernels get wrong on a device against the reference, or how they fail; empty where they agree.

    Values, the choice and all gradients, in float32 and bfloat16 contexts; a few launches, and their compilation.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                ours = _results(shape, dtype, device, "triton")
                theirs = _results(shape, dtype, device, "reference")
                for name, value in ours.items():
                    if not torch.allclose(value, theirs[name], rtol=TOLERANCE, atol=TOLERANCE):
                        return (f"{name} differs from the reference by {float((value - theirs[name]).abs().max()):.1e} "
                                f"(B, T, D, N, k = {shape}, {str(dtype).removeprefix('torch.')})")
    except Exception as error:  # a compiler or driver that fails, whatever it raises
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        torch.set_float32_matmul_precision(precision)
    return ""


def _results(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
             backend: Backend) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name, float32, also where the first user of the kernels decodes without gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        return _compute(shape, dtype, device, backend)


def _compute(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
             backend: Backend) -> dict[str, torch.Tensor]:
    rows, length, width, count, k = shape
    random = torch.Generator().manual_seed(width)
    context, keys, values, weights = (
        torch.randn(size, generator=random).to(device)
        for size in ((rows, length, width), (count, width), (count, width), (rows, k, width)))
    mask = torch.arange(length, device=device) < torch.arange(1, rows + 1, device=device)[:, None] * length / rows
    leaves = {"gradient of context": context.to(dtype), "gradient of keys": keys, "gradient of values": values}
    for leaf in leaves.values():
        leaf.requires_grad_()
    match = topk_match(leaves["gradient of context"], mask, keys, values, k, backend=backend)
    ((match.prompts * weights).sum() + match.scores.square().sum() + match.match_loss).backward()
    outputs = {"prompts": match.prompts, "scores": match.scores, "indices": match.indices,
               "match loss": match.match_loss}
    return {name: value.detach().float() for name, value in outputs.items()} | {
        name: leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}
