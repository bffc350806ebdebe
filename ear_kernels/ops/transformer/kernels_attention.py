"""Attention with dropout over a packed query, key and value: forward, and backward into one packed gradient.

Legend: B sequences of L positions, H heads of D features, W = H D. A row of ``qkv [B, L, 3W]`` is what one linear
made: query, key, value, each head after head. Programs take BM queries (or BN keys) of one head and walk over the
other; logits are in units of log2, so that exp2 serves.

Dropout stores no mask. An element (i, j) of a head draws ``r_i c_j + s_i mod 2^32`` from two random numbers r, s of
the query and a fixed odd number c of the key's position, and is dropped if that, as a signed number, is below
``threshold``. Rows are independent of each other, and any two elements of a row are: affine hashing is pairwise
independent. It is one multiply-add, where Philox costs more than the products of matrices.

The second product of a chain takes the matrix that the kernel has computed either transposed as the right operand,
which goes through shared memory, or (SPLIT) as the left operand from registers, for mma.sync with two warps. With
four warps Triton uses WGMMA, and a WGMMA whose left operand comes from registers is miscompiled by ptxas 12.8
(docs/performance.md).

BLOCK_D holds a head's features, or the first 64 of them where there are more (SPLIT): then the other DIM - 64 are in
a block of 16 of their own (names that end in _E). 80 features in one block would be 128, 60 % more work for the
tensor cores. EVEN: no masks of rows; FULL: none of features either. CAUSAL: a query sees the keys up to its own
position; tiles that are wholly above the diagonal are not visited, and every other one is masked.
"""

import triton
import triton.language as tl

BM = tl.constexpr(64)  # queries of a tile
BLOCK_E = tl.constexpr(16)
STAGES = tl.constexpr(3)


