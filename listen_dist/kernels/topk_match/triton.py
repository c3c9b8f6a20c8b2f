"""Forward kernels of top-k matching, and their launches. Formulas: `reference.py`.

Two ways through, chosen by `plan.forward_plan`:

* fused, for the pools of the paper:  _query (mean, partial similarities)  ->  _choose (the rest)
* by tiles, for large pools or batches:  _query  ->  _similarity_{vector,matrix}  ->  _select
  (sorts each chunk of the pool)  ->  _merge (more than one chunk)  ->  _gather

Every program writes places of its own and sums in a fixed order, so the same input gives the same
bits. Offsets are 64 bits wide: B*T*D and N*D pass 2^31 in use. Accumulation is fp32, products
are full fp32 (`input_precision="ieee"`). Grids have one axis, since only that one passes 65,535.

A choice is ordered by one int64 for each key: similarity in the upper half, mapped so that
integers sort as the floats do, and the index upside down in the lower, so that the larger of two
is the better, ties included, and no two are equal. Places past the pool have similarity -inf
and an index of N or more, so that they sort behind every key, unusable ones too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from listen_dist.kernels.topk_match.plan import ForwardPlan, forward_plan
from listen_dist.kernels.topk_match.reference import MIN_NORM_SQUARED

MIN_SQUARED = tl.constexpr(MIN_NORM_SQUARED)
LOWEST = tl.constexpr(-(2**63))
"""Sorts behind every key."""
LOW_HALF = tl.constexpr(2**32 - 1)
LAUNCHED = ("_query", "_choose", "_similarity_vector", "_similarity_matrix", "_select", "_merge", "_gather")
"""Names of the kernels that are launched; the other jitted functions are parts of them."""


class Match(NamedTuple):
    """Results of the forward, and what the backward needs again."""

    prompts: Tensor  # [B, k, D]
    scores: Tensor  # [B, k] fp32
    indices: Tensor  # [B, k] int64
    match_loss: Tensor  # [] fp32
    row_mass: Tensor  # [B] fp32
    query: Tensor  # [B, D] fp32, the masked mean
    query_scale: Tensor  # [B] fp32: 1 / |q|, 0 for a zero query, -1 for an unusable one
    key_scale: Tensor  # [N] fp32, likewise
    similarity: Tensor  # [B, N] fp32
    total: Tensor  # [B] fp32: Z of the softmax


@triton.jit
def _scale(squared):
    """1/|x| from |x|^2; 0 for a zero vector, -1 for one that isn't finite."""
    inverse = tl.where(squared > MIN_SQUARED, 1 / tl.sqrt_rn(tl.maximum(squared, MIN_SQUARED)), 0.0)
    return tl.where(squared < float("inf"), inverse, -1.0)


@triton.jit
def _cosine(dot, query_scale, key_scale):
    """s = q.K / (|q||K|); -inf where either is unusable."""
    usable = (query_scale >= 0) & (key_scale >= 0)
    return tl.where(usable, dot * query_scale * key_scale, float("-inf"))


@triton.jit
def _pack(similarity, n):
    """One int64 a key: larger is better, the lower index wins a tie; -0 counts as 0."""
    bits = tl.where(similarity == 0, 0.0, similarity).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (LOW_HALF - n.to(tl.int64))


@triton.jit
def _unpack(packed):
    """Similarity and index back from `_pack`; index -1 where the key is unusable or missing."""
    ordered = (packed >> 32).to(tl.int32)
    similarity = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    usable = similarity > float("-inf")
    return similarity, tl.where(usable, LOW_HALF - (packed & LOW_HALF), -1)


@triton.jit
def _score(similarity, total):
    """p = exp(s - 1) / Z; 0 where s is -inf, also when that leaves Z at 0."""
    return tl.where(similarity > float("-inf"), tl.exp(similarity - 1) / tl.maximum(total, 1e-37), 0.0)


