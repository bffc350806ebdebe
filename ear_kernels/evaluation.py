"""Energy distance and energy score, for evaluation."""

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import reference
from ear_kernels.ops.energy_loss.functional import check_energy_loss_options, energy_loss
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, takes_tensors
from ear_kernels.targets import GaussianTarget


@takes_tensors
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
    check_energy_loss_options(alpha, 1.0, 0.0, "mean")
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points)
        if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(points.shape)}; it must be [N, D] with N >= 2 and D >= 1")
    check_device("y", y, x, "x")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} features and y {y.shape[1]}; they must have the same")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    is_triton = applies("energy_distance", x, None)
    between, first, second = _mean_distances(x.to(dtype), y.to(dtype), float(alpha), is_triton)
    return 2 * between - first - second


@takes_tensors
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
    member_mask: Tensor | None = None,
) -> Tensor:
    """Energy score ``E|x - y|^alpha - 1/2 E|x - x'|^alpha`` of an ensemble; the CRPS where D is 1.

    ``fair`` takes the second mean over different samples (unbiased for the score of the distribution behind them),
    otherwise over all n^2 pairs (the score of the empirical distribution). It is half the energy loss with tau = 1;
    arguments, result and errors are those of :func:`ear_kernels.energy_loss`.
    """
    return 0.5 * energy_loss(
        samples, target, mask, alpha=alpha, fair=fair, sample_dim=sample_dim, target_dim=target_dim, weights=weights,
        feature_weights=feature_weights, reduction=reduction, member_mask=member_mask,
    )  # fmt: skip


def _mean_distances(x_MD: Tensor, y_ND: Tensor, alpha: float, use_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(between the sets, within the first, within the second): means of ``|a - b|^alpha`` over different points.

    Points are first multiplied by a power of two that brings the largest coordinate near 1, so that no square
    overflows; differences below 1e-19 of the largest coordinate count as 0 in float32.
    """
    pairwise_sum = reference.pairwise_sum
    if use_triton:
        # Imported here, so that importing ear_kernels needs no Triton.
        from ear_kernels.ops.energy_loss import launch_distance

        pairwise_sum = launch_distance.pairwise_sum
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
