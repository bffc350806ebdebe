"""Launches of the sums of pairwise distances between two point sets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import kernels_distance
from ear_kernels.runtime.launching import ceil_div, launch


@dataclass(frozen=True)
class PairwiseConfig:
    """Sizes of one tile of pairs: points of either set, features of a step (or how far their loop is unrolled)."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


EXACT = PairwiseConfig(64, 64, 1, 4, 3)
PRODUCT = PairwiseConfig(128, 64, 32, 4, 2)
# The powers of a general alpha need registers that 4 warps do not have.
PRODUCT_GENERAL = PairwiseConfig(128, 64, 32, 8, 2)
# Programs of the pairwise kernels, the number of partial sums: fixed, so that a result is the same on every GPU.
PROGRAMS = 1056
# From this many features on, tensor cores beat differences.
PRODUCT_FEATURES = 16


def pairwise_sum(x_MD: Tensor, y_ND: Tensor, alpha: float, same: bool) -> Tensor:
    """As :func:`reference.pairwise_sum` without ever holding distances.

    float32 sets of 16 or more features go to tensor cores: ``|x|^2 + |y|^2 - 2 x.y`` around the sets' common centre,
    where each product is three TF32 products of the points' upper and lower halves, which is float32 accuracy. A tile
    that holds a pair with a squared distance below 1/16 of ``|x|^2 + |y|^2`` is done by differences. So the relative
    error of every distance is below about 8 x 2^-21, that of typical ones 2^-22, and rounding errors of either sign
    average out in the sum. Fewer features, and float64, are done by differences throughout.
    """
    count_x, features = x_MD.shape
    count_y = y_ND.shape[0]
    double = x_MD.dtype == torch.float64
    mode = {1.0: 1, 2.0: 2}.get(alpha, 0)
    use_product = not double and features >= PRODUCT_FEATURES
    config = (PRODUCT if mode else PRODUCT_GENERAL) if use_product else EXACT
    tiles = ceil_div(count_x, config.block_m) * ceil_div(count_y, config.block_n)
    programs = min(tiles, PROGRAMS)
    totals = torch.empty(programs, dtype=torch.float64, device=x_MD.device)
    kernel = kernels_distance.pairwise_product_kernel if use_product else kernels_distance.pairwise_exact_kernel
    if use_product:
        centre = (x_MD.sum(0, dtype=torch.float64) + y_ND.sum(0, dtype=torch.float64)) / (count_x + count_y)
        x_parts = (*_halves(x_MD, centre.float()), x_MD.contiguous())
        y_parts = x_parts if same else (*_halves(y_ND, centre.float()), y_ND.contiguous())
        points: tuple[Tensor, ...] = (*x_parts, *y_parts)
    else:
        # One feature after the other, so that a step of the kernel reads neighbouring numbers.
        x_DM = x_MD.t().contiguous()
        points = (x_DM, x_DM if same else y_ND.t().contiguous())
    launch(
        kernel,
        (programs,),
        *points, totals, count_x, count_y, features, alpha,
        on=x_MD,
        MODE=mode,
        SAME=same,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({} if use_product else {"DOUBLE": double}),
    )  # fmt: skip
    return totals.sum()


def _halves(points_ND: Tensor, centre_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(TF32 part, rest, squared norm) of the points around ``centre``: ``points - centre = part + rest``."""
    centred = points_ND - centre_D
    # By parts: the sum in float64 makes a float64 copy of what it sums.
    squares = torch.cat([part.square().sum(1, dtype=torch.float64) for part in centred.split(8192)]).float()
    # TF32 keeps 10 bits of the mantissa; the rest is exact in float32. In place, because the sets may be large.
    high = (centred.view(torch.int32) & -8192).view(torch.float32)
    return high, centred.sub_(high), squares