@triton.jit
def _best(x, LOG_SIZE: tl.constexpr, LOG_BEST: tl.constexpr):
    """The 2^LOG_BEST largest of x [2^LOG_SIZE] int64, largest first: a bitonic sort that, once runs
    are 2^LOG_BEST long, keeps the better half of two runs instead of merging them.

    Triton's own `topk` finds the partner of an element by an xor reduction, which its interpreter
    walks one element at a time; sum minus self wraps round to the same partner.
    """
    h = tl.reshape(x, [2] * LOG_SIZE)
    for stage in tl.static_range(1, LOG_BEST + 1):
        h = _bitonic_merge(h, LOG_SIZE, stage, stage < LOG_SIZE)
    for stage in tl.static_range(LOG_BEST + 1, LOG_SIZE + 1):
        # The size shrinks by one axis a round: LOG_SIZE - (stage - LOG_BEST) axes are left.
        h = tl.max(h, axis=LOG_SIZE - stage)
        h = _bitonic_merge(h, LOG_SIZE - stage + LOG_BEST, LOG_BEST, stage < LOG_SIZE)
    return tl.reshape(h, [2**LOG_BEST])


@triton.jit
def _bitonic_merge(h, DIMS: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr):
    """Sort runs of 2^stage along the last axes: every second one ascending, or all descending."""
    flip = 1
    if alternate:
        flip = _side(DIMS, DIMS - 1 - stage) ^ 1
    for i in tl.static_range(stage):
        other = tl.sum(h, axis=DIMS - stage + i, keep_dims=True) - h
        h = tl.where((h > other) != ((flip ^ _side(DIMS, DIMS - stage + i)) != 0), other, h)
    return h


