"""Triton kernels of the energy loss: one pass that gives loss and gradients. ``@triton.jit`` functions only.

Legend: R rows of a program, N samples (padded to a power of two), D features (padded), ``u`` a difference of two
points times the root of the feature weights, "power" ``|u|^alpha``, "pull" the gradient of the power with respect to
the difference. Tiles are written ``# [R, N, D]`` beside the line that makes them.
"""

import triton
import triton.language as tl


@triton.jit
def power_of_positive(x, exponent):
    """``x ** exponent`` for x > 0 to about one unit in the last place; ``exponent`` is a float64 scalar.

    ``exp2(exponent * log2(x))`` alone would lose as many bits as the result's exponent has, and the hardware exp2 is
    good to 2 units only. So the exponent of x is taken apart: its product with ``exponent`` is formed exactly (the
    high 12 bits of ``exponent`` times an 8-bit integer), and exp2 is a polynomial. A float32 exponent would not do:
    1e25 ** 1.3 would be off by 10 units.
    """
    if x.dtype == tl.float64:
        result = tl.exp2(exponent * tl.log2(x))
    else:
        tiny = x < 1.1754943508222875e-38
        scaled = tl.where(tiny, x * 16777216.0, x)
        bits = scaled.to(tl.int32, bitcast=True)
        mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # [1, 2)
        binary = (bits >> 23) - tl.where(tiny, 151, 127)
        upper = mantissa > 1.4142135
        mantissa = tl.where(upper, mantissa * 0.5, mantissa)
        binary = tl.where(upper, binary + 1, binary).to(tl.float32)
        high = ((exponent.to(tl.float32).to(tl.int32, bitcast=True) >> 12) << 12).to(tl.float32, bitcast=True)
        low = (exponent - high.to(tl.float64)).to(tl.float32)
        product = high * binary  # exact
        whole = tl.floor(product + 0.5)
        rest = (product - whole) + (low * binary + (high + low) * tl.log2(mantissa))
        more = tl.floor(rest + 0.5)
        rest = (rest - more) * 0.6931471805599453  # natural exponent, at most ln(2) / 2
        series = rest * 1.984126984126984e-4 + 1.388888888888889e-3
        series = series * rest + 8.333333333333333e-3
        series = series * rest + 4.1666666666666664e-2
        series = series * rest + 0.16666666666666666
        series = series * rest + 0.5
        series = series * rest + 1.0
        series = series * rest + 1.0
        # Two factors, because 2**whole alone may lie outside the exponent range of a float.
        steps = tl.minimum(tl.maximum(whole + more, -250.0), 250.0).to(tl.int32)
        half = steps >> 1
        first = ((half + 127) << 23).to(tl.float32, bitcast=True)
        second = ((steps - half + 127) << 23).to(tl.float32, bitcast=True)
        result = series * first * second
    return result


@triton.jit
def inverse_root(x, REFINE: tl.constexpr):
    """``1 / sqrt(x)`` of a normal x > 0; with REFINE one Newton step to about one unit in the last place."""
    root = tl.rsqrt(x)
    if REFINE:
        root = root + 0.5 * root * (1.0 - x * root * root)
    return root


