"""Precision and recall of samples by nearest neighbours (Kynkaanniemi et al. 2019)."""

import torch
from torch import Tensor

NEIGHBOURS = 3
"""Of the paper's Table 1, and of the papers that it compares with."""
_ROWS = 4096


def precision_recall(samples: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of samples that look real, and of real images that samples look like (Eqs. 1 and 2 there).

    A point looks like a set if it is no further from some point of it than that point's k-th nearest neighbour in the
    set is.

    Args:
        samples: features ``[N, F]``, N above ``neighbours``.
        real: features ``[M, F]``, M likewise.
        neighbours: k.

    Raises:
        ValueError: too few points, or features of different sizes.
    """
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(
            f"samples have shape {tuple(samples.shape)} and real {tuple(real.shape)}; needed are [N, F] and [M, F]"
        )
    fewest = min(len(samples), len(real))
    if fewest <= neighbours:
        raise ValueError(f"a set has {fewest} points; {neighbours} neighbours need at least {neighbours + 1}")
    return _share_within(samples, real, neighbours), _share_within(real, samples, neighbours)


def _share_within(points: Tensor, others: Tensor, neighbours: int) -> float:
    """The share of ``points`` that look like ``others``."""
    # A point's nearest neighbour in its own set is itself.
    radii_M = torch.cat([torch.cdist(part, others).kthvalue(neighbours + 1).values for part in others.split(_ROWS)])
    within = [(torch.cdist(part, others) <= radii_M).any(dim=1) for part in points.split(_ROWS)]
    return float(torch.cat(within).double().mean())
