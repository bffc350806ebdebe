"""Attention without dropout and without anything kept for a backward.

Legend: G sequences, H heads of D features, W = H D; N keys of a sequence and M queries of them. A program takes BM
queries of one head and walks over the keys, BN at a time; logits are in units of log2, so that exp2 serves.

BLOCK_D holds a head's features, or the first 64 of them where there are more (SPLIT): then the other DIM - 64 are in
a block of 16 of their own (names that end in _E). EVEN_M, EVEN_N: no masks of queries and of keys.

The two kernels differ in how the second product gets the probabilities that the program has computed. A WGMMA with a
computed left operand in registers is miscompiled by ptxas 12.8 (docs/performance.md).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_E = tl.constexpr(16)


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


@triton.jit
def _head(query, kv, queries, keys, heads, DIM: tl.constexpr, PACKED: tl.constexpr):
    """Where the program's head is: (its first query and the rows' stride; its first key and value and theirs; its
    first element of the output, whose rows' stride is W)."""
    head = tl.program_id(1)
    width = heads * DIM
    group = tl.cast(head // heads, tl.int64)
    offset = (head % heads) * DIM
    PARTS: tl.constexpr = 3 if PACKED else 2
    stride_q = (3 if PACKED else 1) * width
    base_v = kv + group * keys * (PARTS * width) + (PARTS - 1) * width + offset
    base_q = query + group * queries * stride_q + offset
    return base_q, stride_q, base_v - width, base_v, PARTS * width, group * queries * width + offset


@triton.jit
def _softmax(logits, cols, keys, top, norm, scale_log2, EVEN_N: tl.constexpr):
    """A step of the running softmax: probabilities, what sums before are multiplied by, and the new top and norm."""
    if not EVEN_N:
        logits = tl.where(cols[None, :] < keys, logits, -float("inf"))
    # The scale is a positive number, so the largest logit can be looked for before it.
    higher = tl.maximum(top, tl.max(logits, 1) * scale_log2)
    p = tl.exp2(logits * scale_log2 - higher[:, None])
    shrink = tl.exp2(top - higher)
    return p, shrink, higher, norm * shrink + tl.sum(p, 1)


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
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Probabilities stay in registers, for mma.sync: BM is below 64 or there are two warps at most."""
    if DEPENDENT:
        gdc_wait()
    SPLIT: tl.constexpr = DIM > BLOCK_D
    REST: tl.constexpr = DIM - BLOCK_D
    FIRST: tl.constexpr = BLOCK_D if SPLIT else DIM
    base_q, stride_q, base_k, base_v, stride, offset = _head(query, kv, queries, keys, heads, DIM, PACKED)
    cols_d = tl.arange(0, BLOCK_D)
    cols_E = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _tile(base_q, rows, cols_d, stride_q, queries, FIRST, EVEN_M, BLOCK_D)
    if SPLIT:
        q_E = _tile(base_q + BLOCK_D, rows, cols_E, stride_q, queries, REST, EVEN_M, BLOCK_E)
        acc_E = tl.zeros([BM, BLOCK_E], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    for first in tl.range(0, keys, BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        k = _tile(base_k, cols, cols_d, stride, keys, FIRST, EVEN_N, BLOCK_D)
        logits = tl.dot(q, k.T)
        if SPLIT:
            k_E = _tile(base_k + BLOCK_D, cols, cols_E, stride, keys, REST, EVEN_N, BLOCK_E)
            logits = tl.dot(q_E, k_E.T, logits)
        exact, shrink, top, norm = _softmax(logits, cols, keys, top, norm, scale_log2, EVEN_N)
        v = _tile(base_v, cols, cols_d, stride, keys, FIRST, EVEN_N, BLOCK_D)
        p = exact.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None])
        if SPLIT:
            v_E = _tile(base_v + BLOCK_D, cols, cols_E, stride, keys, REST, EVEN_N, BLOCK_E)
            acc_E = tl.dot(p, v_E, acc_E * shrink[:, None])
    if DEPENDENT:
        # Not before: programs that only wait would take places from this kernel's.
        gdc_launch_dependents()
    factor = 1.0 / norm
    if out_scale is not None:
        factor /= tl.load(out_scale)
    place = out + offset + rows[:, None].to(tl.int64) * (heads * DIM) + cols_d[None, :]
    _put(place, acc * factor[:, None], rows, cols_d, queries, FIRST, EVEN_M, BLOCK_D)
    if SPLIT:
        place = out + offset + BLOCK_D + rows[:, None].to(tl.int64) * (heads * DIM) + cols_E[None, :]
        _put(place, acc_E * factor[:, None], rows, cols_E, queries, REST, EVEN_M, BLOCK_E)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_carried_kernel(
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
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """For WGMMA, four warps, and heads of at most 64 features.

    A tile's probabilities are carried into the next turn of the loop and meet their values there: what a loop
    carries Triton puts into shared memory, and not transposed. Those of the last tile come transposed, as right
    operand, which does the same.
    """
    if DEPENDENT:
        gdc_wait()
    base_q, stride_q, base_k, base_v, stride, offset = _head(query, kv, queries, keys, heads, DIM, PACKED)
    cols_d = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    q = _tile(base_q, rows, cols_d, stride_q, queries, DIM, EVEN_M, BLOCK_D)
    k = _tile(base_k, cols, cols_d, stride, keys, DIM, EVEN_N, BLOCK_D)
    logits = tl.dot(q, k.T)
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    exact, shrink, top, norm = _softmax(logits, cols, keys, top, norm, scale_log2, EVEN_N)
    p = exact.to(q.dtype)
    for first in tl.range(BN, keys, BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        k = _tile(base_k, cols, cols_d, stride, keys, DIM, EVEN_N, BLOCK_D)
        logits = tl.dot(q, k.T)
        # Of the tile before, which is full.
        v = _tile(base_v, cols - BN, cols_d, stride, keys, DIM, True, BLOCK_D)
        acc = tl.dot(p, v, acc)
        exact, shrink, top, norm = _softmax(logits, cols, keys, top, norm, scale_log2, EVEN_N)
        acc *= shrink[:, None]
        p = exact.to(q.dtype)
    if DEPENDENT:
        gdc_launch_dependents()
    cols = (tl.cdiv(keys, BN) - 1) * BN + tl.arange(0, BN)
    v = _tile(base_v, cols, cols_d, stride, keys, DIM, EVEN_N, BLOCK_D)
    acc += tl.dot(v.T, p.T).T
    factor = 1.0 / norm
    if out_scale is not None:
        factor /= tl.load(out_scale)
    place = out + offset + rows[:, None].to(tl.int64) * (heads * DIM) + cols_d[None, :]
    _put(place, acc * factor[:, None], rows, cols_d, queries, DIM, EVEN_M, BLOCK_D)


@triton.jit(do_not_specialize=["length"])
def attention_cached_kernel(
    qkv,  # [G, 3W]: query, key, value of a new row
    cache,  # [2, G, N, W]: keys, values
    place,  # [1] int64: rows that are there before it
    out,  # [G, W], out
    length,  # N
    heads,
    scale_log2,  # log2(e) / sqrt(D)
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One query a program: all is memory, so products are made without tensor cores, in float32."""
    if DEPENDENT:
        gdc_wait()
    group = (tl.program_id(0) // heads).to(tl.int64)
    width = heads * DIM
    cols = (tl.program_id(0) % heads) * DIM + tl.arange(0, BLOCK_D)
    live = tl.arange(0, BLOCK_D) < DIM
    before = tl.load(place).to(tl.int32)
    own = qkv + group * (3 * width) + cols
    q = tl.load(own, mask=live, other=0.0).to(tl.float32) * scale_log2
    k = tl.load(own + width, mask=live, other=0.0)
    v = tl.load(own + 2 * width, mask=live, other=0.0)
    keys = cache + group * length * width + cols
    values = keys + tl.num_programs(0).to(tl.int64) // heads * length * width
    tl.store(keys + before.to(tl.int64) * width, k, mask=live)
    tl.store(values + before.to(tl.int64) * width, v, mask=live)
    top = tl.sum(q * k.to(tl.float32), 0)
    norm = 1.0
    acc = v.to(tl.float32)
    for first in tl.range(0, before, BN, num_stages=STAGES):
        rows = first + tl.arange(0, BN)
        keep = (rows < before)[:, None] & live[None, :]
        at = rows.to(tl.int64)[:, None] * width
        k_N = tl.load(keys[None, :] + at, mask=keep, other=0.0).to(tl.float32)
        v_N = tl.load(values[None, :] + at, mask=keep, other=0.0).to(tl.float32)
        logits = tl.where(rows < before, tl.sum(k_N * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        p = tl.exp2(logits - higher)
        shrink = tl.exp2(top - higher)
        norm = norm * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v_N, 0)
        top = higher
    if DEPENDENT:
        gdc_launch_dependents()
    tl.store(out + group * width + cols, (acc / norm).to(out.dtype.element_ty), mask=live)
