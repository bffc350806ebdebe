"""Sums of pairwise distances of two point sets without the matrix of distances. ``@triton.jit`` functions only.

Both kernels run a fixed number of programs; program p takes the tiles p, p + P, ... and writes one float64 sum, so
the result does not depend on the order in which programs run. With SAME the sets are one, and only pairs i < j are
summed: tiles below the diagonal are skipped.

Legend: M, N points of a tile of the first and second set, D features of a step.
"""

import triton
import triton.language as tl

from ear_kernels.ops.energy_loss.kernels_pairs import power_of_positive


@triton.jit
def pairs_that_count(first, second, count_x, count_y, SAME: tl.constexpr):
    """Which pairs [M, N] of the points ``first [M]`` and ``second [N]`` are summed."""
    counts = (first < count_x)[:, None] & (second < count_y)[None, :]
    if SAME:
        counts = counts & (first[:, None] < second[None, :])
    return counts


@triton.jit
def distance_sum(squares, counts, alpha, MODE: tl.constexpr, DOUBLE: tl.constexpr):
    """Sum (float64) of the powers of a tile's distances, given their squares, over the pairs that count."""
    positive = counts & (squares > 0.0)
    if MODE == 1:
        if DOUBLE:
            power = tl.sqrt(squares)
        else:
            power = tl.sqrt_rn(squares)
    elif MODE == 2:
        power = squares
    else:
        power = power_of_positive(tl.where(positive, squares, 1.0), 0.5 * alpha)
    # NaN is not positive, but must arrive.
    power = tl.where(positive | (counts & (squares != squares)), power, 0.0)
    return tl.sum(tl.sum(power, axis=1).to(tl.float64), axis=0)


@triton.jit
def pairwise_exact_kernel(
    x_ptr, y_ptr, total_ptr, count_x, count_y, features, alpha_: tl.float64,
    MODE: tl.constexpr, SAME: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of ``|x_i - y_j|^alpha`` by differences: two operations a pair and feature, no cancellation.

    ``x_ptr`` is [D, count_x] and ``y_ptr`` [D, count_y]: a step of the loop reads one feature of a tile's points.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    alpha = tl.full([], alpha_, tl.float64)
    tiles_y = tl.cdiv(count_y, BLOCK_N)
    tiles = tl.cdiv(count_x, BLOCK_M) * tiles_y
    total = tl.full([], 0.0, tl.float64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        start_x, start_y = (tile // tiles_y) * BLOCK_M, (tile % tiles_y) * BLOCK_N
        if (not SAME) or (start_y + BLOCK_N > start_x + 1):
            first = start_x + tl.arange(0, BLOCK_M)
            second = start_y + tl.arange(0, BLOCK_N)
            x_pointer, y_pointer = x_ptr + first, y_ptr + second
            counts = pairs_that_count(first, second, count_x, count_y, SAME)
            squares = tl.zeros([BLOCK_M, BLOCK_N], dtype)
            for _ in tl.range(0, features, loop_unroll_factor=BLOCK_D):
                x = tl.load(x_pointer, mask=first < count_x, other=0.0).to(dtype)
                y = tl.load(y_pointer, mask=second < count_y, other=0.0).to(dtype)
                difference = x[:, None] - y[None, :]
                squares += difference * difference
                x_pointer += count_x
                y_pointer += count_y
            total += distance_sum(squares, counts, alpha, MODE, DOUBLE)
    tl.store(total_ptr + tl.program_id(0), total)


@triton.jit
def pairwise_product_kernel(
    x_high_ptr, x_low_ptr, x_norm_square_ptr, x_exact_ptr, y_high_ptr, y_low_ptr, y_norm_square_ptr, y_exact_ptr,
    total_ptr, count_x, count_y, features, alpha_: tl.float64,
    MODE: tl.constexpr, SAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of ``|x_i - y_j|^alpha`` by ``|x|^2 + |y|^2 - 2 x.y`` on tensor cores, exact where that would cancel.

    Points come as a TF32 part and the rest (``high + low``, [count, D]), so that three TF32 products make a float32
    one; a dot's operands must come from loads (triton 3.6's ptxas may break others). A tile in which any pair is
    closer than 1/4 of its points' distance from the centre is done again by differences (``*_exact_ptr``, as
    [count, D]).
    """
    alpha = tl.full([], alpha_, tl.float64)
    tiles_y = tl.cdiv(count_y, BLOCK_N)
    tiles = tl.cdiv(count_x, BLOCK_M) * tiles_y
    total = tl.full([], 0.0, tl.float64)
    step = tl.arange(0, BLOCK_D)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        start_x, start_y = (tile // tiles_y) * BLOCK_M, (tile % tiles_y) * BLOCK_N
        if (not SAME) or (start_y + BLOCK_N > start_x + 1):
            first = start_x + tl.arange(0, BLOCK_M)
            second = start_y + tl.arange(0, BLOCK_N)
            x_offset = first.to(tl.int64)[:, None] * features + step[None, :]  # [M, D]
            y_offset = second.to(tl.int64)[None, :] * features + step[:, None]  # [D, N]
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for done in range(0, features, BLOCK_D):
                inside = step < features - done
                x_mask = (first < count_x)[:, None] & inside[None, :]
                y_mask = (second < count_y)[None, :] & inside[:, None]
                x_high = tl.load(x_high_ptr + x_offset + done, mask=x_mask, other=0.0)
                x_low = tl.load(x_low_ptr + x_offset + done, mask=x_mask, other=0.0)
                y_high = tl.load(y_high_ptr + y_offset + done, mask=y_mask, other=0.0)
                y_low = tl.load(y_low_ptr + y_offset + done, mask=y_mask, other=0.0)
                product = tl.dot(x_low, y_high, product, input_precision="tf32")
                product = tl.dot(x_high, y_low, product, input_precision="tf32")
                product = tl.dot(x_high, y_high, product, input_precision="tf32")
            norms = (
                tl.load(x_norm_square_ptr + first, mask=first < count_x, other=0.0)[:, None]
                + tl.load(y_norm_square_ptr + second, mask=second < count_y, other=0.0)[None, :]
            )
            squares = norms - 2.0 * product
            counts = pairs_that_count(first, second, count_x, count_y, SAME)
            close = counts & (squares < 0.0625 * norms)
            if tl.max(close.to(tl.int32)) > 0:
                x_pointer = x_exact_ptr + first.to(tl.int64) * features
                y_pointer = y_exact_ptr + second.to(tl.int64) * features
                exact = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for _ in tl.range(0, features, num_stages=1):
                    x = tl.load(x_pointer, mask=first < count_x, other=0.0)
                    y = tl.load(y_pointer, mask=second < count_y, other=0.0)
                    difference = x[:, None] - y[None, :]
                    exact += difference * difference
                    x_pointer += 1
                    y_pointer += 1
                squares = exact
            total += distance_sum(squares, counts, alpha, MODE, False)
    tl.store(total_ptr + tl.program_id(0), total)