@triton.jit
def scaled_squares(u, eps, HAS_EPS: tl.constexpr):
    """Sum of squares over the last axis after a division by a power of two, so that nothing over- or underflows.

    Returns (squares, scale, 1 / scale), all [R, N], with norm = scale * sqrt(squares). Where the norm is 0 they are
    (1, 0, 1). The powers of two are exact, and 1 / scale is a normal number even for the largest and the denormal u.
    """
    largest = tl.max(tl.abs(u), axis=2)
    if HAS_EPS:
        largest = tl.maximum(largest, eps)
    if u.dtype == tl.float64:
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        exponent = tl.minimum(tl.maximum(exponent, 1), 2045)
        scale = (exponent << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    small = u * inverse[:, :, None]
    squares = tl.sum(small * small, axis=2)
    if HAS_EPS:
        squares += (eps * inverse) * (eps * inverse)
    zero = squares == 0.0
    return tl.where(zero, 1.0, squares), tl.where(zero, 0.0, scale), tl.where(zero, 1.0, inverse)


@triton.jit
def is_in_safe_range(squares):
    """Where a plain sum of squares lost nothing that matters to under- or overflow, nor will |u|^(alpha-2)."""
    if squares.dtype == tl.float64:
        inside = (squares >= 1e-270) & (squares <= 1e270)
    else:
        inside = (squares >= 1e-24) & (squares <= 1e30)
    return inside


@triton.jit
def pair_step(
    u,
    valid,
    careful,
    coefficient,
    alpha,
    eps,
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    REFINE: tl.constexpr,
):
    """Power and pull of one tile of differences ``u [R, N, D]``; 0 where ``valid [R, N]`` is false.

    MODE is 1 or 2 for those alphas, which cost no exp or log, and 0 for any other alpha. SINGLE says that D is 1.
    Without ``careful`` (a scalar) the plain sum of squares is used, and ``outside [R, N]`` marks the pairs for which
    it left the safe range, zero differences among them: the caller then has to do all again with ``careful``.

    Returns (power [R, N], coefficient * pull [R, N, D], outside [R, N]).
    """
    outside = tl.zeros_like(valid)
    if MODE == 2:
        # The power is the sum of squares itself, so where a square overflows so does the loss.
        power = tl.sum(u * u, axis=2)
        if HAS_EPS:
            power += eps * eps
        pull = tl.where(valid, 2.0 * coefficient, 0.0)[:, :, None] * u
    elif SINGLE:
        norm = tl.abs(u)
        # A NaN must stay one: it is neither above nor below 0.
        unit = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
        if HAS_EPS:
            big = tl.maximum(norm, eps)
            ratio = tl.minimum(norm, eps) / big
            length = tl.sqrt(1.0 + ratio * ratio)
            unit = (u / big) / length
            norm = big * length
        if MODE == 1:
            pull = tl.where(valid[:, :, None], coefficient, 0.0) * unit
        else:
            safe = tl.where(norm == 0.0, 1.0, norm)
            norm = tl.where(norm == 0.0, 0.0, power_of_positive(safe, alpha))
            slope = coefficient * alpha.to(u.dtype) * power_of_positive(safe, alpha - 1.0)
            pull = tl.where(valid[:, :, None], slope, 0.0) * unit
        power = tl.sum(norm, axis=2)
    else:
        squares = tl.sum(u * u, axis=2)
        if HAS_EPS:
            squares += eps * eps
        scale = tl.zeros_like(squares) + 1.0
        inverse_scale = scale
        if careful > 0:
            squares, scale, inverse_scale = scaled_squares(u, eps, HAS_EPS)
        else:
            outside = valid & (~is_in_safe_range(squares))
        inverse = inverse_root(squares, REFINE)
        power = (squares * inverse) * scale  # the norm
        if MODE == 1:
            pull = tl.where(valid, (coefficient * inverse) * inverse_scale, 0.0)[:, :, None] * u
        else:
            safe = tl.where(valid & (power > 0.0) & (power < float("inf")), power, 1.0)
            power = tl.where(power == safe, power_of_positive(safe, alpha), power)
            slope = coefficient * alpha.to(u.dtype) * power_of_positive(safe, alpha - 1.0)
            # In this order: slope * inverse_scale may overflow where the pull does not.
            pull = (u * inverse_scale[:, :, None]) * tl.where(valid, slope * inverse, 0.0)[:, :, None]
    return tl.where(valid, power, 0.0), pull, outside


@triton.jit
def row_offset(row, size_1, size_2, stride_0, stride_1, stride_2, ROW_DIMS: tl.constexpr):
    """Element offset (64 bit) of ``row`` in a tensor whose leading dimensions collapse to ROW_DIMS <= 3."""
    if ROW_DIMS == 1:
        offset = row * stride_0
    elif ROW_DIMS == 2:
        offset = (row // size_1) * stride_0 + (row % size_1) * stride_1
    else:
        outer = row // size_2
        offset = (outer // size_1) * stride_0 + (outer % size_1) * stride_1 + (row % size_2) * stride_2
    return offset


@triton.jit
def row_scale(row, in_range, mask_ptr, weight_ptr, denominator_ptr, scale, HAS_MASK, HAS_WEIGHT, HAS_DENOMINATOR):
    """(keep [R], factor [R]): which rows count, and weight over denominator of each; 0 for the others."""
    keep = in_range
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + row, mask=in_range, other=0) != 0)
    factor = scale + tl.zeros_like(row).to(scale.dtype)
    if HAS_WEIGHT:
        factor = factor * tl.load(weight_ptr + row, mask=keep, other=0.0).to(scale.dtype)
    if HAS_DENOMINATOR:
        denominator = tl.load(denominator_ptr).to(scale.dtype)
        factor = factor / tl.where(denominator == 0.0, 1.0, denominator)
    return keep, tl.where(keep, factor, 0.0)


@triton.jit
def accumulate_targets(
    x,
    root,
    y_rows,
    gy_rows,
    feature,
    keep,
    careful,
    in_range,
    factor,
    m,
    features,
    stride_ym,
    stride_yd,
    stride_gym,
    stride_gyd,
    coefficient,
    alpha,
    eps,
    N: tl.constexpr,
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_ROOT: tl.constexpr,
    REFINE: tl.constexpr,
    TARGET_GRADIENT: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pairs of the samples ``x [R, N, D]`` with the row's m targets; writes the gradients of the targets.

    Returns (sum of powers [R, N], gradient [R, N, D] times ``coefficient``, without the row's factor and the second
    root of the feature weights, outside [R, N]). With MANY targets the sums have two levels, of 16 terms each at the
    lower one: a plain running sum over hundreds of targets would lose several bits.
    """
    valid = keep[:, None] & (tl.arange(0, BLOCK_N) < N)[None, :]
    powers = tl.zeros_like(tl.sum(x, axis=2))
    gradient = tl.zeros_like(x)
    powers_part, gradient_part = powers, gradient
    outside = tl.zeros_like(valid)
    y_pointer = y_rows[:, None, None] + (feature * stride_yd)[None, None, :]
    gy_pointer = gy_rows[:, None] + (feature * stride_gyd)[None, :]
    inside_D = feature < features
    for k in range(m):
        y = tl.load(y_pointer, mask=keep[:, None, None] & inside_D[None, None, :], other=0.0).to(x.dtype)
        u = x - y
        if HAS_ROOT:
            u = u * root[None, None, :]
        power, pull, out = pair_step(u, valid, careful, coefficient, alpha, eps, MODE, SINGLE, HAS_EPS, REFINE)
        if MANY:
            powers_part += power
            gradient_part += pull
            if k % 16 == 15:
                powers += powers_part
                gradient += gradient_part
                powers_part = tl.zeros_like(powers)
                gradient_part = tl.zeros_like(gradient)
        else:
            powers += power
            gradient += pull
        outside = outside | out
        if TARGET_GRADIENT:
            gy = tl.sum(pull, axis=1) * -factor[:, None]  # [R, D]
            if HAS_ROOT:
                gy = gy * root[None, :]
            gy = tl.where(keep[:, None], gy, 0.0)
            tl.store(gy_pointer, gy.to(gy_pointer.dtype.element_ty), mask=in_range[:, None] & inside_D[None, :])
            gy_pointer += stride_gym
        y_pointer += stride_ym
    if MANY:
        powers += powers_part
        gradient += gradient_part
    return powers, gradient, outside


@triton.jit
def accumulate_samples(
    x,
    root,
    x_rows,
    feature,
    keep,
    careful,
    features,
    stride_xn,
    stride_xd,
    coefficient,
    alpha,
    eps,
    N: tl.constexpr,
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_ROOT: tl.constexpr,
    REFINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Ordered pairs of the samples ``x [R, N, D]`` of a row; every pair counts twice in the powers.

    The partner of every sample is loaded again (it is in the L1 cache), which keeps the tile free of gathers.
    Returns as :func:`accumulate_targets`.
    """
    sample = tl.arange(0, BLOCK_N)
    powers = tl.zeros_like(tl.sum(x, axis=2))
    gradient = tl.zeros_like(x)
    powers_part, gradient_part = powers, gradient
    partner = x_rows[:, None, None] + (feature * stride_xd)[None, None, :]
    load_mask = keep[:, None, None] & (feature < features)[None, None, :]
    outside = keep[:, None] & (sample < 0)[None, :]
    UNROLL: tl.constexpr = N if N <= 4 else 1
    for j in tl.range(0, N, loop_unroll_factor=UNROLL):
        u = x - tl.load(partner, mask=load_mask, other=0.0).to(x.dtype)
        if HAS_ROOT:
            u = u * root[None, None, :]
        valid = keep[:, None] & ((sample < N) & (sample != j))[None, :]
        power, pull, out = pair_step(u, valid, careful, coefficient, alpha, eps, MODE, SINGLE, HAS_EPS, REFINE)
        if N > 16:
            powers_part += power
            gradient_part += pull
            if j % 16 == 15:
                powers += powers_part
                gradient += gradient_part
                powers_part = tl.zeros_like(powers)
                gradient_part = tl.zeros_like(gradient)
        else:
            powers += power
            gradient += pull
        outside = outside | out
        partner += stride_xn
    if N > 16:
        powers += powers_part
        gradient += gradient_part
    return powers, gradient, outside


@triton.jit
def any_of(flags):
    """True if any of ``flags [R, N]`` is."""
    return tl.max(tl.max(flags.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def energy_rows_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    weight_ptr,
    feature_weight_ptr,
    denominator_ptr,
    loss_ptr,
    gx_ptr,
    gy_ptr,
    rows,
    row_size_1,
    row_size_2,
    m,
    features,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xn,
    stride_xd,
    stride_y0,
    stride_y1,
    stride_y2,
    stride_ym,
    stride_yd,
    stride_gx0,
    stride_gx1,
    stride_gx2,
    stride_gxn,
    stride_gxd,
    stride_gy0,
    stride_gy1,
    stride_gy2,
    stride_gym,
    stride_gyd,
    alpha_: tl.float64,
    eps_: tl.float64,
    target_coefficient_: tl.float64,
    pair_coefficient_: tl.float64,
    scale_: tl.float64,
    N: tl.constexpr,
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_ROOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    REDUCE: tl.constexpr,
    REFINE: tl.constexpr,
    SAMPLE_GRADIENT: tl.constexpr,
    TARGET_GRADIENT: tl.constexpr,
    MANY: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loss and gradients of BLOCK_R rows, each with its N samples, m targets and all its features.

    Writes a partial sum per program (REDUCE) or the weighted loss of every row to ``loss_ptr``, and the gradients of
    the scaled sum to ``gx_ptr`` and ``gy_ptr``. Reads every sample and target once from memory.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    alpha = tl.full([], alpha_, tl.float64)
    eps = tl.full([], eps_, tl.float64).to(dtype)
    target_coefficient = tl.full([], target_coefficient_, tl.float64).to(dtype)
    pair_coefficient = tl.full([], pair_coefficient_, tl.float64).to(dtype)
    scale = tl.full([], scale_, tl.float64).to(dtype)

    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = row < rows
    keep, factor = row_scale(
        row, in_range, mask_ptr, weight_ptr, denominator_ptr, scale, HAS_MASK, HAS_WEIGHT, HAS_DENOMINATOR
    )
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    feature = tl.arange(0, BLOCK_D).to(tl.int64)
    inside_D = feature < features
    inside_ND = (sample < N)[:, None] & inside_D[None, :]
    x_rows = x_ptr + row_offset(row, row_size_1, row_size_2, stride_x0, stride_x1, stride_x2, ROW_DIMS)
    y_rows = y_ptr + row_offset(row, row_size_1, row_size_2, stride_y0, stride_y1, stride_y2, ROW_DIMS)
    gy_rows = gy_ptr + row_offset(row, row_size_1, row_size_2, stride_gy0, stride_gy1, stride_gy2, ROW_DIMS)
    x_offsets = (sample * stride_xn)[:, None] + (feature * stride_xd)[None, :]
    x = tl.load(
        x_rows[:, None, None] + x_offsets[None, :, :],
        mask=keep[:, None, None] & inside_ND[None, :, :],
        other=0.0,
    ).to(dtype)  # [R, N, D]
    root = feature.to(dtype)
    if HAS_ROOT:
        weight = tl.load(feature_weight_ptr + feature, mask=inside_D, other=0.0).to(dtype)
        if DOUBLE:
            root = tl.sqrt(weight)
        else:
            root = tl.sqrt_rn(weight)

    # Zeros of the right shapes: a loop must know the types of what it carries.
    fidelity = tl.zeros_like(tl.sum(x, axis=2))
    diversity = fidelity
    gradient = tl.zeros_like(x)
    careful = 0
    passes = 1
    while careful < passes:
        fidelity, gradient, outside = accumulate_targets(
            x, root, y_rows, gy_rows, feature, keep, careful, in_range, factor, m, features,
            stride_ym, stride_yd, stride_gym, stride_gyd, target_coefficient, alpha, eps,
            N, MODE, SINGLE, HAS_EPS, HAS_ROOT, REFINE, TARGET_GRADIENT, MANY, BLOCK_N,
        )  # fmt: skip
        diversity, repulsion, outside_pairs = accumulate_samples(
            x, root, x_rows, feature, keep, careful, features, stride_xn, stride_xd, pair_coefficient, alpha, eps,
            N, MODE, SINGLE, HAS_EPS, HAS_ROOT, REFINE, BLOCK_N,
        )  # fmt: skip
        gradient -= repulsion
        careful += 1
        if (MODE != 2) and (not SINGLE):
            # One test a program, not one a pair: coincident or extreme points are rare, and then all is redone.
            # The careful pass finds nothing outside, so there are two at most.
            passes = 1 + any_of(outside | outside_pairs).to(tl.int32)

    terms = target_coefficient * fidelity - (0.5 * pair_coefficient) * diversity
    loss = tl.where(keep, tl.sum(terms, axis=1) * factor, 0.0)  # [R]
    if REDUCE:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, axis=0))
    else:
        tl.store(loss_ptr + row, loss, mask=in_range)
    if SAMPLE_GRADIENT:
        gradient = gradient * factor[:, None, None]
        if HAS_ROOT:
            gradient = gradient * root[None, None, :]
        gradient = tl.where(keep[:, None, None], gradient, 0.0)
        gx_rows = gx_ptr + row_offset(row, row_size_1, row_size_2, stride_gx0, stride_gx1, stride_gx2, ROW_DIMS)
        gx_offsets = (sample * stride_gxn)[:, None] + (feature * stride_gxd)[None, :]
        tl.store(
            gx_rows[:, None, None] + gx_offsets[None, :, :],
            gradient.to(gx_ptr.dtype.element_ty),
            mask=in_range[:, None, None] & inside_ND[None, :, :],
        )


@triton.jit
def sum_partials_kernel(partial_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    """Sum ``count`` numbers in a fixed order into one; a single program."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        total += tl.load(partial_ptr + start + offset, mask=start + offset < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0))


@triton.jit
def scale_gradient_kernel(gradient_ptr, factor_ptr, elements, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply ``elements`` contiguous numbers by the scalar at ``factor_ptr``; at 1 it touches nothing."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    factor = tl.load(factor_ptr).to(dtype)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _ in range(tl.cdiv(elements, step)):
            inside = offset < elements
            value = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(dtype) * factor
            tl.store(gradient_ptr + offset, value.to(gradient_ptr.dtype.element_ty), mask=inside)
            offset += step
