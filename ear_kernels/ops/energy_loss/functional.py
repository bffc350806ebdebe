"""The energy loss and the kernel score: shapes, dtypes, checks and errors. The maths is in ``reference.py``."""

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import (
    check_broadcast,
    check_device,
    check_floating,
    check_real,
    dimension,
    takes_tensors,
)
from ear_kernels.targets import GaussianTarget

REDUCTIONS = ("mean", "sum", "none")
KERNELS = ("gaussian", "laplace")


def check_energy_loss_options(alpha: float, tau: float, eps: float, reduction: str, fair: bool = True) -> None:
    """Raise ValueError or TypeError unless the options of :func:`energy_loss` are usable."""
    for name, value in (("alpha", alpha), ("tau", tau), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    if not isinstance(fair, bool):
        raise TypeError(f"fair is {fair!r} ({type(fair).__name__}); it must be True or False")
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha is {alpha}; it must be in (0, 2]")
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}; it must be in (0, 1]")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}; it must be 0 or a positive finite number")
    _check_reduction(reduction)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def check_kernel_score_options(kernel: str, bandwidth: float, reduction: str) -> None:
    """Raise ValueError or TypeError unless the options of :func:`kernel_score_loss` are usable."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}")
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
        raise TypeError(f"bandwidth is {bandwidth!r} ({type(bandwidth).__name__}); it must be a number")
    if not 1e-30 <= bandwidth <= 1e30:
        raise ValueError(f"bandwidth is {bandwidth}; it must be positive, from 1e-30 to 1e30")
    _check_reduction(reduction)


def _refusal(weights: Tensor | None, feature_weights: Tensor | None, members: Tensor | None) -> str | None:
    """Why the kernels cannot do a call that the reference can; None if they can."""
    if members is not None:
        return "a member_mask, which needs the reference"
    if torch.is_grad_enabled():
        for name, tensor in (("weights", weights), ("feature_weights", feature_weights)):
            if tensor is not None and tensor.requires_grad:
                return f"{name} that require gradients, which the kernels do not give"
    return None


def _in_front_of_features(tensor: Tensor, name: str, dim: int) -> Tensor:
    """``tensor`` with the dimension ``dim`` moved to the place before the last; itself where it is there."""
    dim = dimension(name, dim, tensor.ndim)
    return tensor if dim == tensor.ndim - 2 else tensor.movedim(dim, -2)


def _fits(targets_RmD: Tensor, rows: torch.Size, features: int) -> bool:
    shape = targets_RmD.shape
    return shape[:-2] == rows and shape[-1] == features and shape[-2] >= 1


def _wrong_target(
    name: str, given: Tensor, samples: Tensor, rows: torch.Size, features: int, target_dim: int, is_gaussian: bool
) -> str:
    several = f" or, with m targets a row along dimension {target_dim}, {(*rows, 'm', features)}"
    return (
        f"{name} has shape {tuple(given.shape)}; for samples of shape {tuple(samples.shape)} it must be "
        f"{(*rows, features)}{'' if is_gaussian else several}"
    )


@takes_tensors
def energy_loss(
    samples: Tensor,
    target: Tensor | GaussianTarget,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    tau: float = 1.0,
    sample_dim: int = -2,
    target_dim: int = -2,
    weights: Tensor | None = None,
    feature_weights: Tensor | None = None,
    eps: float = 0.0,
    reduction: str = "mean",
    fair: bool = True,
    member_mask: Tensor | None = None,
) -> Tensor:
    """Energy loss of n samples against m targets a row (paper Eq. 10; general form in docs/energy_loss.md).

    ``2 mean_{i,k} |x_i - y_k|^alpha - tau mean_{i != j} |x_i - x_j|^alpha``

    With n = 2, m = 1 this is Eq. 10 to the letter; with tau = 1 it is twice the fair (U-statistic) energy score.
    All differences, squares and sums are in float32, or in float64 if an input is float64. The gradient of a
    distance at coincident points is 0 for every alpha.

    Args:
        samples: ``[..., n, D]``, floating point; the n samples are along ``sample_dim``. n >= 2, or n >= 1 without
            ``fair``.
        target: ``[..., D]`` (one target a row) or ``[..., m, D]`` (as many dimensions as ``samples``; the m targets
            are along ``target_dim``), or a :class:`GaussianTarget`, whose m targets are drawn in the kernel.
        mask: broadcastable to the rows ``[...]``, bool or number; rows where it is 0 contribute nothing and get
            zero gradient, whatever they hold (NaN and Inf included).
        alpha: exponent of the distances, in (0, 2]. Strictly proper below 2.
        tau: weight of the diversity term, in (0, 1].
        sample_dim: the dimension of the samples in ``samples``; 0 for the samples-first layout. Strided views are
            not copied.
        target_dim: the dimension of the targets where ``target`` has one.
        weights: row weights, broadcastable to ``[...]``, non-negative.
        feature_weights: ``[D]``, non-negative, inside the norm: ``|v|^2 = sum_d w_d v_d^2``.
        eps: smoothing of the distance, ``(|v|^2 + eps^2)^(alpha/2)``; keeps gradients bounded for alpha < 1.
        reduction: "mean" (over unmasked rows; over the weights where given; 0 if there are none), "sum", or
            "none" (weighted rows, masked ones 0).
        fair: False divides the second sum by n^2, not by n (n - 1): the mean over all pairs, a sample with itself
            among them, whose distance is 0 (with ``eps`` too). The V-statistic; tau (n - 1) / n in place of tau. One
            sample then has a loss, of no diversity.
        member_mask: bool or number, broadcastable to the shape of ``samples`` without its last dimension. Samples
            where it is 0 are left out, whatever they hold, and get zero gradient: a row's means are over the rest. A
            row with fewer than 2 left (1 without ``fair``) counts as masked. To leave out what is missing:
            ``~samples.isnan().any(-1)``. Takes the eager backend.

    Returns:
        A scalar, or ``[...]`` for "none"; float32 (float64 if an input is float64).

    Raises:
        ValueError: an option out of range, too few samples, shapes or devices that do not fit.
        TypeError: an argument that is no tensor, or not of floating point where that is needed.
    """
    check_energy_loss_options(alpha, tau, eps, reduction, fair)
    few = "at least 2, or fair=False, which defines it for 1" if fair else "at least 1"
    samples_RnD = _checked_samples(samples, sample_dim, 2 if fair else 1, f"the energy loss needs {few}")
    targets_RmD = _checked_target(target, samples, samples_RnD, target_dim)
    _check_terms(samples, tuple(samples_RnD.shape[:-2]), mask, weights, feature_weights)
    members_Rn = None if member_mask is None else _checked_members(member_mask, samples, sample_dim)
    gaussian = target if isinstance(target, GaussianTarget) else None
    if applies("energy_loss", samples, _refusal(weights, feature_weights, members_Rn)):
        # Imported here, so that importing ear_kernels needs no Triton.
        from ear_kernels.ops.energy_loss import autograd
        from ear_kernels.ops.energy_loss.launch import Options

        tau = reference.fair_tau(float(tau), samples_RnD.shape[-2], fair)
        options = Options(float(alpha), tau, float(eps), reduction)
        if gaussian is not None:
            log_std = gaussian.log_std.expand_as(gaussian.mean)
            return autograd.energy_loss_gaussian(
                samples_RnD, gaussian.mean, log_std, gaussian.num_targets, mask, weights, feature_weights, options
            )
        return autograd.energy_loss(samples_RnD, targets_RmD, mask, weights, feature_weights, options)
    if gaussian is not None:
        targets_RmD = reference.draw_gaussian_targets(
            samples_RnD, gaussian.mean, gaussian.log_std, gaussian.num_targets
        )
    return reference.energy_loss(
        samples_RnD, targets_RmD, mask, weights, feature_weights,
        alpha=float(alpha), tau=float(tau), eps=float(eps), reduction=reduction, members_Rn=members_Rn, fair=fair,
    )  # fmt: skip


@takes_tensors
def kernel_score_loss(
    samples: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float = 1.0,
    sample_dim: int = -2,
    target_dim: int = -2,
    weights: Tensor | None = None,
    feature_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Kernel score of n samples against m targets a row (Gneiting & Raftery 2007, section 5; docs/scores.md).

    ``mean_{i != j} k(x_i, x_j) - 2 mean_{i,k} k(x_i, y_k)``, smaller is better

    The energy loss with -k in the place of the distance. Its mean over targets y of a distribution q and samples of p
    is the squared maximum mean discrepancy MMD^2(p, q) less what q alone fixes, so q is its only minimum: both
    kernels are characteristic. All differences, squares and sums are in float32, or in float64 if an input is
    float64. The gradient of a kernel at coincident points is 0.

    Args:
        samples, target, mask, sample_dim, target_dim, weights, feature_weights, reduction: as of
            :func:`energy_loss`, with n >= 2; the target is a tensor, and ``feature_weights`` are inside the norm.
        kernel: "gaussian", ``exp(-|v|^2 / (2 h^2))``, or "laplace", ``exp(-|v| / h)``, of a difference v.
        bandwidth: h, from 1e-30 to 1e30. Points much further apart than h do not feel one another.

    Returns:
        A scalar, or ``[...]`` for "none"; float32 (float64 if an input is float64). A row is between -2 and 1.

    Raises:
        ValueError: an unknown kernel, a bandwidth out of range, too few samples, shapes or devices that do not fit.
        TypeError: an argument that is no tensor, or not of floating point where that is needed.
    """
    check_kernel_score_options(kernel, bandwidth, reduction)
    samples_RnD = _checked_samples(samples, sample_dim, 2, "the kernel score needs at least 2")
    targets_RmD = _checked_target(target, samples, samples_RnD, target_dim)
    _check_terms(samples, tuple(samples_RnD.shape[:-2]), mask, weights, feature_weights)
    if applies("kernel_score_loss", samples, _refusal(weights, feature_weights, None)):
        # Imported here, so that importing ear_kernels needs no Triton.
        from ear_kernels.ops.energy_loss import autograd
        from ear_kernels.ops.energy_loss.launch import Options

        options = Options(1.0 / bandwidth, 1.0, 0.0, reduction, kernel)
        return autograd.energy_loss(samples_RnD, targets_RmD, mask, weights, feature_weights, options)
    return reference.kernel_score_loss(
        samples_RnD, targets_RmD, mask, weights, feature_weights,
        kernel=kernel, bandwidth=float(bandwidth), reduction=reduction,
    )  # fmt: skip


