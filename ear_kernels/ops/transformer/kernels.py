"""Dropout + residual + LayerNorm, GELU + dropout, and the packing of attention's gradients, one kernel a direction.

Legend: R rows of width W (V for the MLP's inner width). No dropout mask is stored: forward and backward draw the same
bits from a counter. One Philox call (7 rounds, the fewest that pass BigCrush) gives 128 bits, 16 for each of 8
neighbouring elements; an element is dropped if its 16 bits are below ``threshold`` = round(p 2^16), and the others
are scaled by the inverse of exactly that share.

Every load is cast to float32 at once (see ``ops/adaln/kernels.py``).
"""

import triton
import triton.language as tl


@triton.jit
def _kept(seed, first, threshold, scale, BLOCK: tl.constexpr):
    """``scale`` or 0 for BLOCK neighbouring elements from counter ``first`` on, one counter for 8 of them.

    The 8 elements of a counter are those that one thread holds: nothing goes through shared memory.
    """
    a, b, c, d = tl.randint4x(seed, first + tl.arange(0, BLOCK // 8), n_rounds=7)
    words = tl.interleave(tl.interleave(a, b), tl.interleave(c, d)).to(tl.uint32, bitcast=True)
    # Both halves compared where they are highest, the upper one without a shift.
    limit = tl.cast(threshold, tl.uint32) << 16
    return tl.interleave(tl.where((words << 16) >= limit, scale, 0.0), tl.where(words >= limit, scale, 0.0))


@triton.jit
def _normal(h, FAST: tl.constexpr):
    """Phi(h) and phi(h) of the standard normal distribution.

    FAST is for 16-bit results: Abramowitz and Stegun 7.1.26, an error below 1e-7 with the exponential that phi needs
    anyway, at half the instructions of erf, which would take longer than the memory. The square of rsqrt is a
    reciprocal in two instructions; a division takes nine.
    """
    density = tl.exp2(h * h * -0.7213475204444817)
    if FAST:
        root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(h))
        t = root * root
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = (tail * t + 0.1274147960) * t * density
        cumulative = tl.where(h < 0, tail, 1.0 - tail)
    else:
        cumulative = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return cumulative, density * 0.3989422804014327


@triton.jit
def dropout_add_layer_norm_fwd_kernel(
    branch,  # [R, W], or None: the norm alone
    branch_bias,  # [W], added to branch first, or None
    residual,  # [R, W]
    weight,  # [W]
    bias,  # [W]
    seed,  # [1] int64, or None: no dropout
    x,  # [R, W], out: residual + dropout(branch + branch_bias); None without branch
    out,  # [R, W], out: LN(x)
    mean,  # [R] float32, out, or None
    rstd,  # [R] float32, out
    normed,  # [R, W], out, in the place of mean: (x - mean) rstd
    threshold,
    scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    place = row * WIDTH + cols
    x_W = tl.load(residual + place, mask=live, other=0.0).to(tl.float32)
    if branch is not None:
        y_W = tl.load(branch + place, mask=live, other=0.0).to(tl.float32)
        if branch_bias is not None:
            y_W += tl.load(branch_bias + cols, mask=live, other=0.0).to(tl.float32)
        if seed is not None:
            y_W *= _kept(tl.load(seed), tl.program_id(0) * (BLOCK // 8), threshold, scale, BLOCK)
        # Rounded to the stream's type before the norm: backward sees this stored row.
        stored_W = (x_W + y_W).to(x.dtype.element_ty)
        tl.store(x + place, stored_W, mask=live)
        x_W = stored_W.to(tl.float32)
    mu = tl.sum(x_W, 0) / WIDTH
    centred_W = tl.where(live, x_W - mu, 0.0)
    rs = 1.0 / tl.sqrt(tl.sum(centred_W * centred_W, 0) / WIDTH + eps)
    tl.store(rstd + row, rs)
    if mean is not None:
        tl.store(mean + row, mu)
    else:
        tl.store(normed + place, (centred_W * rs).to(normed.dtype.element_ty), mask=live)
    w_W = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    b_W = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(out + place, (centred_W * rs * w_W + b_W).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "stride_partials"])
def dropout_add_layer_norm_bwd_kernel(
    grad_out,  # [R, W]: gradient of LN(x)
    grad_x,  # [R, W]: gradient that reaches x past the norm; None for 0
    x,  # [R, W], or without mean (x - mean) rstd
    weight,  # [W]
    bias,  # [W], or None with mean
    mean,  # [R] float32, or None
    rstd,  # [R] float32
    seed,  # [1] int64, or None: no dropout
    grad_residual,  # [R, W], out (may be grad_x's memory)
    grad_branch,  # [R, W], out, or None: the norm alone
    recomputed,  # [R, W], out without mean: LN(x), for the weight gradient of what reads it (may be x's memory)
    partials,  # [programs, 3, W] float32, out: sums for weight, bias and branch_bias; without branch [programs, 2, W]
    rows,
    rows_per_program,
    stride_partials,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    w_W = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    if mean is None:
        b_W = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    if seed is not None:
        drawn_from = tl.load(seed)
    sum_weight_W = tl.zeros([BLOCK], tl.float32)
    sum_bias_W = tl.zeros([BLOCK], tl.float32)
    sum_branch_W = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        place = row * WIDTH + cols
        g_W = tl.load(grad_out + place, mask=live, other=0.0).to(tl.float32)
        x_W = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
        rs = tl.load(rstd + row)
        if mean is None:
            n_W = x_W
            tl.store(recomputed + place, (n_W * w_W + b_W).to(recomputed.dtype.element_ty), mask=live)
        else:
            # Not 0 past the end of the row, but what it is multiplied by there is.
            n_W = (x_W - tl.load(mean + row)) * rs
        sum_weight_W += g_W * n_W
        sum_bias_W += g_W
        g_W *= w_W
        average = tl.sum(g_W, 0) / WIDTH
        projection = tl.sum(g_W * n_W, 0) / WIDTH
        dx_W = (g_W - (average + n_W * projection)) * rs
        if grad_x is not None:
            dx_W += tl.load(grad_x + place, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_residual + place, dx_W.to(grad_residual.dtype.element_ty), mask=live)
        if grad_branch is not None:
            if seed is not None:
                dx_W *= _kept(drawn_from, tl.cast(index, tl.int32) * (BLOCK // 8), threshold, scale, BLOCK)
            sum_branch_W += dx_W
            tl.store(grad_branch + place, dx_W.to(grad_branch.dtype.element_ty), mask=live)
    base = partials + program.to(tl.int64) * stride_partials + cols
    tl.store(base, sum_weight_W, mask=live)
    tl.store(base + WIDTH, sum_bias_W, mask=live)
    if grad_branch is not None:
        tl.store(base + 2 * WIDTH, sum_branch_W, mask=live)


@triton.jit
def dropout_add_fwd_kernel(
    branch,  # [R, W]
    branch_bias,  # [W], added to branch first, or None
    x,  # [R, W], in and out: x + dropout(branch + branch_bias)
    seed,  # [1] int64, or None: no dropout
    threshold,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + cols
    y_W = tl.load(branch + place, mask=live, other=0.0).to(tl.float32)
    x_W = tl.load(x + place, mask=live, other=0.0).to(tl.float32)
    if branch_bias is not None:
        y_W += tl.load(branch_bias + cols, mask=live, other=0.0).to(tl.float32)
    if seed is not None:
        y_W *= _kept(tl.load(seed), tl.program_id(0) * (BLOCK // 8), threshold, scale, BLOCK)
    tl.store(x + place, (x_W + y_W).to(x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "stride_partials"])
def dropout_add_bwd_kernel(
    grad,  # [R, W]: gradient of the sum
    seed,  # [1] int64, or None: no dropout
    grad_branch,  # [R, W], out
    partials,  # [programs, W] float32, out: sums for branch_bias
    rows,
    rows_per_program,
    stride_partials,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    if seed is not None:
        drawn_from = tl.load(seed)
    sum_W = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=STAGES):
        place = tl.cast(index, tl.int64) * WIDTH + cols
        g_W = tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
        if seed is not None:
            g_W *= _kept(drawn_from, tl.cast(index, tl.int32) * (BLOCK // 8), threshold, scale, BLOCK)
        sum_W += g_W
        tl.store(grad_branch + place, g_W.to(grad_branch.dtype.element_ty), mask=live)
    tl.store(partials + program.to(tl.int64) * stride_partials + cols, sum_W, mask=live)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def gelu_dropout_fwd_kernel(
    pre,  # [R, V]
    seed,  # [1] int64, or None: no dropout
    out,  # [R, V], out
    rows,
    rows_per_program,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Axis 0 of the grid: rows; axis 1: columns, BLOCK at a time.

    The next row is loaded, into registers, before this one is computed.
    """
    tile = tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    live = cols < WIDTH
    if seed is not None:
        drawn_from = tl.load(seed)
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    next_h = tl.load(pre + tl.cast(begin, tl.int64) * WIDTH + cols, mask=live)
    for index in range(begin, end):
        place = tl.cast(index, tl.int64) * WIDTH + cols
        h = next_h.to(tl.float32)
        next_h = tl.load(pre + WIDTH + place, mask=live & (index + 1 < end))
        cumulative, _ = _normal(h, out.dtype.element_ty != tl.float32)
        y = h * cumulative
        if seed is not None:
            counter = (tl.cast(index, tl.int32) * tl.num_programs(1) + tile) * (BLOCK // 8)
            y *= _kept(drawn_from, counter, threshold, scale, BLOCK)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def gelu_dropout_bwd_kernel(
    grad_out,  # [R, V]
    pre,  # [R, V]
    seed,  # [1] int64, or None: no dropout
    grad_pre,  # [R, V], out (may be grad_out's memory)
    out,  # [R, V], out: forward's result, for the weight gradient of the next linear (may be pre's memory)
    partials,  # [programs, V] float32, out: column sums of grad_pre
    rows,
    rows_per_program,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    live = cols < WIDTH
    if seed is not None:
        drawn_from = tl.load(seed)
    total = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=3):
        place = tl.cast(index, tl.int64) * WIDTH + cols
        g = tl.load(grad_out + place, mask=live, other=0.0).to(tl.float32)
        h = tl.load(pre + place, mask=live, other=0.0).to(tl.float32)
        cumulative, density = _normal(h, out.dtype.element_ty != tl.float32)
        y = h * cumulative
        slope = cumulative + h * density
        if seed is not None:
            counter = (tl.cast(index, tl.int32) * tl.num_programs(1) + tile) * (BLOCK // 8)
            kept = _kept(drawn_from, counter, threshold, scale, BLOCK)
            y *= kept
            g *= kept
        g *= slope
        total += g
        tl.store(out + place, y.to(out.dtype.element_ty), mask=live)
        tl.store(grad_pre + place, g.to(grad_pre.dtype.element_ty), mask=live)
    tl.store(partials + program.to(tl.int64) * WIDTH + cols, total, mask=live)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def pack_heads_kernel(
    query,  # [B, H, L, D], dense in D, the other strides those of all three
    key,
    value,
    out,  # [B, L, 3, H, D], out
    partials,  # [programs, 3 H D] float32, out: column sums
    rows,  # B L
    rows_per_program,
    length,
    stride_batch,
    stride_head,
    stride_row,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Axis 1 of the grid says which of the three."""
    which = tl.program_id(1)
    source = query
    if which == 1:
        source = key
    if which == 2:
        source = value
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    inside = (cols // DIM) * stride_head + cols % DIM
    total = tl.zeros([BLOCK], tl.float32)
    begin = tl.program_id(0) * rows_per_program
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=2):
        row = tl.cast(index, tl.int64)
        start = (row // length) * stride_batch + (row % length) * stride_row
        x = tl.load(source + start + inside, mask=live, other=0.0)
        total += x.to(tl.float32)
        tl.store(out + row * (3 * WIDTH) + which * WIDTH + cols, x, mask=live)
    base = partials + tl.program_id(0).to(tl.int64) * (3 * WIDTH) + which * WIDTH
    tl.store(base + cols, total, mask=live)
