"""Backward kernels of top-k matching, and their three launches. Formulas: `reference.py`.

_score_gradient (ds for every row and key, and who chose what)  ->  _context_gradient  ->
_pool_gradient_{vector,matrix} (keys and values). Projections need no extra pass, since
u(q_b).(sum_n ds_bn u(K_n)) is sum_n ds_bn s_bn, and likewise for keys.

The gradient of the values is a scatter-add turned round: each program owns places of dV and looks
for the rows that chose them, in row order, so there are no atomics and the bits don't vary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from listen_dist.kernels.topk_match.plan import backward_plan
from listen_dist.kernels.topk_match.triton import _counts, _score, mask_strides

LAUNCHED = ("_score_gradient", "_context_gradient", "_pool_gradient_vector", "_pool_gradient_matrix")
"""Names of the kernels that are launched."""


@triton.jit
def _score_gradient(
    similarity, total, scores, indices, grad_scores, grad_mass, grad_loss, d_similarity, position, B, N, k, chunks,
    grad_scores_sb, grad_scores_sj, grad_mass_sb, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ds_bn = p_bn (G_bn [n in S_b] - A_b) for one chunk of one row, and position_bn = the j for which
    n is the j-th choice, -1 if it is none.

    G_bj = grad_scores_bj + grad_mass_b - grad_loss / B;  A_b = sum_j G_bj p_bj. Absent ones are 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    first = (pid % chunks) * CHUNK
    common = 0.0
    if grad_mass is not None:
        common += tl.load(grad_mass + b * grad_mass_sb)
    if grad_loss is not None:
        common -= tl.load(grad_loss) / B
    weighted = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K).to(tl.int64)
        weighted += _choice_gradient(grad_scores, b, j, k, grad_scores_sb, grad_scores_sj, common) * tl.load(
            scores + b * k + j, mask=j < k, other=0.0
        )
    mean = tl.sum(weighted, 0)

    n = first + tl.arange(0, CHUNK)
    cosine = tl.load(similarity + b * N + n, mask=n < N, other=float("-inf"))
    tl.store(d_similarity + b * N + n, -mean * _score(cosine, tl.load(total + b)), mask=n < N)
    tl.store(position + b * N + n, tl.full([CHUNK], -1, tl.int32), mask=n < N)
    # The chosen places are written over, by other threads than wrote them first.
    tl.debug_barrier()
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K).to(tl.int64)
        index = tl.load(indices + b * k + j, mask=j < k, other=-1)
        here = (index >= first) & (index < first + CHUNK)
        score = tl.load(scores + b * k + j, mask=here, other=0.0)
        gradient = _choice_gradient(grad_scores, b, j, k, grad_scores_sb, grad_scores_sj, common)
        tl.store(d_similarity + b * N + index, score * (gradient - mean), mask=here)
        tl.store(position + b * N + index, j.to(tl.int32), mask=here)


@triton.jit
def _choice_gradient(grad_scores, b, j, k, stride_b, stride_j, common):
    """G_bj at places j."""
    gradient = common + tl.zeros(j.shape, tl.float32)
    if grad_scores is not None:
        gradient += tl.load(grad_scores + b * stride_b + j * stride_j, mask=j < k, other=0.0)
    return gradient


@triton.jit
def _unit_rows(rows, scale):
    """u(x) from x and 1/|x|; zeros for zero (scale 0) and unusable (scale -1) vectors."""
    return tl.where(scale > 0, rows * scale, 0.0)


@triton.jit
def _finite(similarity):
    """s with 0 for the -inf of unusable pairs, whose ds is 0."""
    return tl.where(similarity > float("-inf"), similarity, 0.0)


@triton.jit
def _context_gradient(
    d_similarity, similarity, query, query_scale, keys, key_scale, mask, d_context, B, T, N, D,
    keys_sn, keys_sd, mask_sb, mask_st, LENGTHS: tl.constexpr, MATRIX: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dq_b = (sum_n ds_bn u(K_n) - (sum_n ds_bn s_bn) u(q_b)) / |q_b|, and at once
    dc_bt = dq_b / count_b where t counts, else 0: BLOCK_D columns of BLOCK_B rows."""
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(D, BLOCK_D)
    b = (pid // columns) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = (pid % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    along = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    if MATRIX:
        gradient = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    else:
        gradient = tl.zeros([BLOCK_B, BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=2):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        pair = (b < B)[:, None] & (n < N)[None, :]
        ds = tl.load(d_similarity + b[:, None] * N + n[None, :], mask=pair, other=0.0)
        along += ds * _finite(tl.load(similarity + b[:, None] * N + n[None, :], mask=pair, other=0.0))
        offsets = n[:, None] * keys_sn + d[None, :] * keys_sd
        key = tl.load(keys + offsets, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        key = _unit_rows(key, tl.load(key_scale + n, mask=n < N, other=0.0)[:, None])
        if MATRIX:
            gradient = tl.dot(ds, key, gradient, input_precision="ieee")
        else:
            gradient += ds[:, :, None] * key[None, :, :]
    if not MATRIX:
        gradient = tl.sum(gradient, 1)
    scale = tl.load(query_scale + b, mask=b < B, other=0.0)[:, None]
    inside = (b < B)[:, None] & (d < D)[None, :]
    unit = _unit_rows(tl.load(query + b[:, None] * D + d[None, :], mask=inside, other=0.0), scale)
    gradient = (gradient - tl.sum(along, 1)[:, None] * unit) * tl.maximum(scale, 0.0)

    count = tl.zeros([BLOCK_B, BLOCK_T], tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        count += _row_counts(mask, b, t, B, T, mask_sb, mask_st, LENGTHS).to(tl.int32)
    gradient /= tl.maximum(tl.sum(count, 1), 1).to(tl.float32)[:, None]
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        counts = _row_counts(mask, b, t, B, T, mask_sb, mask_st, LENGTHS)
        place = (b[:, None, None] * T + t[None, :, None]) * D + d[None, None, :]
        tl.store(
            d_context + place,
            tl.where(counts[:, :, None], gradient[:, None, :], 0.0),
            mask=inside[:, None, :] & (t < T)[None, :, None],
        )


@triton.jit
def _row_counts(mask, b, t, B, T, mask_sb, mask_st, LENGTHS: tl.constexpr):
    """Which positions count [BLOCK_B, BLOCK_T]; rows past the batch read row 0."""
    row = tl.where(b < B, b, 0)
    return _counts(mask, row[:, None], t[None, :], T, mask_sb, mask_st, LENGTHS) & (b >= 0)[:, None]


@triton.jit
def _pool_gradient_vector(
    d_similarity, similarity, position, query, query_scale, keys, key_scale, grad_prompts, d_keys, d_values,
    B, N, D, keys_sn, keys_sd, grad_sb, grad_sj, grad_sd, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK_n = (sum_b ds_bn u(q_b) - (sum_b ds_bn s_bn) u(K_n)) / |K_n| and dV_n = sum over the b that
    chose n of grad_prompts: BLOCK_D columns of BLOCK_N keys, row after row. For small batches."""
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(D, BLOCK_D)
    n = (pid // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (pid % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    key_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_N], tl.float32)
    for row in range(0, B):
        b = tl.full([], row, tl.int64)
        if d_keys is not None:
            ds = tl.load(d_similarity + b * N + n, mask=n < N, other=0.0)
            along += ds * _finite(tl.load(similarity + b * N + n, mask=n < N, other=0.0))
            q = tl.load(query + b * D + d, mask=d < D, other=0.0)
            key_gradient += ds[:, None] * _unit_rows(q, tl.load(query_scale + b))[None, :]
        if d_values is not None:
            j = tl.load(position + b * N + n, mask=n < N, other=-1).to(tl.int64)
            place = b * grad_sb + j[:, None] * grad_sj + d[None, :] * grad_sd
            chosen = inside & (j >= 0)[:, None]
            value_gradient += tl.load(grad_prompts + place, mask=chosen, other=0.0).to(tl.float32)
    place = n[:, None] * D + d[None, :]
    if d_keys is not None:
        _store_key_gradient(key_gradient, along, keys, key_scale, d_keys, n, d, N, D, keys_sn, keys_sd)
    if d_values is not None:
        tl.store(d_values + place, value_gradient, mask=inside)


@triton.jit
def _store_key_gradient(gradient, along, keys, key_scale, d_keys, n, d, N, D, keys_sn, keys_sd):
    """dK_n = (gradient_n - along_n u(K_n)) / |K_n|."""
    inside = (n < N)[:, None] & (d < D)[None, :]
    scale = tl.load(key_scale + n, mask=n < N, other=0.0)[:, None]
    key = tl.load(keys + n[:, None] * keys_sn + d[None, :] * keys_sd, mask=inside, other=0.0)
    gradient = (gradient - along[:, None] * _unit_rows(key, scale)) * tl.maximum(scale, 0.0)
    tl.store(d_keys + n[:, None] * D + d[None, :], gradient, mask=inside)


@triton.jit
def _pool_gradient_matrix(
    d_similarity, similarity, position, query, query_scale, keys, key_scale, grad_prompts, d_keys, d_values,
    B, N, D, key_programs, keys_sn, keys_sd, grad_sb, grad_sj, grad_sd,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, VALUES_B: tl.constexpr, VALUES_D: tl.constexpr,
):  # fmt: skip
    """As `_pool_gradient_vector`, for large batches: the first `key_programs` programs take tiles of dK,
    each of the others columns of one dV_n. One launch, so that both fill the device together."""
    pid = tl.program_id(0).to(tl.int64)
    if pid < key_programs:
        if d_keys is not None:
            _key_tile(
                d_similarity, similarity, query, query_scale, keys, key_scale, d_keys, pid, B, N, D,
                keys_sn, keys_sd, BLOCK_B, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        if d_values is not None:
            _value_columns(
                position, grad_prompts, d_values, pid - key_programs, B, N, D,
                grad_sb, grad_sj, grad_sd, VALUES_B, VALUES_D,
            )  # fmt: skip


@triton.jit
def _key_tile(
    d_similarity, similarity, query, query_scale, keys, key_scale, d_keys, pid, B, N, D, keys_sn, keys_sd,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK for BLOCK_N keys and BLOCK_D columns, by tl.dot in full fp32."""
    columns = tl.cdiv(D, BLOCK_D)
    n = (pid // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (pid % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        pair = (n < N)[:, None] & (b < B)[None, :]
        ds = tl.load(d_similarity + b[None, :] * N + n[:, None], mask=pair, other=0.0)  # [BLOCK_N, BLOCK_B]
        along += tl.sum(ds * _finite(tl.load(similarity + b[None, :] * N + n[:, None], mask=pair, other=0.0)), 1)
        q = tl.load(query + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0)
        unit = _unit_rows(q, tl.load(query_scale + b, mask=b < B, other=0.0)[:, None])
        gradient = tl.dot(ds, unit, gradient, input_precision="ieee")
    _store_key_gradient(gradient, along, keys, key_scale, d_keys, n, d, N, D, keys_sn, keys_sd)


@triton.jit
def _value_columns(
    position, grad_prompts, d_values, pid, B, N, D, grad_sb, grad_sj, grad_sd,
    VALUES_B: tl.constexpr, VALUES_D: tl.constexpr,
):  # fmt: skip
    """VALUES_D columns of one dV_n: scans the batch, VALUES_B rows at a time, for those that chose n."""
    columns = tl.cdiv(D, VALUES_D)
    n = pid // columns
    d = (pid % columns) * VALUES_D + tl.arange(0, VALUES_D)
    total = tl.zeros([VALUES_D], tl.float32)
    for start in range(0, B, VALUES_B):
        b = start + tl.arange(0, VALUES_B).to(tl.int64)
        j = tl.load(position + b * N + n, mask=b < B, other=-1).to(tl.int64)
        if tl.max(j, 0) >= 0:
            place = b[:, None] * grad_sb + j[:, None] * grad_sj + d[None, :] * grad_sd
            chosen = (j >= 0)[:, None] & (d < D)[None, :]
            total += tl.sum(tl.load(grad_prompts + place, mask=chosen, other=0.0).to(tl.float32), 0)
    tl.store(d_values + n * D + d, total, mask=d < D)


def match_backward(
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    grad_loss: Tensor | None,
    grad_mass: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    scores: Tensor,
    indices: Tensor,
    query: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    similarity: Tensor,
    total: Tensor,
    length: int,
    context_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward: gradients of context [B, T, D], keys and values [N, D], where needed.

    grad_*: of the outputs, None where nothing reached them; the rest as `triton.Match` has it.
    length: T; needs: whether context, keys and values want theirs.
    """
    rows, pool = similarity.shape
    width, k = query.shape[1], scores.shape[1]
    plan = backward_plan(rows)
    scored = grad_scores is not None or grad_loss is not None or grad_mass is not None
    d_context = query.new_empty(rows, length, width, dtype=context_dtype) if needs[0] and scored else None
    d_keys = query.new_empty(pool, width) if needs[1] and scored else None
    d_values = query.new_empty(pool, width) if needs[2] and grad_prompts is not None else None
    if d_context is None and d_keys is None and d_values is None:
        return None, None, None

    d_similarity = torch.empty_like(similarity)
    position = torch.empty_like(similarity, dtype=torch.int16 if k < 2**15 else torch.int32)
    chunks = triton.cdiv(pool, plan.chunk)
    _score_gradient[(rows * chunks,)](
        similarity, total, scores, indices, grad_scores, grad_mass, grad_loss, d_similarity, position,
        rows, pool, k, chunks, *_strides(grad_scores, 2), *_strides(grad_mass, 1),
        CHUNK=plan.chunk, BLOCK_K=64, num_warps=4,
    )  # fmt: skip
    if d_context is not None:
        _context_gradient[(triton.cdiv(rows, plan.row_block) * triton.cdiv(width, plan.block_d),)](
            d_similarity, similarity, query, query_scale, keys, key_scale, mask, d_context,
            rows, length, pool, width, *keys.stride(), *mask_strides(mask),
            LENGTHS=mask is not None and mask.dim() == 1, MATRIX=plan.matrix,
            BLOCK_B=plan.row_block, BLOCK_N=plan.pool_block, BLOCK_D=plan.block_d,
            BLOCK_T=max(1, 64 // plan.row_block), num_warps=plan.warps,
        )  # fmt: skip
    if d_keys is None and d_values is None:
        return d_context, None, None
    tensors = (d_similarity, similarity, position, query, query_scale, keys, key_scale, grad_prompts, d_keys, d_values)
    strides = (*keys.stride(), *_strides(grad_prompts, 3))
    if not plan.matrix:
        _pool_gradient_vector[(triton.cdiv(pool, 16) * triton.cdiv(width, plan.pool_block_d),)](
            *tensors, rows, pool, width, *strides, BLOCK_N=16, BLOCK_D=plan.pool_block_d, num_warps=plan.warps,
        )  # fmt: skip
        return d_context, d_keys, d_values
    key_programs = 0
    if d_keys is not None:
        key_programs = triton.cdiv(pool, 32) * triton.cdiv(width, plan.pool_block_d)
    value_programs = 0 if d_values is None else pool * triton.cdiv(width, 128)
    _pool_gradient_matrix[(key_programs + value_programs,)](
        *tensors, rows, pool, width, key_programs, *strides,
        BLOCK_B=16, BLOCK_N=32, BLOCK_D=plan.pool_block_d, VALUES_B=32, VALUES_D=128,
        num_warps=plan.warps,
    )  # fmt: skip
    return d_context, d_keys, d_values


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor that may be absent."""
    return (0,) * dims if x is None else x.stride()