def _check_terms(
    samples: Tensor,
    rows: tuple[int, ...],
    mask: Tensor | None,
    weights: Tensor | None,
    feature_weights: Tensor | None,
) -> None:
    """Mask and weights must broadcast to the rows, feature weights be one a feature."""
    for name, tensor in (("mask", mask), ("weights", weights)):
        if tensor is not None:
            check_real(name, tensor)
            check_device(name, tensor, samples, "samples")
            check_broadcast(name, tensor, rows)
    if feature_weights is not None:
        check_floating("feature_weights", feature_weights)
        check_device("feature_weights", feature_weights, samples, "samples")
        if tuple(feature_weights.shape) != (samples.shape[-1],):
            raise ValueError(
                f"feature_weights have shape {tuple(feature_weights.shape)}; they must be [{samples.shape[-1]}]"
            )


def _checked_samples(samples: Tensor, sample_dim: int, least: int, needs: str) -> Tensor:
    """``[..., n, D]``: the samples, with their dimension in front of the features; ``needs`` says n >= ``least``."""
    check_floating("samples", samples)
    if samples.ndim < 2:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; they must be [..., n, D]")
    samples_RnD = _in_front_of_features(samples, "sample_dim", sample_dim)
    n, features = samples_RnD.shape[-2:]
    if n < least:
        raise ValueError(
            f"samples have {n} sample(s) along dimension {sample_dim} of {tuple(samples.shape)}; {needs}"
        )
    if features < 1:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; the last dimension must hold >= 1 feature")
    return samples_RnD


