"""Energy distance and energy score, for evaluation."""

import torch
from torch import Tensor

from ear_kernels import functional
from ear_kernels.ops.energy_loss import distance
from ear_kernels.runtime.backend import choose_backend
from ear_kernels.runtime.checks import check_device, check_floating
from ear_kernels.targets import GaussianTarget


@torch.no_grad()
def energy_distance(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """Unbiased energy distance of two point sets (paper Eq. 9 with the term of the data): no gradients.

    ``2 E|a - b|^alpha - E|a - a'|^alpha - E|b - b'|^alpha`` with a, a' from ``x``, b, b' from ``y``, over different
    points only (the U-statistic), so it is 0 in the mean for equal distributions, and may be negative. The N x M
    distances are never in memory. Sums are in float64 and in a fixed order.

    Args:
        x: ``[N, D]``, N >= 2, floating point.
        y: ``[M, D]``, M >= 2.
        alpha: exponent of the distances, in (0, 2].

    Returns:
        A scalar, float64.

    Raises:
        ValueError: shapes or devices that do not fit, or alpha out of range. TypeError: integer tensors.
    """
    functional.check_energy_loss_options(alpha, 1.0, 0.0, "mean")
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points)
        if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(points.shape)}; it must be [N, D] with N >= 2 and D >= 1")
    check_device("y", y, x, "x")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features and y {y.shape[1]}; they must have the same")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    backend = choose_backend("energy_distance", x)
    between, first, second = distance.mean_distances(x.to(dtype), y.to(dtype), float(alpha), backend == "triton")
    return 2 * between - first - second


def energy_score(
    samples: Tensor,
    target: Tensor | GaussianTarget,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    fair: bool = True,
    sample_dim: int = -2,
    target_dim: int = -2,
    weights: Tensor | None = None,
    feature_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Energy score ``E|x - y|^alpha - 1/2 E|x - x'|^alpha`` of an ensemble; the CRPS where D is 1.

    ``fair`` takes the second mean over different samples (unbiased for the score of the distribution behind them),
    otherwise over all n^2 pairs (the score of the empirical distribution). It is half the energy loss with tau = 1 or
    (n - 1) / n; arguments, result and errors are those of :func:`ear_kernels.energy_loss`.
    """
    n = samples.shape[sample_dim] if -samples.ndim <= sample_dim < samples.ndim else 2
    loss = functional.energy_loss(
        samples,
        target,
        mask,
        alpha=alpha,
        tau=1.0 if fair else max(n - 1, 1) / n,
        sample_dim=sample_dim,
        target_dim=target_dim,
        weights=weights,
        feature_weights=feature_weights,
        reduction=reduction,
    )
    return 0.5 * loss
