"""The energy loss of rows too large for one program: the features are split over programs, in three phases.

1. ``field_norms_kernel``: the norm of every pair over one block of features.
2. ``field_combine_kernel``: the norm over all blocks, the loss of the row and what the gradient needs of every pair.
3. ``field_gradients_kernel``: the gradients of one block of features.

Every sum has a fixed order. "Partners" of a sample are the m targets, then the N samples of the row: Z = m + N. The
workspace holds [rows, blocks, Z, N] norms, one number for N blocks of features, so it is a small part of the inputs.

Legend as in kernels_pairs.py; C partners of a program.
"""

import triton
import triton.language as tl

from ear_kernels.ops.energy_loss.kernels_pairs import (
    GAUSSIAN,
    LAPLACE,
    is_in_safe_range,
    load_root,
    power_of_positive,
    row_offset,
    row_scale,
    scaled_squares,
)


@triton.jit
def block_norm(u, itself, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Norms [N] of ``u [N, D]``: the plain root where that is safe for the whole tile, scaled otherwise.

    ``itself`` is the sample whose difference is its own, exactly 0 (-1 for none): any other 0 may be an underflow.
    """
    squares = tl.sum(u * u, axis=1)
    sample = tl.arange(0, BLOCK_N)
    scale = tl.zeros_like(squares) + 1.0
    outside = (~is_in_safe_range(squares)) & (sample < N) & (sample != itself)
    if tl.max(outside.to(tl.int32), axis=0) > 0:
        exact, scales, _ = scaled_squares(u[None, :, :], 0.0, False)
        squares, scale = tl.sum(exact, axis=0), tl.sum(scales, axis=0)
    if u.dtype == tl.float64:
        norm = tl.sqrt(squares) * scale
    else:
        norm = tl.sqrt_rn(squares) * scale
    return norm


@triton.jit
def field_norms_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    feature_weight_ptr,
    norm_ptr,
    m,
    features,
    blocks,
    row_sizes,  # as in energy_rows_kernel
    x_strides,
    y_strides,
    N: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms [rows, blocks, Z, N] of all pairs over one block of features; programs [rows, blocks]."""
    dtype: tl.constexpr = norm_ptr.dtype.element_ty
    block = (tl.program_id(0) % blocks).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    # A masked row is not read; the later phases know it too.
    limit = features
    if mask_ptr is not None:
        limit = tl.where(tl.load(mask_ptr + row).to(tl.int32) != 0, features, 0)
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    feature = block * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside_D = feature < limit
    inside_ND = (sample < N)[:, None] & inside_D[None, :]
    x_row = x_ptr + row_offset(row, row_sizes, x_strides, ROW_DIMS)
    y_row = y_ptr + row_offset(row, row_sizes, y_strides, ROW_DIMS)
    x = tl.load(
        x_row + (sample * x_strides[ROW_DIMS])[:, None] + (feature * x_strides[ROW_DIMS + 1])[None, :],
        mask=inside_ND,
        other=0.0,
    ).to(dtype)  # [N, D]
    root = None
    if feature_weight_ptr is not None:
        root = load_root(feature_weight_ptr, feature, inside_D, dtype)
    out = norm_ptr + ((row * blocks + block) * (m + N)) * N + sample
    y_pointer = y_row + feature * y_strides[ROW_DIMS + 1]
    for _ in range(m):
        y = tl.load(y_pointer, mask=inside_D, other=0.0).to(dtype)
        u = x - y[None, :]
        if root is not None:
            u = u * root[None, :]
        tl.store(out, block_norm(u, -1, N, BLOCK_N), mask=sample < N)
        y_pointer += y_strides[ROW_DIMS]
        out += N
    x_pointer = x_row + feature * x_strides[ROW_DIMS + 1]
    for j in range(N):
        u = x - tl.load(x_pointer, mask=inside_D, other=0.0).to(dtype)[None, :]
        if root is not None:
            u = u * root[None, :]
        tl.store(out, block_norm(u, j, N, BLOCK_N), mask=sample < N)
        x_pointer += x_strides[ROW_DIMS]
        out += N


@triton.jit
def field_combine_kernel(
    norm_ptr, mask_ptr, weight_ptr, denominator_ptr, loss_ptr, inverse_ptr, slope_ptr, m, blocks, partner_blocks,
    alpha_: tl.float64, eps_: tl.float64, target_coefficient_: tl.float64, pair_coefficient_: tl.float64,
    scale_: tl.float64,
    N: tl.constexpr, MODE: tl.constexpr, HAS_EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Programs [rows, blocks of partners]: from the blocks' norms to loss, 1/norm and slope of every pair.

    Writes partial losses [rows, partner_blocks], already scaled and weighted, and ``inverse`` and ``slope``
    [rows, Z, N]: the gradient of x_i by a pair is ``slope * (inverse * u)``. They are kept apart because their
    product may overflow where the gradient does not.
    """
    dtype: tl.constexpr = norm_ptr.dtype.element_ty
    alpha = tl.full([], alpha_, tl.float64)
    eps = tl.full([], eps_, tl.float64).to(dtype)
    target_coefficient = tl.full([], target_coefficient_, tl.float64).to(dtype)
    pair_coefficient = tl.full([], pair_coefficient_, tl.float64).to(dtype)
    scale = tl.full([], scale_, tl.float64).to(dtype)
    # One grid dimension, because the others end at 65,535.
    row = (tl.program_id(0) // partner_blocks).to(tl.int64) + tl.arange(0, 1)
    partner_block = tl.program_id(0) % partner_blocks
    keep, factor = row_scale(row, row >= 0, mask_ptr, weight_ptr, denominator_ptr, scale)
    partner = partner_block * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.arange(0, BLOCK_N)
    partners = m + N
    is_target = (partner < m)[:, None]
    inside = (partner < partners)[:, None] & (sample < N)[None, :]
    counts = inside & (is_target | (partner[:, None] - m != sample[None, :])) & keep[:, None]
    pair = partner.to(tl.int64)[:, None] * N + sample[None, :]
    # row [1] broadcasts over the [C, N] tile.
    pointer = norm_ptr + row[:, None] * blocks * partners * N + pair
    largest = tl.zeros([BLOCK_C, BLOCK_N], dtype)
    current = pointer
    for _ in range(blocks):
        largest = tl.maximum(largest, tl.load(current, mask=counts, other=0.0))
        current += partners * N
    if HAS_EPS:
        largest = tl.maximum(largest, eps)
    divisor = tl.where(largest == 0.0, 1.0, largest)
    squares = tl.zeros([BLOCK_C, BLOCK_N], dtype)
    current = pointer
    for _ in range(blocks):
        part = tl.load(current, mask=counts, other=0.0) / divisor
        squares += part * part
        current += partners * N
    if HAS_EPS:
        small = eps / divisor
        squares += small * small
    if dtype == tl.float64:
        norm = largest * tl.sqrt(squares)
    else:
        norm = largest * tl.sqrt_rn(squares)
    zero = norm == 0.0
    safe = tl.where(zero, 1.0, norm)
    if MODE == 1:
        power = norm
        slope = tl.full([BLOCK_C, BLOCK_N], 1.0, dtype)
    elif MODE == 2:
        power = norm * norm
        slope = 2.0 * norm
    elif MODE == GAUSSIAN:
        scaled = norm * alpha.to(dtype)
        power = -tl.exp(-0.5 * (scaled * scaled))
        slope = tl.where(power == 0.0, 0.0, -power * scaled * alpha.to(dtype))
    elif MODE == LAPLACE:
        power = -tl.exp(-norm * alpha.to(dtype))
        slope = -power * alpha.to(dtype)
    else:
        power = tl.where(zero, 0.0, power_of_positive(safe, alpha))
        slope = alpha.to(dtype) * power_of_positive(safe, alpha - 1.0)
    # The gradient of x_i sees every pair once, the loss sees every pair of samples twice.
    loss = tl.where(is_target, target_coefficient, -0.5 * pair_coefficient) * power
    loss = tl.sum(tl.sum(tl.where(counts, loss, 0.0), axis=1), axis=0) * factor
    tl.store(loss_ptr + row * partner_blocks + partner_block, tl.where(keep, loss, 0.0))
    coefficient = tl.where(is_target, target_coefficient, -pair_coefficient) * factor[:, None]
    slope = tl.where(counts & (~zero), coefficient * slope, 0.0)
    inverse = tl.where(counts & (~zero), 1.0 / safe, 0.0)
    out = row[:, None] * partners * N + pair
    tl.store(slope_ptr + out, slope, mask=inside)
    tl.store(inverse_ptr + out, inverse, mask=inside)


@triton.jit
def field_gradients_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    feature_weight_ptr,
    inverse_ptr,
    slope_ptr,
    gx_ptr,
    gy_ptr,
    m,
    features,
    blocks,
    row_sizes,  # as in energy_rows_kernel
    x_strides,
    y_strides,
    gx_strides,
    gy_strides,
    N: tl.constexpr,
    ROW_DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of one block of features of one row; programs [rows, blocks]."""
    dtype: tl.constexpr = slope_ptr.dtype.element_ty
    row = (tl.program_id(0) // blocks).to(tl.int64)
    limit = features
    if mask_ptr is not None:
        limit = tl.where(tl.load(mask_ptr + row).to(tl.int32) != 0, features, 0)
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    feature = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = feature < features
    inside_D = feature < limit
    x_row = x_ptr + row_offset(row, row_sizes, x_strides, ROW_DIMS)
    y_row = y_ptr + row_offset(row, row_sizes, y_strides, ROW_DIMS)
    x = tl.load(
        x_row + (sample * x_strides[ROW_DIMS])[:, None] + (feature * x_strides[ROW_DIMS + 1])[None, :],
        mask=(sample < N)[:, None] & inside_D[None, :],
        other=0.0,
    ).to(dtype)  # [N, D]
    root = None
    if feature_weight_ptr is not None:
        root = load_root(feature_weight_ptr, feature, inside_D, dtype)
    pair = row * (m + N) * N + sample
    gradient = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    y_pointer = y_row + feature * y_strides[ROW_DIMS + 1]
    if gy_ptr is not None:
        gy_row = gy_ptr + row_offset(row, row_sizes, gy_strides, ROW_DIMS)
        gy_pointer = gy_row + feature * gy_strides[ROW_DIMS + 1]
    for _ in range(m):
        u = x - tl.load(y_pointer, mask=inside_D, other=0.0).to(dtype)[None, :]
        if root is not None:
            u = u * root[None, :]
        inverse = tl.load(inverse_ptr + pair, mask=sample < N, other=0.0)
        slope = tl.load(slope_ptr + pair, mask=sample < N, other=0.0)
        pull = (u * inverse[:, None]) * slope[:, None]
        gradient += pull
        if gy_ptr is not None:
            gy = -tl.sum(pull, axis=0)
            if root is not None:
                gy = gy * root
            tl.store(gy_pointer, gy.to(gy_ptr.dtype.element_ty), mask=inside)
            gy_pointer += gy_strides[ROW_DIMS]
        y_pointer += y_strides[ROW_DIMS]
        pair += N
    if gx_ptr is not None:
        x_pointer = x_row + feature * x_strides[ROW_DIMS + 1]
        for _ in range(N):
            u = x - tl.load(x_pointer, mask=inside_D, other=0.0).to(dtype)[None, :]
            if root is not None:
                u = u * root[None, :]
            inverse = tl.load(inverse_ptr + pair, mask=sample < N, other=0.0)
            slope = tl.load(slope_ptr + pair, mask=sample < N, other=0.0)
            gradient += (u * inverse[:, None]) * slope[:, None]
            x_pointer += x_strides[ROW_DIMS]
            pair += N
        if root is not None:
            gradient = gradient * root[None, :]
        gx_row = gx_ptr + row_offset(row, row_sizes, gx_strides, ROW_DIMS)
        tl.store(
            gx_row + (sample * gx_strides[ROW_DIMS])[:, None] + (feature * gx_strides[ROW_DIMS + 1])[None, :],
            gradient.to(gx_ptr.dtype.element_ty),
            mask=(sample < N)[:, None] & inside[None, :],
        )
