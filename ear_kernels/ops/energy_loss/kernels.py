"""Triton kernels of the energy loss and the kernel score: one pass that gives loss and gradients.

``@triton.jit`` functions only.

Legend as in kernels_pairs.py. Pointers that are None stand for what a call does not have or want.
"""

import triton
import triton.language as tl

from ear_kernels.ops.energy_loss.kernels_pairs import (
    GAUSSIAN,
    accumulate_samples,
    accumulate_targets,
    any_of,
    load_root,
    load_samples,
    row_offset,
    row_scale,
    store_sample_gradient,
)


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
    m,
    features,
    row_sizes,  # of the ROW_DIMS leading dimensions
    x_strides,  # of those, the samples, the features
    y_strides,
    gx_strides,
    gy_strides,
    alpha_: tl.float64,
    eps_: tl.float64,
    target_coefficient_: tl.float64,
    pair_coefficient_: tl.float64,
    scale_: tl.float64,
    N: tl.constexpr,
    MODE: tl.constexpr,
    HAS_EPS: tl.constexpr,
    REDUCE: tl.constexpr,
    MANY: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loss and gradients of BLOCK_R rows, each with its N samples, m targets and all its features.

    Writes a partial sum per program (REDUCE) or the weighted loss of every row to ``loss_ptr``, in whose dtype all is
    computed, and the gradients of the scaled sum to ``gx_ptr`` and ``gy_ptr``. Reads every sample and target once.
    """
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    SINGLE: tl.constexpr = BLOCK_D == 1
    REFINE: tl.constexpr = dtype == tl.float32
    alpha = tl.full([], alpha_, tl.float64)
    eps = tl.full([], eps_, tl.float64).to(dtype)
    target_coefficient = tl.full([], target_coefficient_, tl.float64).to(dtype)
    pair_coefficient = tl.full([], pair_coefficient_, tl.float64).to(dtype)
    scale = tl.full([], scale_, tl.float64).to(dtype)

    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = row < rows
    keep, factor = row_scale(row, in_range, mask_ptr, weight_ptr, denominator_ptr, scale)
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    feature = tl.arange(0, BLOCK_D).to(tl.int64)
    inside_D = feature < features
    inside_ND = (sample < N)[:, None] & inside_D[None, :]
    x_rows = x_ptr + row_offset(row, row_sizes, x_strides, ROW_DIMS)
    y_rows = y_ptr + row_offset(row, row_sizes, y_strides, ROW_DIMS)
    gy_rows = None
    if gy_ptr is not None:
        gy_rows = gy_ptr + row_offset(row, row_sizes, gy_strides, ROW_DIMS)
    x_mask = keep[:, None, None] & inside_ND[None, :, :]
    x = load_samples(x_rows, x_strides, sample, feature, x_mask, ROW_DIMS, dtype)  # [R, N, D]
    root = None
    if feature_weight_ptr is not None:
        root = load_root(feature_weight_ptr, feature, inside_D, dtype)

    # Zeros of the right shapes: a loop must know the types of what it carries.
    fidelity = tl.zeros_like(tl.sum(x, axis=2))
    diversity = fidelity
    gradient = tl.zeros_like(x)
    careful = 0
    passes = 1
    while careful < passes:
        fidelity, gradient, outside = accumulate_targets(
            x, root, y_rows, gy_rows, feature, keep, careful, in_range, factor, m, features,
            y_strides, gy_strides, target_coefficient, alpha, eps,
            N, MODE, SINGLE, HAS_EPS, REFINE, MANY, ROW_DIMS, BLOCK_N,
        )  # fmt: skip
        diversity, repulsion, outside_pairs = accumulate_samples(
            x, root, x_rows, feature, keep, careful, features, x_strides, pair_coefficient, alpha, eps,
            N, MODE, SINGLE, HAS_EPS, REFINE, ROW_DIMS, BLOCK_N,
        )  # fmt: skip
        gradient -= repulsion
        careful += 1
        if (MODE != 2) and (MODE != GAUSSIAN) and (not SINGLE):
            # One test a program, not one a pair: coincident or extreme points are rare, and then all is redone.
            # The careful pass finds nothing outside, so there are two at most.
            passes = 1 + any_of(outside | outside_pairs).to(tl.int32)

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


@triton.jit
def sum_partials_kernel(partial_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    """Sum ``count`` numbers in a fixed order into one; a single program."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        total += tl.load(partial_ptr + start + offset, mask=start + offset < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0))


@triton.jit
def scale_gradient_kernel(gradient_ptr, factor_ptr, elements, BLOCK: tl.constexpr):
    """Multiply ``elements`` contiguous numbers by the scalar at ``factor_ptr``; at 1 it touches nothing."""
    dtype: tl.constexpr = tl.float64 if gradient_ptr.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(factor_ptr).to(dtype)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _ in range(tl.cdiv(elements, step)):
            inside = offset < elements
            value = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(dtype) * factor
            tl.store(gradient_ptr + offset, value.to(gradient_ptr.dtype.element_ty), mask=inside)
            offset += step
