"""Mean pairwise distances between two point sets: the eager reference and the launcher of the kernels.

Both sum in float64 in a fixed order and return float64, because an energy distance is a small difference of means.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24


def pairwise_sum_eager(x_MD: Tensor, y_ND: Tensor, alpha: float, same: bool) -> Tensor:
    """Sum of ``|x_i - y_j|^alpha`` over all pairs, or over i < j if ``same``; by chunks of rows, by differences."""
    chunk = max(1, CHUNK_ELEMENTS // max(1, y_ND.shape[0]))
    total = torch.zeros((), dtype=torch.float64, device=x_MD.device)
    for start in range(0, x_MD.shape[0], chunk):
        block = x_MD[start : start + chunk]
        # The default would multiply matrices, and lose small distances.
        distances = torch.cdist(block, y_ND, compute_mode="donot_use_mm_for_euclid_dist")
        if alpha != 1:
            distances = distances.pow(alpha)
        if same:
            distances = distances.triu(diagonal=start + 1)
        total += distances.sum(dtype=torch.float64)
    return total


def pairwise_sum_triton(x_MD: Tensor, y_ND: Tensor, alpha: float, same: bool) -> Tensor:
    """As :func:`pairwise_sum_eager` without ever holding distances.

    float32 sets of 16 or more features go to tensor cores: ``|x|^2 + |y|^2 - 2 x.y`` around the sets' common centre,
    where each product is three TF32 products of the points' upper and lower halves, which is float32 accuracy. A tile
    that holds a pair with a squared distance below 1/16 of ``|x|^2 + |y|^2`` is done by differences. So the relative
    error of every distance is below about 8 x 2^-21, that of typical ones 2^-22, and rounding errors of either sign
    average out in the sum. Fewer features, and float64, are done by differences throughout.
    """
    from ear_kernels.ops.energy_loss import configs as launch
    from ear_kernels.ops.energy_loss import kernels_distance

    count_x, features = x_MD.shape
    count_y = y_ND.shape[0]
    double = x_MD.dtype == torch.float64
    use_product = not double and features >= launch.PAIRWISE_PRODUCT_FEATURES
    product = launch.PAIRWISE_PRODUCT if alpha in (1.0, 2.0) else launch.PAIRWISE_PRODUCT_GENERAL
    config = product if use_product else launch.PAIRWISE_EXACT
    tiles = launch.ceil_div(count_x, config.block_m) * launch.ceil_div(count_y, config.block_n)
    programs = min(tiles, launch.PAIRWISE_PROGRAMS)
    totals = torch.empty(programs, dtype=torch.float64, device=x_MD.device)
    switches = {
        "MODE": {1.0: 1, 2.0: 2}.get(alpha, 0), "SAME": same, "DOUBLE": double, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    with launch.on_device(x_MD):
        if use_product:
            centre = (x_MD.sum(0, dtype=torch.float64) + y_ND.sum(0, dtype=torch.float64)) / (count_x + count_y)
            x_parts = (*_halves(x_MD, centre.float()), x_MD.contiguous())
            y_parts = x_parts if same else (*_halves(y_ND, centre.float()), y_ND.contiguous())
            kernels_distance.pairwise_product_kernel[(programs,)](
                *x_parts, *y_parts, totals, count_x, count_y, features, alpha, **switches
            )
        else:
            # One feature after the other, so that a step of the kernel reads neighbouring numbers.
            x_DM = x_MD.t().contiguous()
            y_DN = x_DM if same else y_ND.t().contiguous()
            kernels_distance.pairwise_exact_kernel[(programs,)](
                x_DM, y_DN, totals, count_x, count_y, features, alpha, **switches
            )
    return totals.sum()


def _halves(points_ND: Tensor, centre_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(TF32 part, rest, squared norm) of the points around ``centre``: ``points - centre = part + rest``."""
    centred = points_ND - centre_D
    # By parts: the sum in float64 makes a float64 copy of what it sums.
    squares = torch.cat([part.square().sum(1, dtype=torch.float64) for part in centred.split(8192)]).float()
    # TF32 keeps 10 bits of the mantissa; the rest is exact in float32. In place, because the sets may be large.
    high = (centred.view(torch.int32) & -8192).view(torch.float32)
    return high, centred.sub_(high), squares


def mean_distances(x_MD: Tensor, y_ND: Tensor, alpha: float, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(between the sets, within the first, within the second): means of ``|a - b|^alpha`` over different points.

    Points are first multiplied by a power of two that brings the largest coordinate near 1, so that no square
    overflows; differences below 1e-19 of the largest coordinate count as 0 in float32.
    """
    pairwise_sum = pairwise_sum_triton if triton else pairwise_sum_eager
    largest = torch.maximum(x_MD.abs().amax(), y_ND.abs().amax())
    usable = (largest > 0) & torch.isfinite(largest)
    exponent = torch.where(usable, torch.frexp(torch.where(usable, largest, 1.0)).exponent, 0)
    # In two factors: one power of two may lie outside the range.
    half = exponent // 2
    x_MD, y_ND = (torch.ldexp(torch.ldexp(points, -half), half - exponent) for points in (x_MD, y_ND))
    scale = torch.exp2(exponent.double() * alpha)
    m, n = x_MD.shape[0], y_ND.shape[0]
    between = pairwise_sum(x_MD, y_ND, alpha, False) / (m * n)
    first = pairwise_sum(x_MD, x_MD, alpha, True) / (m * (m - 1) / 2)
    second = pairwise_sum(y_ND, y_ND, alpha, True) / (n * (n - 1) / 2)
    return between * scale, first * scale, second * scale