@triton.jit
def _side(DIMS: tl.constexpr, axis: tl.constexpr):
    """0 and 1 along one axis of a hypercube, shaped to broadcast against it."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (DIMS - 1 - axis))


@triton.jit
def _counts(mask, b, t, T, mask_sb, mask_st, LENGTHS: tl.constexpr):
    """Which positions t of row(s) b count: all, those of a bool mask, or the first lengths[b]."""
    inside = t < T
    if mask is not None:
        if LENGTHS:
            inside = inside & (t < tl.load(mask + b * mask_sb))
        else:
            inside = inside & (tl.load(mask + b * mask_sb + t * mask_st, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _finish_loss(row_mass, match_loss, ticket, B, BLOCK: tl.constexpr):
    """match_loss = -mean_b m_b, by whichever of B programs comes last; summed in row order.

    The ticket starts at 0 (`_query` sets it) and counts programs whose row mass is stored.
    """
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == B - 1:
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B, BLOCK):
            b = start + tl.arange(0, BLOCK)
            mass += tl.load(row_mass + b, mask=b < B, other=0.0, volatile=True)
        tl.store(match_loss, -tl.sum(mass, 0) / B)


@triton.jit
def _query(
    context, mask, keys, query, partial, ticket, T, N, D,
    context_sb, context_st, context_sd, mask_sb, mask_st, keys_sn, keys_sd,
    LENGTHS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q_b = sum_t c_bt / count_b over the t that count: BLOCK_D columns of one row.

    With `partial` [B, D blocks, 3, BLOCK_N], also this slice's share of q_b.K_n, |K_n|^2 and
    |q_b|^2 (the last repeated along n).
    """
    slices = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    d = (pid % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    if pid == 0:
        tl.store(ticket, 0)
    inside = d < D
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for start in tl.range(0, T, BLOCK_T, num_stages=3):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        counts = _counts(mask, b, t, T, mask_sb, mask_st, LENGTHS)
        offsets = b * context_sb + t[:, None] * context_st + d[None, :] * context_sd
        total += tl.load(context + offsets, mask=counts[:, None] & inside[None, :], other=0.0).to(tl.float32)
        count += counts.to(tl.int32)
    q = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(query + b * D + d, q, mask=inside)
    if partial is not None:
        n = tl.arange(0, BLOCK_N)
        offsets = n[:, None].to(tl.int64) * keys_sn + d[None, :] * keys_sd
        key = tl.load(keys + offsets, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        base = partial + pid * 3 * BLOCK_N + n
        tl.store(base, tl.sum(key * q[None, :], 1))
        tl.store(base + BLOCK_N, tl.sum(key * key, 1))
        tl.store(base + 2 * BLOCK_N, tl.sum(q * q, 0) + tl.zeros([BLOCK_N], tl.float32))


@triton.jit
def _choose(
    partial, values, prompts, scores, indices, match_loss, row_mass, query_scale, key_scale,
    similarity, total, ticket, B, N, D, k, slices, values_sn, values_sd, prompts_sb, prompts_sj, prompts_sd,
    BLOCK_N: tl.constexpr, LOG_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """From partial similarities to everything: s, Z, S_b, p, m_b, and BLOCK_D columns of the prompts.

    The programs of a row repeat the choice (a sort of BLOCK_N) and share the gather by columns;
    the first of them writes what isn't a prompt.
    """
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(D, BLOCK_D)
    b = pid // columns
    n = tl.arange(0, BLOCK_N)
    dot = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    key_squared = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    query_squared = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in range(0, slices, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        base = partial + (b * slices + s[:, None]) * 3 * BLOCK_N + n[None, :]
        dot += tl.load(base, mask=(s < slices)[:, None], other=0.0)
        key_squared += tl.load(base + BLOCK_N, mask=(s < slices)[:, None], other=0.0)
        query_squared += tl.load(base + 2 * BLOCK_N, mask=(s < slices)[:, None], other=0.0)
    q_scale = _scale(tl.sum(query_squared, 0))  # [BLOCK_N], all equal
    k_scale = _scale(tl.sum(key_squared, 0))
    cosine = tl.where(n < N, _cosine(tl.sum(dot, 0), q_scale, k_scale), float("-inf"))
    z = tl.sum(tl.exp(cosine - 1), 0)

    best = _best(_pack(cosine, n), LOG_N, LOG_N)
    best_cosine, index = _unpack(best)
    score = tl.where(n < k, _score(best_cosine, z), 0.0)
    d = (pid % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    written = (n < k)[:, None] & (d < D)[None, :]
    rows = tl.load(
        values + index[:, None] * values_sn + d[None, :] * values_sd,
        mask=written & (index >= 0)[:, None], other=0.0,
    )  # fmt: skip
    place = b * prompts_sb + n[:, None].to(tl.int64) * prompts_sj + d[None, :] * prompts_sd
    tl.store(prompts + place, rows, mask=written)
    if pid % columns == 0:
        tl.store(scores + b * k + n, score, mask=n < k)
        tl.store(indices + b * k + n, index, mask=n < k)
        tl.store(similarity + b * N + n, cosine, mask=n < N)
        tl.store(total + b, z)
        tl.store(query_scale + b, tl.max(q_scale, 0))
        tl.store(key_scale + n, k_scale, mask=(n < N) & (b == 0))
        tl.store(row_mass + b, tl.sum(score, 0))
        _finish_loss(row_mass, match_loss, ticket, B, 256)


@triton.jit
def _similarity_vector(
    query, keys, similarity, query_scale, key_scale, B, N, D, keys_sn, keys_sd,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s_bn for all rows (B <= BLOCK_B) and BLOCK_N keys: each key is read once, by vector units."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_B).to(tl.int64)
    dot = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_D], tl.float32)
    key_squared = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
    query_squared = tl.zeros([BLOCK_B, 1, BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=3):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (d < D)[None, None, :]
        q = tl.load(query + b[:, None, None] * D + d[None, None, :], mask=(b < B)[:, None, None] & inside, other=0.0)
        offsets = n[None, :, None] * keys_sn + d[None, None, :] * keys_sd
        key = tl.load(keys + offsets, mask=(n < N)[None, :, None] & inside, other=0.0)
        dot += q * key
        key_squared += key * key
        query_squared += q * q
    k_scale = _scale(tl.sum(key_squared, 2))  # [1, BLOCK_N]
    q_scale = _scale(tl.sum(query_squared, 2))  # [BLOCK_B, 1]
    cosine = _cosine(tl.sum(dot, 2), q_scale, k_scale)
    inside = (b < B)[:, None] & (n < N)[None, :]
    tl.store(similarity + b[:, None] * N + n[None, :], cosine, mask=inside)
    tl.store(key_scale + n[None, :], k_scale, mask=(n < N)[None, :])
    tl.store(query_scale + b[:, None], q_scale, mask=(b < B)[:, None] & (tl.program_id(0) == 0))


@triton.jit
def _similarity_matrix(
    query, keys, similarity, query_scale, key_scale, B, N, D, keys_sn, keys_sd,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s_bn for a tile of rows and keys, by tl.dot in full fp32."""
    pid = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(B, BLOCK_B)
    b = (pid % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    dot = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    key_squared = tl.zeros([BLOCK_N], tl.float32)
    query_squared = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        q = tl.load(query + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0)
        offsets = n[None, :] * keys_sn + d[:, None] * keys_sd
        key = tl.load(keys + offsets, mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)  # [BLOCK_D, BLOCK_N]
        dot = tl.dot(q, key, dot, input_precision="ieee")
        key_squared += tl.sum(key * key, 0)
        query_squared += tl.sum(q * q, 1)
    k_scale = _scale(key_squared)
    q_scale = _scale(query_squared)
    cosine = _cosine(dot, q_scale[:, None], k_scale[None, :])
    inside = (b < B)[:, None] & (n < N)[None, :]
    tl.store(similarity + b[:, None] * N + n[None, :], cosine, mask=inside)
    tl.store(key_scale + n, k_scale, mask=(n < N) & (pid % row_blocks == 0))
    tl.store(query_scale + b, q_scale, mask=(b < B) & (pid // row_blocks == 0))


@triton.jit
def _select(
    similarity, scores, indices, total, candidates, N, k, chunks,
    CHUNK: tl.constexpr, LOG_CHUNK: tl.constexpr, BEST: tl.constexpr, LOG_BEST: tl.constexpr,
):  # fmt: skip
    """The best of one chunk of one row, sorted, and the chunk's share of Z.

    With `candidates` [B, chunks, BEST] both go to the merge (total is then [B, chunks]);
    without, the chunk is the whole pool and scores and indices are final.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    n = (pid % chunks) * CHUNK + tl.arange(0, CHUNK)
    cosine = tl.load(similarity + b * N + n, mask=n < N, other=float("-inf"))
    z = tl.sum(tl.exp(cosine - 1), 0)
    tl.store(total + pid, z)
    best = _best(_pack(cosine, n), LOG_CHUNK, LOG_BEST)
    j = tl.arange(0, BEST)
    if candidates is not None:
        tl.store(candidates + pid * BEST + j, best)
    else:
        best_cosine, index = _unpack(best)
        tl.store(scores + b * k + j, _score(best_cosine, z), mask=j < k)
        tl.store(indices + b * k + j, index, mask=j < k)


@triton.jit
def _merge(
    candidates, chunk_total, scores, indices, total, k, chunks,
    BEST: tl.constexpr, LOG_BEST: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Places of one chunk's candidates among all: rank = number of candidates that are larger.

    In the chunk itself that is the place in its list, in another sorted list a binary search. Works
    for any k up to N, without atomics, since every rank belongs to one candidate.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    own = pid % chunks
    z = tl.zeros([BLOCK_CHUNKS], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        c = start + tl.arange(0, BLOCK_CHUNKS)
        z += tl.load(chunk_total + b * chunks + c, mask=c < chunks, other=0.0)
    z = tl.sum(z, 0)
    j = tl.arange(0, BEST)
    packed = tl.load(candidates + pid * BEST + j)
    rank = j
    for other in range(0, chunks):
        if other != own:
            list_start = candidates + (b * chunks + other) * BEST
            larger = tl.zeros([BEST], tl.int32)
            for i in tl.static_range(LOG_BEST + 1):
                reach = larger + (BEST >> i)
                probe = tl.load(list_start + reach - 1, mask=reach <= BEST, other=LOWEST)
                larger = tl.where(probe > packed, reach, larger)
            rank += larger
    cosine, index = _unpack(packed)
    kept = rank < k
    tl.store(scores + b * k + rank, _score(cosine, z), mask=kept)
    tl.store(indices + b * k + rank, index, mask=kept)
    if own == 0:
        tl.store(total + b, z)


@triton.jit
def _gather(
    values, scores, indices, prompts, row_mass, match_loss, ticket, B, D, k,
    values_sn, values_sd, prompts_sb, prompts_sj, prompts_sd,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """prompts_bj = V_n for one (b, j); the program of j = 0 also sums m_b."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // k
    j = pid % k
    index = tl.load(indices + pid)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        row = tl.load(values + index * values_sn + d * values_sd, mask=(d < D) & (index >= 0), other=0.0)
        tl.store(prompts + b * prompts_sb + j * prompts_sj + d * prompts_sd, row, mask=d < D)
    if j == 0:
        mass = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, k, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            mass += tl.load(scores + b * k + place, mask=place < k, other=0.0)
        tl.store(row_mass + b, tl.sum(mass, 0))
        _finish_loss(row_mass, match_loss, ticket, B, 256)


def match_forward(
    context: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor, k: int, out: Tensor | None = None
) -> Match:
    """Launch the forward. Arguments as `op.topk_match` has checked them.

    out: [B, >= k, D], whose first k rows take the prompts; None allocates [B, k, D] like the values.
    Nothing waits for the device and every shape follows from the arguments.
    """
    rows, length, width = context.shape
    pool = keys.shape[0]
    plan = forward_plan(rows, pool, width, k)
    # The keys are fp32, and so is all that is made like them.
    match = Match(
        prompts=values.new_empty(rows, k, width) if out is None else out[:, :k],
        scores=keys.new_empty(rows, k),
        indices=keys.new_empty(rows, k, dtype=torch.int64),
        match_loss=keys.new_empty(()),
        row_mass=keys.new_empty(rows),
        query=keys.new_empty(rows, width),
        query_scale=keys.new_empty(rows),
        key_scale=keys.new_empty(pool),
        similarity=keys.new_empty(rows, pool),
        total=keys.new_empty(rows),
    )
    ticket = keys.new_empty((), dtype=torch.int32)
    slices = triton.cdiv(width, plan.block_d)
    partial = keys.new_empty(rows, slices, 3, plan.pool_block) if plan.fused else None
    _query[(rows * slices,)](
        context, mask, keys, match.query, partial, ticket, length, pool, width,
        *context.stride(), *mask_strides(mask), *keys.stride(),
        LENGTHS=mask is not None and mask.dim() == 1,
        BLOCK_T=plan.block_t, BLOCK_D=plan.block_d, BLOCK_N=plan.pool_block if plan.fused else 1,
        num_warps=4,
    )  # fmt: skip
    if not plan.fused:
        _launch_tiles(plan, match, keys, values, k, ticket)
        return match
    _choose[(rows * slices,)](
        partial, values, match.prompts, match.scores, match.indices, match.match_loss, match.row_mass,
        match.query_scale, match.key_scale, match.similarity, match.total, ticket, rows, pool, width, k, slices,
        *values.stride(), *match.prompts.stride(),
        BLOCK_N=plan.pool_block, LOG_N=plan.pool_block.bit_length() - 1,
        BLOCK_D=plan.block_d, BLOCK_S=8, num_warps=plan.warps,
    )  # fmt: skip
    return match


def _launch_tiles(plan: ForwardPlan, match: Match, keys: Tensor, values: Tensor, k: int, ticket: Tensor) -> None:
    """Everything behind `_query` on the way by tiles."""
    rows, width = match.query.shape
    pool = keys.shape[0]
    similarity = _similarity_matrix if plan.matrix else _similarity_vector
    similarity[(triton.cdiv(rows, plan.row_block) * triton.cdiv(pool, plan.pool_block),)](
        match.query, keys, match.similarity, match.query_scale, match.key_scale, rows, pool, width, *keys.stride(),
        BLOCK_B=plan.row_block, BLOCK_N=plan.pool_block, BLOCK_D=plan.depth_block, num_warps=plan.warps,
    )  # fmt: skip
    single = plan.chunks == 1
    candidates = None if single else keys.new_empty(rows, plan.chunks, plan.best, dtype=torch.int64)
    chunk_total = match.total if single else keys.new_empty(rows, plan.chunks)
    _select[(rows * plan.chunks,)](
        match.similarity, match.scores, match.indices, chunk_total, candidates, pool, k, plan.chunks,
        CHUNK=plan.chunk, LOG_CHUNK=plan.chunk.bit_length() - 1,
        BEST=plan.best, LOG_BEST=plan.best.bit_length() - 1, num_warps=4 if plan.chunk == 256 else 8,
    )  # fmt: skip
    if not single:
        _merge[(rows * plan.chunks,)](
            candidates, chunk_total, match.scores, match.indices, match.total, k, plan.chunks,
            BEST=plan.best, LOG_BEST=plan.best.bit_length() - 1, BLOCK_CHUNKS=32,
            num_warps=4 if plan.best <= 256 else 16,
        )  # fmt: skip
    _gather[(rows * k,)](
        values, match.scores, match.indices, match.prompts, match.row_mass, match.match_loss, ticket,
        rows, width, k, *values.stride(), *match.prompts.stride(), BLOCK_D=1024, BLOCK_K=256, num_warps=4,
    )  # fmt: skip


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Strides (row, position) of a [B, T] mask or of [B] lengths; zeros for none."""
    if mask is None:
        return 0, 0
    return (mask.stride(0), mask.stride(1) if mask.dim() == 2 else 0)