def _checked_target(target: Tensor | GaussianTarget, samples: Tensor, samples_RnD: Tensor, target_dim: int) -> Tensor:
    """``[..., m, D]``: the targets, or the mean of a GaussianTarget with m = 1."""
    is_gaussian = isinstance(target, GaussianTarget)
    given = target.mean if isinstance(target, GaussianTarget) else target
    name = "target.mean" if is_gaussian else "target"
    check_floating(name, given, "a torch.Tensor or a GaussianTarget")
    check_device(name, given, samples, "samples")
    rows, features = samples_RnD.shape[:-2], samples_RnD.shape[-1]
    targets_RmD = None
    if not is_gaussian and given.ndim == samples.ndim:
        targets_RmD = _in_front_of_features(given, "target_dim", target_dim)
    elif given.ndim == samples.ndim - 1:
        targets_RmD = given.unsqueeze(-2)
    if targets_RmD is None or not _fits(targets_RmD, rows, features):
        raise ValueError(_wrong_target(name, given, samples, rows, features, target_dim, is_gaussian))
    return targets_RmD


def _checked_members(member_mask: Tensor, samples: Tensor, sample_dim: int) -> Tensor:
    """``[..., n]``, or broadcastable to it with as many dimensions: which samples are not left out."""
    check_real("member_mask", member_mask)
    check_device("member_mask", member_mask, samples, "samples")
    shape = tuple(samples.shape[:-1])
    check_broadcast("member_mask", member_mask, shape, "the samples without their features")
    return member_mask.expand(shape).movedim(dimension("sample_dim", sample_dim, samples.ndim), -1)
