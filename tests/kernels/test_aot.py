"""Every kernel and configuration, compiled for three generations of GPUs without having one.

The launch code runs on meta tensors there (see aot_compile.py): it could neither wait for the device
nor take a shape from data without failing, which is what a CUDA graph asks of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot_shapes import FORWARD_AND_BACKWARD, FORWARD_ONLY

from listen_dist.kernels.topk_match import plan, triton, triton_backward

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities)."""


@pytest.mark.timeout(1300)  # 45 s of compiling, many times as long where much else runs
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_compiles_within_the_limits(capability: int) -> None:
    """No spill (the stack is where spills live), and shared memory within the limit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    command = [sys.executable, str(script), "--capability", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in found} == {*triton.LAUNCHED, *triton_backward.LAUNCHED}
    for line in found:
        assert line["stack"] == 0 and line["local"] == 0, f"spills: {line}"
        assert max(line["shared"], line["static_shared"]) <= SHARED_LIMIT[capability], line
        assert line["registers"] <= 255


def test_shapes_reach_every_plan() -> None:
    """What is compiled above is all that a shape can lead to."""
    possible = {
        _forward_kernels(rows, pool, width, k)
        for width in (576, 577)
        for rows in (*range(1, 70), 511, 512, 513, 4096)
        for pool in (1, 10, 17, 33, 50, 63, 65, 128, 129, 256, 257, 1000, 1024, 1025, 2048, 2049, 65536)
        for k in (1, 5, 16, 17, 64, 65, 256, 257, 2048, 65536)
        if k <= pool
    }
    compiled = {_forward_kernels(*shape) for shape in FORWARD_AND_BACKWARD + FORWARD_ONLY}
    assert set().union(*possible) == set().union(*compiled)
    backward = {plan.backward_plan(rows) for rows in range(1, 4097)}
    assert backward == {plan.backward_plan(rows) for rows, *_ in FORWARD_AND_BACKWARD}


def _forward_kernels(rows: int, pool: int, width: int, k: int) -> frozenset[tuple[object, ...]]:
    """The constants that each kernel of a forward is compiled with."""
    p = plan.forward_plan(rows, pool, width, k)
    if p.fused:
        return frozenset({("choose", p.pool_block, p.block_d)})
    tile = ("similarity", p.matrix, p.row_block, p.pool_block, p.depth_block, p.warps)
    return frozenset({tile, ("select", p.chunk, p.best, p.chunks == 1)})
