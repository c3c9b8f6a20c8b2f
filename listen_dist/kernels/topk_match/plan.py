"""Which kernels run at a shape, and with which block sizes: a pure function of the shape.

Nothing is tuned at run time. A tuner could pick another block size tomorrow, sums would be
taken in another order and the bits would change; and it can't run inside a CUDA graph capture.
Every plan is one of a short list, so that each can be compiled ahead of time (tests/kernels).
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED_MAX_POOL = 128
"""Pools up to here are matched within the launch that averages the context."""
FUSED_MAX_ROWS = 64
"""Above, the keys would be read from cache too often, once a row: the matrix path shares them."""
VECTOR_MAX_ROWS = 8
"""Up to here a row of the batch is cheaper on the vector units than padded to a matrix tile."""


@dataclass(frozen=True)
class ForwardPlan:
    """Block sizes of the forward kernels; see `triton.py` for what each one blocks."""

    fused: bool
    """Two launches: mean with partial similarities, then choice with gather."""
    block_d: int
    """Columns a program of the query (and of the fused choice) takes."""
    block_t: int
    pool_block: int
    """Fused: the pool padded to a power of two. Else: keys per similarity program."""
    row_block: int
    """Rows per similarity program."""
    depth_block: int
    """Columns per step of the similarity loop."""
    matrix: bool
    """Similarity by tl.dot instead of the vector units."""
    warps: int
    """Warps of the similarity kernel (fused: of both kernels)."""
    chunk: int
    """Keys sorted by one program; more than one chunk needs the merge."""
    best: int
    """Candidates a chunk keeps, a power of two >= min(k, chunk)."""
    chunks: int

    @property
    def launches(self) -> int:
        """Kernels launched by one forward."""
        if self.fused:
            return 2
        return 4 if self.chunks == 1 else 5


@dataclass(frozen=True)
class BackwardPlan:
    """Block sizes of the backward kernels; three launches in every plan."""

    chunk: int
    """Keys per program of the score gradient."""
    matrix: bool
    """Products over rows and keys by tl.dot."""
    row_block: int
    pool_block: int
    """Keys per step of the context gradient, and per program of the pool gradient."""
    block_d: int
    pool_block_d: int
    warps: int


def power_of_two(x: int) -> int:
    """The least power of two >= x (x >= 1)."""
    return 1 << (x - 1).bit_length()


def forward_plan(rows: int, pool: int, width: int, k: int) -> ForwardPlan:
    """The plan for B = rows, N = pool, D = width and k."""
    chunk = 256 if pool <= 256 else 2048
    chunks = -(-pool // chunk)
    best = next(size for size in (16, 64, 256, chunk) if size >= min(k, chunk))
    if pool <= FUSED_MAX_POOL and rows <= FUSED_MAX_ROWS:
        padded = max(16, power_of_two(pool))
        return ForwardPlan(True, 128 if padded <= 64 else 64, 16, padded, 1, 0, False, 4, chunk, best, chunks)
    if rows <= VECTOR_MAX_ROWS:
        row_block = power_of_two(rows)
        pool_block, depth_block = {1: (16, 256), 2: (16, 128), 4: (16, 64), 8: (8, 64)}[row_block]
        return ForwardPlan(False, 128, 16, pool_block, row_block, depth_block, False, 4, chunk, best, chunks)
    if rows <= 32:
        return ForwardPlan(False, 128, 16, 32, 16, 64, True, 4, chunk, best, chunks)
    if rows <= 512 or pool <= 1024 or width % 16:
        # Rows that aren't aligned load element by element, and the largest tile would spill.
        return ForwardPlan(False, 128, 16, 64, 64, 16, True, 4, chunk, best, chunks)
    return ForwardPlan(False, 128, 16, 128, 128, 16, True, 8, chunk, best, chunks)


def backward_plan(rows: int) -> BackwardPlan:
    """The plan for B = rows."""
    if rows <= VECTOR_MAX_ROWS:
        row_block = power_of_two(rows)
        return BackwardPlan(512, False, row_block, max(8, 64 // row_block), 64, 128, 4)
    if rows <= 32:
        return BackwardPlan(512, True, 16, 16, 32, 64, 4)
    return BackwardPlan(512, True, 64, 16, 32, 64, 4)
