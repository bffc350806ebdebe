"""Attention without dropout and without anything kept for a backward.

Legend: G sequences, H heads of D features, W = H D; N keys of a sequence and M queries of them. A program takes BM
queries of one head and walks over the keys, BN at a time; logits are in units of log2, so that exp2 serves.

FORM says how the second product gets the probabilities that the kernel has computed:
- DIRECT: as left operand, from registers. For mma.sync: at most two warps, or fewer than 64 queries. A WGMMA with
  such an operand is miscompiled by ptxas 12.8 (docs/performance.md).
- TRANSPOSED: transposed, as right operand, through shared memory.
- SWAPPED: logits are computed as ``[BN, BM]``, keys in the rows of the tensor cores' tiles: for few queries.

BLOCK_D holds a head's features, or in the form DIRECT the first 64 of them where there are more (SPLIT): then the
other DIM - 64 are in a block of 16 of their own (names that end in _E).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_E = tl.constexpr(16)
DIRECT = tl.constexpr(0)
TRANSPOSED = tl.constexpr(1)
SWAPPED = tl.constexpr(2)


@triton.jit
def _tile(base, rows, cols, stride, length, DIM: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """``[len(rows), BLOCK]`` of a matrix with ``length`` rows of ``DIM`` columns, zero outside."""
    place = base + rows[:, None] * stride + cols[None, :]
    if EVEN and DIM == BLOCK:
        return tl.load(place)
    if EVEN:
        return tl.load(place, mask=cols[None, :] < DIM, other=0.0)
    if DIM == BLOCK:
        return tl.load(place, mask=rows[:, None] < length, other=0.0)
    return tl.load(place, mask=(rows[:, None] < length) & (cols[None, :] < DIM), other=0.0)


@triton.jit
def _put(place, values, rows, cols, length, DIM: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    values = values.to(place.dtype.element_ty)
    if EVEN and DIM == BLOCK:
        tl.store(place, values)
    else:
        tl.store(place, values, mask=(rows[:, None] < length) & (cols[None, :] < DIM))


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_kernel(
    query,  # [G, M, W], or PACKED [G, N, 3W]: query, key, value
    kv,  # [G, N, 2W]: key, value; PACKED the same as query
    out_scale,  # [1] float32, or None: out is e4m3, of values divided by it
    out,  # [G, M, W], out
    queries,
    keys,
    heads,
    scale_log2,  # log2(e) / sqrt(D)
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PACKED: tl.constexpr,
    FORM: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """EVEN_M, EVEN_N: no masks of queries and of keys."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    SPLIT: tl.constexpr = DIM > BLOCK_D
    REST: tl.constexpr = DIM - BLOCK_D
    FIRST: tl.constexpr = BLOCK_D if SPLIT else DIM
    head = tl.program_id(1)
    width = heads * DIM
    group = tl.cast(head // heads, tl.int64)
    offset = (head % heads) * DIM
    if PACKED:
        stride_q = 3 * width
        stride = 3 * width
        base = kv + group * keys * stride + offset + width
    else:
        stride_q = width
        stride = 2 * width
        base = kv + group * keys * stride + offset
    base_q = query + group * queries * stride_q + offset
    cols_d = tl.arange(0, BLOCK_D)
    cols_E = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _tile(base_q, rows, cols_d, stride_q, queries, FIRST, EVEN_M, BLOCK_D)
    if SPLIT:
        q_E = _tile(base_q + BLOCK_D, rows, cols_E, stride_q, queries, REST, EVEN_M, BLOCK_E)
        acc_E = tl.zeros([BM, BLOCK_E], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D] if FORM == DIRECT else [BLOCK_D, BM], tl.float32)
    for first in tl.range(0, keys, BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        k = _tile(base, cols, cols_d, stride, keys, FIRST, EVEN_N, BLOCK_D)
        v = _tile(base + width, cols, cols_d, stride, keys, FIRST, EVEN_N, BLOCK_D)
        if FORM == SWAPPED:
            logits = tl.dot(k, q.T)
            if not EVEN_N:
                logits = tl.where(cols[:, None] < keys, logits, -float("inf"))
            higher = tl.maximum(top, tl.max(logits, 0) * scale_log2)
            p = tl.exp2(logits * scale_log2 - higher[None, :])
            shrink = tl.exp2(top - higher)
            norm = norm * shrink + tl.sum(p, 0)
            acc = tl.dot(v.T, p.to(v.dtype), acc * shrink[None, :])
        else:
            logits = tl.dot(q, k.T)
            if SPLIT:
                k_E = _tile(base + BLOCK_D, cols, cols_E, stride, keys, REST, EVEN_N, BLOCK_E)
                logits = tl.dot(q_E, k_E.T, logits)
            if not EVEN_N:
                logits = tl.where(cols[None, :] < keys, logits, -float("inf"))
            # The scale is a positive number, so the largest logit can be looked for before it.
            higher = tl.maximum(top, tl.max(logits, 1) * scale_log2)
            p = tl.exp2(logits * scale_log2 - higher[:, None])
            shrink = tl.exp2(top - higher)
            norm = norm * shrink + tl.sum(p, 1)
            p = p.to(v.dtype)
            if FORM == DIRECT:
                acc = tl.dot(p, v, acc * shrink[:, None])
            else:
                acc = tl.dot(v.T, p.T, acc * shrink[None, :])
            if SPLIT:
                v_E = _tile(base + width + BLOCK_D, cols, cols_E, stride, keys, REST, EVEN_N, BLOCK_E)
                acc_E = tl.dot(p, v_E, acc_E * shrink[:, None])
        top = higher
    factor = 1.0 / norm
    if out_scale is not None:
        factor /= tl.load(out_scale)
    place = out + (group * queries + rows[:, None]) * width + offset
    if FORM == DIRECT:
        result = acc * factor[:, None]
    else:
        result = (acc * factor[None, :]).T
    _put(place + cols_d[None, :], result, rows, cols_d, queries, FIRST, EVEN_M, BLOCK_D)
    if SPLIT:
        _put(place + BLOCK_D + cols_E[None, :], acc_E * factor[:, None], rows, cols_E, queries, REST, EVEN_M, BLOCK_E)
