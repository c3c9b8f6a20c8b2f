"""Compile every kernel launch of given shapes for several GPUs, on a machine without one.

Run as a script, in a process without TRITON_INTERPRET: prints one JSON line a compiled kernel with its
registers, stack (spills live there), shared memory and time. The launches are the real ones: the
kernels are replaced by recorders, and the launch code runs on meta tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import triton
from aot_shapes import FORWARD_AND_BACKWARD, FORWARD_ONLY, SHAPES_OF_OTHER_DTYPES
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from listen_dist.kernels.topk_match import triton as forward
from listen_dist.kernels.topk_match import triton_backward as backward

DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.bool: "i1",
}  # fmt: skip
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Recorder:
    """Stands in for a kernel: notes each distinct launch with the signature the JIT would compile."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.launches: dict[str, tuple[ASTSource, dict[str, int]]] = {}

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(0 < size < 2**31 for size in grid) and len(grid) == 1, grid
        return self.record

    def record(self, *args: object, num_warps: int, **constants: object) -> None:
        """Specialise as the JIT does: None and 1 are constants, multiples of 16 are noted."""
        names = self.kernel.arg_names
        signature: dict[str, str] = {}
        constexprs: dict[str, object] = {}
        attrs: dict[tuple[int, ...], list] = {}
        passed = [*args, *(constants[name] for name in names[len(args) :])]
        for place, (name, arg) in enumerate(zip(names, passed, strict=True)):
            if name in constants or arg is None or (isinstance(arg, int) and arg == 1):
                signature[name] = "constexpr"
                constexprs[name] = arg
            elif isinstance(arg, torch.Tensor):
                signature[name] = "*" + DTYPES[arg.dtype]
                attrs[(place,)] = [["tt.divisibility", 16]]
            else:
                assert isinstance(arg, int), (name, arg)
                signature[name] = "i32" if arg < 2**31 else "i64"
                if arg % 16 == 0:
                    attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        # Of launches that differ in a count alone (of rows, of chunks ...) the first is enough; whether
        # rows are aligned decides about registers, so widths are told apart by that.
        width = passed[names.index("D")] if "D" in names else 0
        types = [s for s in signature.values() if s.startswith("*")]
        absent = [name for name, value in constexprs.items() if value is None]
        key = (types, absent, [constants[name] for name in sorted(constants)], num_warps, width % 16, width == 1)
        self.launches.setdefault(repr(key), (source, {"num_warps": num_warps}))


def record(module: object) -> dict[str, Recorder]:
    """Replace the module's kernels that are launched (an underscore, and no caller among kernels)."""
    recorders = {}
    for name, value in list(vars(module).items()):
        if isinstance(value, JITFunction) and name in module.LAUNCHED:
            recorders[name] = Recorder(value)
            setattr(module, name, recorders[name])
    return recorders


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack and of static shared memory, from the cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = RESOURCES.search(text)
    assert found, text
    return dict(zip(("registers", "stack", "static_shared", "local"), map(int, found.groups()), strict=True))


def compile_all(recorders: dict[str, Recorder], capability: int) -> None:
    """Compile and print what was recorded."""
    for name, recorder in recorders.items():
        for source, options in recorder.launches.values():
            start = time.perf_counter()
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            constants = {source.fn.arg_names[i]: v for (i,), v in source.constants.items() if not isinstance(v, bool)}
            line = {
                "kernel": name, "capability": capability, "shared": compiled.metadata.shared,
                **resources(compiled.asm["cubin"]), "seconds": round(time.perf_counter() - start, 2),
                "warps": options["num_warps"], "constants": {k: v for k, v in constants.items() if k.isupper()},
            }  # fmt: skip
            print(json.dumps(line), flush=True)


def launch(rows: int, pool: int, width: int, k: int, dtype: torch.dtype, backwards: bool = True) -> None:
    """Forward and (unless told not to) backward on meta tensors: nothing is computed, every launch is recorded."""
    length = 256
    context = torch.empty(rows, length, width, dtype=dtype, device="meta")
    keys = torch.empty(pool, width, device="meta")
    mask = {
        torch.bfloat16: torch.empty(rows, length, dtype=torch.bool, device="meta"),
        torch.float16: torch.empty(rows, dtype=torch.int64, device="meta"),
    }.get(dtype)
    match = forward.match_forward(context, mask, keys, keys, k)
    if not backwards:
        return
    gradients = (match.prompts.to(dtype), match.scores, match.match_loss, match.row_mass)
    saved = (match.scores, match.indices, *match[5:])
    backward.match_backward(*gradients, mask, keys, *saved, length, dtype, (True, True, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    args = parser.parse_args()
    recorders = record(forward) | record(backward)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in FORWARD_AND_BACKWARD if dtype == torch.bfloat16 else SHAPES_OF_OTHER_DTYPES:
            launch(*shape, dtype)
    for shape in FORWARD_ONLY:
        launch(*shape, torch.bfloat16, backwards=False)
    for capability in args.capability:
        compile_all(recorders, capability)


if __name__ == "__main__":
    main()
