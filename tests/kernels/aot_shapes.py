"""(B, N, D, k) whose launches are compiled ahead of time; test_aot.py checks that they reach every plan."""

from __future__ import annotations

Shape = tuple[int, int, int, int]

FUSED: list[Shape] = [(1, n, 4096, min(n, 20)) for n in (10, 32, 50, 128)]
VECTOR: list[Shape] = [(b, 1000, 4096, 20) for b in (1, 2, 4, 8)]
MATRIX: list[Shape] = [(17, 1000, 4096, 20), (64, 1000, 4096, 20), (4096, 16384, 4096, 20), (65, 50, 4096, 20)]
SELECT: list[Shape] = [(1, 200, 576, k) for k in (5, 64, 200)]
SELECT += [(1, n, 576, k) for n in (1000, 5000) for k in (5, 64, 200, 1000)]
ODD: list[Shape] = [(3, 50, 577, 5), (3, 999, 577, 5), (17, 999, 577, 5), (70, 999, 577, 5), (4097, 16385, 577, 5)]
"""No multiple of 16 anywhere: the compiler can't assume aligned rows."""

LARGE_K: list[Shape] = [(1, 65536, 1, 40000)]
"""Positions no longer fit 16 bits."""

FORWARD_AND_BACKWARD = [FUSED[2], *VECTOR, *MATRIX, *ODD, *LARGE_K]
FORWARD_ONLY = [FUSED[0], FUSED[1], FUSED[3], *SELECT]
"""They differ in how they choose, which the backward doesn't see."""
SHAPES_OF_OTHER_DTYPES: list[Shape] = [(3, 50, 576, 5), (17, 200, 576, 5)]
"""The dtype of the context reaches only the first and the context gradient's kernel."""
