"""Device functions of the energy-loss kernels: powers of norms, their gradients, sums over pairs, rows and strides.

Legend: R rows of a program, N samples (padded to a power of two), D features (padded), ``u`` a difference of two
points times the root of the feature weights, "power" ``|u|^alpha``, "pull" the gradient of the power with respect to
the difference. Tiles are written ``# [R, N, D]`` beside the line that makes them.

The kernel score is the same sum with minus a kernel of u in the place of the power. MODE says which: 1 and 2 for the
powers of alpha = 1 and 2, 0 for any other, GAUSSIAN for ``-exp(-|u|^2 / (2 h^2))``, LAPLACE for ``-exp(-|u| / h)``.
The argument ``alpha`` of a kernel is 1 / h.
"""

import triton
import triton.language as tl

GAUSSIAN = tl.constexpr(3)
LAPLACE = tl.constexpr(4)


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
    u, valid, careful, coefficient, alpha, eps,
    MODE: tl.constexpr, SINGLE: tl.constexpr, HAS_EPS: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Power and pull of one tile of differences ``u [R, N, D]``; 0 where ``valid [R, N]`` is false.

    MODE is 1 or 2 for those alphas, which cost no exp or log, 0 for any other alpha, or one of the kernels, which
    have no eps. SINGLE says that D is 1.
    Without ``careful`` (a scalar) the plain sum of squares is used, and ``outside [R, N]`` marks the pairs for which
    it left the safe range, zero differences among them: the caller then has to do all again with ``careful``. With
    MODE 2 and GAUSSIAN there are none: where a square vanishes the Gaussian is 1, and 0 where it overflows.

    Returns (power [R, N], coefficient * pull [R, N, D], outside [R, N]).
    """
    outside = tl.zeros_like(valid)
    if MODE == 2:
        # The power is the sum of squares itself, so where a square overflows so does the loss.
        power = tl.sum(u * u, axis=2)
        if HAS_EPS:
            power += eps * eps
        pull = tl.where(valid, 2.0 * coefficient, 0.0)[:, :, None] * u
    elif MODE == GAUSSIAN:
        rate = alpha.to(u.dtype)
        scaled = u * rate
        value = tl.exp(-0.5 * tl.sum(scaled * scaled, axis=2))
        power = -value
        # In this order: 0 times a scaled difference that has overflowed would be NaN.
        pull = (tl.where(valid, coefficient * value * rate, 0.0)[:, :, None] * u) * rate
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
        elif MODE == LAPLACE:
            rate = alpha.to(u.dtype)
            norm = -tl.exp(-norm * rate)
            pull = tl.where(valid[:, :, None], -coefficient * norm * rate, 0.0) * unit
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
        elif MODE == LAPLACE:
            rate = alpha.to(u.dtype)
            power = -tl.exp(-power * rate)
            slope = -coefficient * power * rate
            pull = (u * inverse_scale[:, :, None]) * tl.where(valid, slope * inverse, 0.0)[:, :, None]
        else:
            safe = tl.where(valid & (power > 0.0) & (power < float("inf")), power, 1.0)
            power = tl.where(power == safe, power_of_positive(safe, alpha), power)
            slope = coefficient * alpha.to(u.dtype) * power_of_positive(safe, alpha - 1.0)
            # In this order: slope * inverse_scale may overflow where the pull does not.
            pull = (u * inverse_scale[:, :, None]) * tl.where(valid, slope * inverse, 0.0)[:, :, None]
    return tl.where(valid, power, 0.0), pull, outside


@triton.jit
def row_offset(row, sizes, strides, ROW_DIMS: tl.constexpr):
    """Element offset (64 bit) of ``row`` in a tensor whose leading dimensions collapse to ROW_DIMS <= 3.

    ``sizes`` and the first of ``strides`` are those of the ROW_DIMS dimensions.
    """
    if ROW_DIMS == 1:
        offset = row * strides[0]
    elif ROW_DIMS == 2:
        offset = (row // sizes[1]) * strides[0] + (row % sizes[1]) * strides[1]
    else:
        outer = row // sizes[2]
        offset = (outer // sizes[1]) * strides[0] + (outer % sizes[1]) * strides[1] + (row % sizes[2]) * strides[2]
    return offset


@triton.jit
def row_scale(row, in_range, mask_ptr, weight_ptr, denominator_ptr, scale):
    """(keep [R], factor [R]): which rows count, and weight over denominator of each; 0 for the others."""
    keep = in_range
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=in_range, other=0) != 0)
    factor = scale + tl.zeros_like(row).to(scale.dtype)
    if weight_ptr is not None:
        factor = factor * tl.load(weight_ptr + row, mask=keep, other=0.0).to(scale.dtype)
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(scale.dtype)
        factor = factor / tl.where(denominator == 0.0, 1.0, denominator)
    return keep, tl.where(keep, factor, 0.0)


@triton.jit
def load_root(feature_weight_ptr, feature, inside, dtype: tl.constexpr):
    """Square root of the feature weights [D] 0 outside."""
    weight = tl.load(feature_weight_ptr + feature, mask=inside, other=0.0)
    if dtype == tl.float64:
        root = tl.sqrt(weight.to(dtype))
    else:
        root = tl.sqrt_rn(weight.to(dtype))
    return root


@triton.jit
def load_samples(x_rows, strides, sample, feature, mask, ROW_DIMS: tl.constexpr, dtype: tl.constexpr):
    """Samples [R, N, D] of the rows that start at ``x_rows [R]``, 0 where ``mask`` is false."""
    offsets = (sample * strides[ROW_DIMS])[:, None] + (feature * strides[ROW_DIMS + 1])[None, :]
    x = tl.load(x_rows[:, None, None] + offsets[None, :, :], mask=mask, other=0.0)
    return x.to(dtype)


@triton.jit
def store_sample_gradient(
    gx_ptr, gradient, factor, root, keep, row, sizes, strides, sample, feature, mask, ROW_DIMS: tl.constexpr
):
    """Write ``gradient [R, N, D]`` of the samples, times the rows' factors and the root of the feature weights."""
    gradient = gradient * factor[:, None, None]
    if root is not None:
        gradient = gradient * root[None, None, :]
    gradient = tl.where(keep[:, None, None], gradient, 0.0)
    rows = gx_ptr + row_offset(row, sizes, strides, ROW_DIMS)
    offsets = (sample * strides[ROW_DIMS])[:, None] + (feature * strides[ROW_DIMS + 1])[None, :]
    tl.store(rows[:, None, None] + offsets[None, :, :], gradient.to(gx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def accumulate_targets(
    x, root, y_rows, gy_rows, feature, keep, careful, in_range, factor, m, features, y_strides, gy_strides,
    coefficient, alpha, eps,
    N: tl.constexpr, MODE: tl.constexpr, SINGLE: tl.constexpr, HAS_EPS: tl.constexpr, REFINE: tl.constexpr,
    MANY: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    y_pointer = y_rows[:, None, None] + (feature * y_strides[ROW_DIMS + 1])[None, None, :]
    if gy_rows is not None:
        gy_pointer = gy_rows[:, None] + (feature * gy_strides[ROW_DIMS + 1])[None, :]
    inside_D = feature < features
    for k in range(m):
        y = tl.load(y_pointer, mask=keep[:, None, None] & inside_D[None, None, :], other=0.0).to(x.dtype)
        u = x - y
        if root is not None:
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
        if gy_rows is not None:
            gy = tl.sum(pull, axis=1) * -factor[:, None]  # [R, D]
            if root is not None:
                gy = gy * root[None, :]
            gy = tl.where(keep[:, None], gy, 0.0)
            tl.store(gy_pointer, gy.to(gy_pointer.dtype.element_ty), mask=in_range[:, None] & inside_D[None, :])
            gy_pointer += gy_strides[ROW_DIMS]
        y_pointer += y_strides[ROW_DIMS]
    if MANY:
        powers += powers_part
        gradient += gradient_part
    return powers, gradient, outside


@triton.jit
def accumulate_samples(
    x, root, x_rows, feature, keep, careful, features, x_strides, coefficient, alpha, eps,
    N: tl.constexpr, MODE: tl.constexpr, SINGLE: tl.constexpr, HAS_EPS: tl.constexpr, REFINE: tl.constexpr,
    ROW_DIMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ordered pairs of the samples ``x [R, N, D]`` of a row; every pair counts twice in the powers.

    The partner of every sample is loaded again (it is in the L1 cache), which keeps the tile free of gathers.
    Returns as :func:`accumulate_targets`.
    """
    sample = tl.arange(0, BLOCK_N)
    powers = tl.zeros_like(tl.sum(x, axis=2))
    gradient = tl.zeros_like(x)
    powers_part, gradient_part = powers, gradient
    partner = x_rows[:, None, None] + (feature * x_strides[ROW_DIMS + 1])[None, None, :]
    load_mask = keep[:, None, None] & (feature < features)[None, None, :]
    outside = keep[:, None] & (sample < 0)[None, :]
    # In float64 the registers are short.
    UNROLL: tl.constexpr = N if N <= 4 and x.dtype != tl.float64 else 1
    for j in tl.range(0, N, loop_unroll_factor=UNROLL):
        u = x - tl.load(partner, mask=load_mask, other=0.0).to(x.dtype)
        if root is not None:
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
        partner += x_strides[ROW_DIMS]
    if N > 16:
        powers += powers_part
        gradient += gradient_part
    return powers, gradient, outside


@triton.jit
def any_of(flags):
    """True if any of ``flags [R, N]`` is."""
    return tl.max(tl.max(flags.to(tl.int32), axis=1), axis=0) > 0
