"""The energy loss against Gaussian targets that are drawn inside the kernel and never touch memory (CALM's case).

Normal numbers come from Philox4x32 (Salmon et al. 2011) by Box and Muller's transform, four per call. The counter is
(feature, row, group of four targets), the key is the 64-bit seed, so the draws depend neither on the launch
configuration nor on the order of the programs, and a redo of a tile sees the same targets.

Legend as in kernels_pairs.py.
"""

import triton
import triton.language as tl

from ear_kernels.ops.energy_loss.kernels_pairs import (
    accumulate_samples,
    any_of,
    inverse_root,
    is_in_safe_range,
    load_root,
    load_samples,
    pair_step,
    row_offset,
    row_scale,
    store_sample_gradient,
)


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two independent standard normals (float32) from two uniform uint32.

    The radius uses all 32 bits (tails to 6.7 sigma). The angle is built from a fraction of a quarter turn around 0,
    a random sign of the cosine and a random exchange of the two: the four quarters, without a range reduction.
    """
    uniform = radius_bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (0, 1]
    radius = tl.sqrt(-2.0 * tl.log(tl.minimum(uniform, 1.0)))
    fraction = (((angle_bits >> 7) & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    angle = fraction * 1.5707963267948966  # [-pi/4, pi/4)
    square = angle * angle
    sine = square * 2.7557319e-6 - 1.9841270e-4
    sine = sine * square + 8.3333333e-3
    sine = sine * square - 0.16666667
    sine = (sine * square) * angle + angle
    cosine = square * 2.4801587e-5 - 1.3888889e-3
    cosine = cosine * square + 4.1666668e-2
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    sign = angle_bits & 0x80000000
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    swap = (angle_bits & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def four_normals(seed, row, feature, group, ROUNDS: tl.constexpr):
    """Normals [R, D] of the targets 4 group .. 4 group + 3 for rows ``row [R]`` and features ``feature [D]``."""
    zeros = tl.zeros_like(row)[:, None] + tl.zeros_like(feature)[None, :]
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zeros.to(tl.uint32)
    high = (row >> 32).to(tl.uint32)[:, None] + zeros.to(tl.uint32)
    index = feature.to(tl.uint32)[None, :] + zeros.to(tl.uint32)
    groups = zeros.to(tl.uint32) + group
    a, b, c, d = tl.philox(seed, index, low, groups, high, ROUNDS)
    first, second = box_muller(a, b)
    third, fourth = box_muller(c, d)
    return first, second, third, fourth


@triton.jit
def accumulate_draws(
    x, root, mean, deviation, seed, row, feature, keep, careful, m, coefficient, alpha, eps,
    N: tl.constexpr, MODE: tl.constexpr, SINGLE: tl.constexpr, HAS_EPS: tl.constexpr, REFINE: tl.constexpr,
    PARAMETER_GRADIENT: tl.constexpr, ROUNDS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pairs of the samples ``x [R, N, D]`` with m drawn targets a row.

    Returns (sum of powers [R, N], gradient [R, N, D] times ``coefficient``, outside [R, N], sum of pulls [R, D], sum
    of pulls times normals [R, D]).
    """
    powers = tl.zeros_like(tl.sum(x, axis=2))
    gradient = tl.zeros_like(x)
    # Two levels of sums, of 16 targets at the lower one: a running sum over all of them would lose several bits. The
    # powers, all positive and averaged over samples and rows, can do without, and the registers are short.
    gradient_part = gradient
    pulls = tl.zeros_like(mean)
    pulls_normal = tl.zeros_like(mean)
    sample = tl.arange(0, BLOCK_N)
    outside = keep[:, None] & (sample < 0)[None, :]
    for group in range((m + 3) // 4):
        # One call of the generator gives four numbers, for four targets of the same feature.
        first, second, third, fourth = four_normals(seed, row, feature, group, ROUNDS)
        for part in tl.range(0, 4, loop_unroll_factor=UNROLL):
            normal = tl.where(part < 2, tl.where(part == 0, first, second), tl.where(part == 2, third, fourth))
            normal = normal.to(x.dtype)
            y = mean + deviation * normal  # [R, D]
            u = x - y[:, None, :]
            if root is not None:
                u = u * root[None, None, :]
            valid = keep[:, None] & (sample < tl.where(group * 4 + part < m, N, 0))[None, :]
            power, pull, out = pair_step(u, valid, careful, coefficient, alpha, eps, MODE, SINGLE, HAS_EPS, REFINE)
            powers += power
            gradient_part += pull
            outside = outside | out
            if PARAMETER_GRADIENT:
                total = tl.sum(pull, axis=1)
                pulls += total
                pulls_normal += total * normal
        if group % 4 == 3:
            gradient += gradient_part
            gradient_part = tl.zeros_like(gradient)
    return powers, gradient + gradient_part, outside, pulls, pulls_normal


@triton.jit
def accumulate_draws_fast(
    x, root, mean, deviation, seed, row, feature, keep, m, coefficient,
    N: tl.constexpr, REFINE: tl.constexpr, PARAMETER_GRADIENT: tl.constexpr, ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``accumulate_draws`` for alpha = 1 without eps, as long as no sum of squares over- or underflows.

    Every lane of a warp does the arithmetic of all pairs of a target, so it is kept to a root, a product, a sum and
    the running extremes that tell whether everything has to be done again with care.
    """
    lowest = tl.zeros_like(tl.sum(x, axis=2)) + 1.0
    highest = lowest
    powers = tl.zeros_like(lowest)
    gradient = tl.zeros_like(x)
    gradient_part = gradient
    pulls = tl.zeros_like(mean)
    pulls_normal = tl.zeros_like(mean)
    sample = tl.arange(0, BLOCK_N)
    valid = keep[:, None] & (sample < N)[None, :]
    for group in range((m + 3) // 4):
        first, second, third, fourth = four_normals(seed, row, feature, group, ROUNDS)
        for part in tl.range(0, 4, loop_unroll_factor=UNROLL):
            normal = tl.where(part < 2, tl.where(part == 0, first, second), tl.where(part == 2, third, fourth))
            normal = normal.to(x.dtype)
            y = mean + deviation * normal  # [R, D]
            u = x - y[:, None, :]
            if root is not None:
                u = u * root[None, None, :]
            squares = tl.sum(u * u, axis=2)
            lowest = tl.minimum(lowest, squares)
            highest = tl.maximum(highest, squares)
            inverse = inverse_root(squares, REFINE)
            if group * 4 + part >= m:  # the last group may be short
                inverse = tl.zeros_like(inverse)
            powers += squares * inverse
            if PARAMETER_GRADIENT:
                pull = u * inverse[:, :, None]
                gradient_part += pull
                total = tl.sum(tl.where(valid[:, :, None], pull, 0.0), axis=1)
                pulls += total
                pulls_normal += total * normal
            else:
                gradient_part += u * inverse[:, :, None]
        if group % 4 == 3:
            gradient += gradient_part
            gradient_part = tl.zeros_like(gradient)
    # Masked rows and padded samples computed something: it ends here.
    outside = valid & (~(is_in_safe_range(lowest) & is_in_safe_range(highest)))
    powers = tl.where(valid, powers, 0.0)
    gradient = tl.where(valid[:, :, None], (gradient + gradient_part) * coefficient, 0.0)
    return powers, gradient, outside, pulls * coefficient, pulls_normal * coefficient


@triton.jit
def energy_gaussian_kernel(
    x_ptr,
    mean_ptr,
    log_std_ptr,
    seed_ptr,
    mask_ptr,
    weight_ptr,
    feature_weight_ptr,
    denominator_ptr,
    loss_ptr,
    gx_ptr,
    gmean_ptr,
    glog_std_ptr,
    rows,
    m,
    features,
    row_sizes,  # as in energy_rows_kernel
    x_strides,
    gx_strides,
    stride_mean,
    stride_log_std,
    alpha_: tl.float64,
    eps_: tl.float64,
    target_coefficient_: tl.float64,
    pair_coefficient_: tl.float64,
    scale_: tl.float64,
    N: tl.constexpr,
    MODE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    REDUCE: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As ``energy_rows_kernel`` with m targets ``mean + exp(log_std) * normal`` a row.

    ``mean`` and ``log_std`` are [rows, D] with features next to each other; their gradients are contiguous [rows, D].
    """
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    PARAMETER_GRADIENT: tl.constexpr = gmean_ptr is not None
    SINGLE: tl.constexpr = BLOCK_D == 1
    # The relative error of the fast root, 2^-23, drowns in the gradient of the samples, but not in that of log_std,
    # where the draws cancel.
    REFINE: tl.constexpr = PARAMETER_GRADIENT and dtype == tl.float32
    alpha = tl.full([], alpha_, tl.float64)
    eps = tl.full([], eps_, tl.float64).to(dtype)
    target_coefficient = tl.full([], target_coefficient_, tl.float64).to(dtype)
    pair_coefficient = tl.full([], pair_coefficient_, tl.float64).to(dtype)
    scale = tl.full([], scale_, tl.float64).to(dtype)
    seed = tl.load(seed_ptr)

    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = row < rows
    keep, factor = row_scale(row, in_range, mask_ptr, weight_ptr, denominator_ptr, scale)
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    feature = tl.arange(0, BLOCK_D).to(tl.int64)
    inside_D = feature < features
    inside_ND = (sample < N)[:, None] & inside_D[None, :]
    x_rows = x_ptr + row_offset(row, row_sizes, x_strides, ROW_DIMS)
    x_mask = keep[:, None, None] & inside_ND[None, :, :]
    x = load_samples(x_rows, x_strides, sample, feature, x_mask, ROW_DIMS, dtype)  # [R, N, D]
    row_mask = keep[:, None] & inside_D[None, :]
    mean = tl.load(mean_ptr + (row * stride_mean)[:, None] + feature[None, :], mask=row_mask, other=0.0)
    log_std = tl.load(log_std_ptr + (row * stride_log_std)[:, None] + feature[None, :], mask=row_mask, other=0.0)
    mean = mean.to(dtype)  # [R, D]
    # Padded features and masked rows get no noise, so that their differences are 0.
    deviation = tl.where(row_mask, tl.exp(log_std.to(dtype)), 0.0)
    root = None
    if feature_weight_ptr is not None:
        root = load_root(feature_weight_ptr, feature, inside_D, dtype)

    fidelity = tl.zeros_like(tl.sum(x, axis=2))
    diversity = fidelity
    gradient = tl.zeros_like(x)
    repulsion = gradient
    pulls = tl.zeros_like(mean)
    pulls_normal = pulls
    # Draws and samples are tested on their own: equal samples (a head that starts at zero) must not cost the draws a
    # second time. See energy_rows_kernel for the two passes.
    if (MODE == 1) and (not SINGLE) and (not HAS_EPS):
        fidelity, gradient, outside, pulls, pulls_normal = accumulate_draws_fast(
            x, root, mean, deviation, seed, row, feature, keep, m, target_coefficient,
            N, REFINE, PARAMETER_GRADIENT, ROUNDS, UNROLL, BLOCK_N,
        )  # fmt: skip
        if any_of(outside):
            fidelity, gradient, outside, pulls, pulls_normal = accumulate_draws(
                x, root, mean, deviation, seed, row, feature, keep, 1, m, target_coefficient, alpha, eps,
                N, MODE, SINGLE, HAS_EPS, REFINE, PARAMETER_GRADIENT, ROUNDS, 1, BLOCK_N,
            )  # fmt: skip
    else:
        careful = 0
        passes = 1
        while careful < passes:
            fidelity, gradient, outside, pulls, pulls_normal = accumulate_draws(
                x, root, mean, deviation, seed, row, feature, keep, careful, m, target_coefficient, alpha, eps,
                N, MODE, SINGLE, HAS_EPS, REFINE, PARAMETER_GRADIENT, ROUNDS, UNROLL, BLOCK_N,
            )  # fmt: skip
            careful += 1
            if (MODE != 2) and (not SINGLE):
                passes = 1 + any_of(outside).to(tl.int32)
    careful = 0
    passes = 1
    while careful < passes:
        diversity, repulsion, outside = accumulate_samples(
            x, root, x_rows, feature, keep, careful, features, x_strides, pair_coefficient, alpha, eps,
            N, MODE, SINGLE, HAS_EPS, REFINE, ROW_DIMS, BLOCK_N,
        )  # fmt: skip
        careful += 1
        if (MODE != 2) and (not SINGLE):
            passes = 1 + any_of(outside).to(tl.int32)
    gradient -= repulsion

    terms = target_coefficient * fidelity - (0.5 * pair_coefficient) * diversity
    loss = tl.where(keep, tl.sum(terms, axis=1) * factor, 0.0)  # [R]
    if REDUCE:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, axis=0))
    else:
        tl.store(loss_ptr + row, loss, mask=in_range)
    if gx_ptr is not None:
        gx_mask = in_range[:, None, None] & inside_ND[None, :, :]
        store_sample_gradient(
            gx_ptr, gradient, factor, root, keep, row, row_sizes, gx_strides, sample, feature, gx_mask, ROW_DIMS
        )
    if PARAMETER_GRADIENT:
        pulls = tl.where(keep[:, None], -pulls * factor[:, None], 0.0)
        pulls_normal = tl.where(keep[:, None], -pulls_normal * factor[:, None] * deviation, 0.0)
        if root is not None:
            pulls = pulls * root[None, :]
            pulls_normal = pulls_normal * root[None, :]
        pointer = (row * features)[:, None] + feature[None, :]
        store_mask = in_range[:, None] & inside_D[None, :]
        tl.store(gmean_ptr + pointer, pulls.to(gmean_ptr.dtype.element_ty), mask=store_mask)
        tl.store(glog_std_ptr + pointer, pulls_normal.to(glog_std_ptr.dtype.element_ty), mask=store_mask)


@triton.jit
def gaussian_normals_kernel(normal_ptr, seed_ptr, m, features, ROUNDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The normals that ``energy_gaussian_kernel`` draws, as a contiguous [rows, m, D]: tests, and tiles too large.

    One program for (row, group of four targets, block of features).
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    group = tl.program_id(1)
    feature = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    drawn = four_normals(tl.load(seed_ptr), row, feature, group, ROUNDS)
    for part in tl.static_range(4):
        target = group * 4 + part
        pointer = normal_ptr + ((row * m + target) * features)[:, None] + feature[None, :]
        inside = feature < tl.where(target < m, features, 0)
        tl.store(pointer, drawn[part].to(normal_ptr.dtype.element_ty), mask=inside[None, :])