@triton.jit
def _rows(base, rows, cols, stride, length, DIM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """``[len(rows), len(cols)]`` of a matrix with ``length`` rows of ``DIM`` columns, zero outside."""
    place = base + rows[:, None] * stride + cols[None, :]
    if EVEN and FULL:
        return tl.load(place)
    if EVEN:
        return tl.load(place, mask=cols[None, :] < DIM, other=0.0)
    return tl.load(place, mask=(rows[:, None] < length) & (cols[None, :] < DIM), other=0.0)


@triton.jit
def _store(place, values, rows, cols, length, DIM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    if EVEN and FULL:
        tl.store(place, values.to(place.dtype.element_ty))
    elif EVEN:
        tl.store(place, values.to(place.dtype.element_ty), mask=cols[None, :] < DIM)
    else:
        inside = (rows[:, None] < length) & (cols[None, :] < DIM)
        tl.store(place, values.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(place, sums, cols, DIM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    if EVEN and FULL:
        tl.store(place, sums)
    else:
        tl.store(place, sums, mask=cols < DIM)


@triton.jit
def _values(base, index, length, outside, EVEN: tl.constexpr):
    """Elements of a vector, ``outside`` past its ``length``."""
    if EVEN:
        return tl.load(base + index)
    return tl.load(base + index, mask=index < length, other=outside)


@triton.jit
def _head(qkv, length, heads, DIM: tl.constexpr):
    """Where the program's head is: (W, 3 W, its sequence's first row, its own first column of W, its query's first
    element, its first element in ``[B H, L]``, B H L)."""
    head = tl.program_id(1)
    width = heads * DIM
    stride = 3 * width
    start = tl.cast(head // heads, tl.int64) * length
    offset = (head % heads) * DIM
    base = qkv + start * stride + offset
    vector = tl.cast(head, tl.int64) * length
    return width, stride, start, offset, base, vector, tl.cast(tl.num_programs(1), tl.int64) * length


@triton.jit
def _keys_end(length, CAUSAL: tl.constexpr):
    """The end of the keys that the program's BM queries see."""
    if CAUSAL:
        return tl.minimum(length, (tl.program_id(0) + 1) * BM)
    return length


@triton.jit
def _column(index):
    """The odd number c of a key's position, a scrambled one so that no three of them are evenly spaced by design."""
    x = (index + 1).to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x85EBCA6B
    return ((x ^ (x >> 13)) | 1).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["threshold"])
def attention_fwd_kernel(
    qkv,  # [B, L, 3W]
    out,  # [B, L, W], out
    lse,  # [B H, L] float32, out: log2 of the sum of a row's exponentials
    draws,  # [2, B H, L] int32: r, s; None without dropout
    length,
    heads,
    scale_log2,  # log2(e) / sqrt(D)
    threshold,  # int32: keep what is at least this
    keep_scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    SPLIT: tl.constexpr = DIM > BLOCK_D
    REST: tl.constexpr = DIM - BLOCK_D
    FULL: tl.constexpr = REST == 0 or REST == BLOCK_E
    width, stride, start, offset, base, vector, total = _head(qkv, length, heads, DIM)
    cols_d = tl.arange(0, BLOCK_D)
    cols_E = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _rows(base, rows, cols_d, stride, length, DIM, EVEN, FULL)
    if SPLIT:
        q_E = _rows(base + BLOCK_D, rows, cols_E, stride, length, REST, EVEN, FULL)
        acc_E = tl.zeros([BM, BLOCK_E], tl.float32)
    if draws is not None:
        r = _values(draws + vector, rows, length, 0, EVEN)
        s = _values(draws + total + vector, rows, length, 0, EVEN)
    top = tl.full([BM], -float("inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_D] if SPLIT else [BLOCK_D, BM], tl.float32)
    for first in tl.range(0, _keys_end(length, CAUSAL), BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        k = _rows(base + width, cols, cols_d, stride, length, DIM, EVEN, FULL)
        logits = tl.dot(q, k.T)
        if SPLIT:
            k_E = _rows(base + width + BLOCK_D, cols, cols_E, stride, length, REST, EVEN, FULL)
            logits = tl.dot(q_E, k_E.T, logits)
        logits *= scale_log2
        if not EVEN:
            logits = tl.where(cols[None, :] < length, logits, -float("inf"))
        if CAUSAL:
            logits = tl.where(cols[None, :] <= rows[:, None], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(logits - higher[:, None])
        norm = norm * shrink + tl.sum(p, 1)
        top = higher
        if draws is not None:
            bits = r[:, None] * _column(cols)[None, :] + s[:, None]
            p = tl.where(bits >= threshold, p, 0.0)
        v = _rows(base + 2 * width, cols, cols_d, stride, length, DIM, EVEN, FULL)
        if SPLIT:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
            # After the block of 64: before it, sm_90 takes 34 registers more.
            v_E = _rows(base + 2 * width + BLOCK_D, cols, cols_E, stride, length, REST, EVEN, FULL)
            acc_E = tl.dot(p.to(v.dtype), v_E, acc_E * shrink[:, None])
        else:
            acc = tl.dot(v.T, p.to(v.dtype).T, acc * shrink[None, :])
    factor = keep_scale / norm
    place = out + (start + rows[:, None]) * width + offset + cols_d[None, :]
    result = acc * factor[:, None] if SPLIT else (acc * factor[None, :]).T
    if SPLIT:
        place_E = out + (start + rows[:, None]) * width + offset + BLOCK_D + cols_E[None, :]
        _store(place_E, acc_E * factor[:, None], rows, cols_E, length, REST, EVEN, FULL)
    _store(place, result, rows, cols_d, length, DIM, EVEN, FULL)
    if EVEN:
        tl.store(lse + vector + rows, top + tl.log2(norm))
    else:
        tl.store(lse + vector + rows, top + tl.log2(norm), mask=rows < length)


@triton.jit(do_not_specialize=["threshold"])
def attention_bwd_query_kernel(
    qkv,  # [B, L, 3W]
    out,  # [B, L, W]
    grad_out,  # [B, L, W]
    lse,  # [B H, L] float32
    draws,  # [2, B H, L] int32, or None
    grad_qkv,  # [B, L, 3W], out: the query's third
    delta,  # [B H, L] float32, out: sum over the features of out * grad_out
    partials,  # [B blocks, 3W] float32, out: its first third, column sums of the query's gradient over a block
    length,
    heads,
    scale_log2,
    threshold,
    keep_scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """``ds = p (dp - delta)``, ``dq = ds k / sqrt(D)`` for BM queries of a head."""
    SPLIT: tl.constexpr = DIM > BLOCK_D
    REST: tl.constexpr = DIM - BLOCK_D
    FULL: tl.constexpr = REST == 0 or REST == BLOCK_E
    width, stride, start, offset, base, vector, total = _head(qkv, length, heads, DIM)
    cols_d = tl.arange(0, BLOCK_D)
    cols_E = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = _rows(base, rows, cols_d, stride, length, DIM, EVEN, FULL)
    g = _rows(grad_out + start * width + offset, rows, cols_d, width, length, DIM, EVEN, FULL)
    y = _rows(out + start * width + offset, rows, cols_d, width, length, DIM, EVEN, FULL)
    d = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    if SPLIT:
        q_E = _rows(base + BLOCK_D, rows, cols_E, stride, length, REST, EVEN, FULL)
        g_E = _rows(grad_out + start * width + offset + BLOCK_D, rows, cols_E, width, length, REST, EVEN, FULL)
        y_E = _rows(out + start * width + offset + BLOCK_D, rows, cols_E, width, length, REST, EVEN, FULL)
        d += tl.sum(g_E.to(tl.float32) * y_E.to(tl.float32), 1)
        acc_E = tl.zeros([BM, BLOCK_E], tl.float32)
    if EVEN:
        tl.store(delta + vector + rows, d)
    else:
        tl.store(delta + vector + rows, d, mask=rows < length)
    log_sum = _values(lse + vector, rows, length, float("inf"), EVEN)
    if draws is not None:
        r = _values(draws + vector, rows, length, 0, EVEN)
        s = _values(draws + total + vector, rows, length, 0, EVEN)
    acc = tl.zeros([BM, BLOCK_D] if SPLIT else [BLOCK_D, BM], tl.float32)
    for first in tl.range(0, _keys_end(length, CAUSAL), BN, num_stages=STAGES):
        cols = first + tl.arange(0, BN)
        k = _rows(base + width, cols, cols_d, stride, length, DIM, EVEN, FULL)
        logits = tl.dot(q, k.T)
        if SPLIT:
            k_E = _rows(base + width + BLOCK_D, cols, cols_E, stride, length, REST, EVEN, FULL)
            logits = tl.dot(q_E, k_E.T, logits)
        p = tl.exp2(logits * scale_log2 - log_sum[:, None])
        if not EVEN:
            p = tl.where(cols[None, :] < length, p, 0.0)
        if CAUSAL:
            p = tl.where(cols[None, :] <= rows[:, None], p, 0.0)
        # Here, not beside k: there sm_80 spills 8 B. sm_90 gets the same code either way.
        v = _rows(base + 2 * width, cols, cols_d, stride, length, DIM, EVEN, FULL)
        dp = tl.dot(g, v.T)
        if SPLIT:
            v_E = _rows(base + 2 * width + BLOCK_D, cols, cols_E, stride, length, REST, EVEN, FULL)
            dp = tl.dot(g_E, v_E.T, dp)
        if draws is not None:
            bits = r[:, None] * _column(cols)[None, :] + s[:, None]
            dp = tl.where(bits >= threshold, dp * keep_scale, 0.0)
        ds = (p * (dp - d[:, None])).to(k.dtype)
        if SPLIT:
            acc_E = tl.dot(ds, k_E, acc_E)
            acc = tl.dot(ds, k, acc)
        else:
            acc = tl.dot(k.T, ds.T, acc)
    acc *= scale_log2 * 0.6931471805599453
    block = tl.cast(tl.program_id(1) // heads, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    total_D = tl.sum(acc, 0 if SPLIT else 1)
    place = grad_qkv + (start + rows[:, None]) * stride + offset + cols_d[None, :]
    result = acc if SPLIT else acc.T
    if SPLIT:
        acc_E *= scale_log2 * 0.6931471805599453
        place_E = grad_qkv + (start + rows[:, None]) * stride + offset + BLOCK_D + cols_E[None, :]
        _store(place_E, acc_E, rows, cols_E, length, REST, EVEN, FULL)
        sums_E = partials + block * stride + offset + BLOCK_D + cols_E
        _store_sums(sums_E, tl.sum(acc_E, 0), cols_E, REST, EVEN, FULL)
    _store(place, result, rows, cols_d, length, DIM, EVEN, FULL)
    _store_sums(partials + block * stride + offset + cols_d, total_D, cols_d, DIM, EVEN, FULL)


@triton.jit(do_not_specialize=["threshold"])
def attention_bwd_key_kernel(
    qkv,  # [B, L, 3W]
    grad_out,  # [B, L, W]
    lse,  # [B H, L] float32
    delta,  # [B H, L] float32
    draws,  # [2, B H, L] int32, or None
    grad_qkv,  # [B, L, 3W], out: the thirds of key and value
    partials,  # [B blocks, 3W] float32, out: the other two, column sums of their gradients over a block
    length,
    heads,
    scale_log2,
    threshold,
    keep_scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """``dv = (dropped p)^T dy`` and ``dk = ds^T q / sqrt(D)`` for BN keys of a head."""
    SPLIT: tl.constexpr = DIM > BLOCK_D
    REST: tl.constexpr = DIM - BLOCK_D
    FULL: tl.constexpr = REST == 0 or REST == BLOCK_E
    width, stride, start, offset, base, vector, total = _head(qkv, length, heads, DIM)
    grads = grad_out + start * width + offset
    cols_d = tl.arange(0, BLOCK_D)
    cols_E = tl.arange(0, BLOCK_E)
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    k = _rows(base + width, keys, cols_d, stride, length, DIM, EVEN, FULL)
    v = _rows(base + 2 * width, keys, cols_d, stride, length, DIM, EVEN, FULL)
    if SPLIT:
        k_E = _rows(base + width + BLOCK_D, keys, cols_E, stride, length, REST, EVEN, FULL)
        v_E = _rows(base + 2 * width + BLOCK_D, keys, cols_E, stride, length, REST, EVEN, FULL)
        grad_k_E = tl.zeros([BN, BLOCK_E], tl.float32)
        grad_v_E = tl.zeros([BN, BLOCK_E], tl.float32)
    if draws is not None:
        c = _column(keys)
    grad_k = tl.zeros([BN, BLOCK_D] if SPLIT else [BLOCK_D, BN], tl.float32)
    grad_v = tl.zeros([BN, BLOCK_D] if SPLIT else [BLOCK_D, BN], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * BN // BM * BM
    for first in tl.range(begin, length, BM, num_stages=STAGES):
        rows = first + tl.arange(0, BM)
        q = _rows(base, rows, cols_d, stride, length, DIM, EVEN, FULL)
        g = _rows(grads, rows, cols_d, width, length, DIM, EVEN, FULL)
        if SPLIT:
            q_E = _rows(base + BLOCK_D, rows, cols_E, stride, length, REST, EVEN, FULL)
            g_E = _rows(grads + BLOCK_D, rows, cols_E, width, length, REST, EVEN, FULL)
        # Rows past the end: p = exp2(-inf) = 0.
        log_sum = _values(lse + vector, rows, length, float("inf"), EVEN)
        d = _values(delta + vector, rows, length, 0.0, EVEN)
        if draws is not None:
            r = _values(draws + vector, rows, length, 0, EVEN)
            s = _values(draws + total + vector, rows, length, 0, EVEN)
        if SPLIT:
            logits = tl.dot(k_E, q_E.T, tl.dot(k, q.T))
            p = tl.exp2(logits * scale_log2 - log_sum[None, :])
            if CAUSAL:
                p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
            dp = tl.dot(v_E, g_E.T, tl.dot(v, g.T))
            dropped = p
            if draws is not None:
                kept = r[None, :] * c[:, None] + s[None, :] >= threshold
                dropped = tl.where(kept, p * keep_scale, 0.0)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            grad_v_E = tl.dot(dropped.to(g.dtype), g_E, grad_v_E)
            grad_v = tl.dot(dropped.to(g.dtype), g, grad_v)
            ds = p * (dp - d[None, :])
            grad_k_E = tl.dot(ds.to(q.dtype), q_E, grad_k_E)
            grad_k = tl.dot(ds.to(q.dtype), q, grad_k)
        else:
            p = tl.exp2(tl.dot(q, k.T) * scale_log2 - log_sum[:, None])
            if CAUSAL:
                p = tl.where(keys[None, :] <= rows[:, None], p, 0.0)
            dp = tl.dot(g, v.T)
            dropped = p
            if draws is not None:
                kept = r[:, None] * c[None, :] + s[:, None] >= threshold
                dropped = tl.where(kept, p * keep_scale, 0.0)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            grad_v = tl.dot(g.T, dropped.to(g.dtype), grad_v)
            ds = p * (dp - d[:, None])
            grad_k = tl.dot(q.T, ds.to(q.dtype), grad_k)
    grad_k *= scale_log2 * 0.6931471805599453
    if not EVEN:
        # Keys past the end have logits of 0; their gradients must not reach the sums.
        inside = keys < length
        grad_k = tl.where(inside[:, None] if SPLIT else inside[None, :], grad_k, 0.0)
        grad_v = tl.where(inside[:, None] if SPLIT else inside[None, :], grad_v, 0.0)
    block = tl.cast(tl.program_id(1) // heads, tl.int64) * tl.num_programs(0) + tl.program_id(0)
    sum_k = tl.sum(grad_k, 0 if SPLIT else 1)
    sum_v = tl.sum(grad_v, 0 if SPLIT else 1)
    sums = partials + block * stride + width + offset + cols_d
    place = grad_qkv + (start + keys[:, None]) * stride + offset + cols_d[None, :]
    result_k = grad_k if SPLIT else grad_k.T
    result_v = grad_v if SPLIT else grad_v.T
    _store(place + width, result_k, keys, cols_d, length, DIM, EVEN, FULL)
    _store(place + 2 * width, result_v, keys, cols_d, length, DIM, EVEN, FULL)
    _store_sums(sums, sum_k, cols_d, DIM, EVEN, FULL)
    _store_sums(sums + width, sum_v, cols_d, DIM, EVEN, FULL)
    if SPLIT:
        grad_k_E *= scale_log2 * 0.6931471805599453
        if not EVEN:
            grad_k_E = tl.where(inside[:, None], grad_k_E, 0.0)
            grad_v_E = tl.where(inside[:, None], grad_v_E, 0.0)
        sums_E = partials + block * stride + width + offset + BLOCK_D + cols_E
        _store_sums(sums_E, tl.sum(grad_k_E, 0), cols_E, REST, EVEN, FULL)
        _store_sums(sums_E + width, tl.sum(grad_v_E, 0), cols_E, REST, EVEN, FULL)
        place_E = grad_qkv + (start + keys[:, None]) * stride + offset + BLOCK_D + cols_E[None, :]
        _store(place_E + width, grad_k_E, keys, cols_E, length, REST, EVEN, FULL)
        _store(place_E + 2 * width, grad_v_E, keys, cols_E, length, REST, EVEN, FULL)
