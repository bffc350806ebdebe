"""The energy loss and the kernel score in plain PyTorch: the oracle of the kernels and the path without a GPU.

Shapes (suffixes): R rows (any number of leading dimensions), n samples, m targets, D features, P pairs.
"""

import torch
from torch import Tensor

from ear_kernels.runtime.backend import forward_mode_is_active

CHUNK_ELEMENTS = 1 << 24
"""Distances that :func:`pairwise_sum` holds at a time."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise: halves are never subtracted or squared as halves."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _norm_and_direction(difference_RPD: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean norms [R, P] and unit vectors [R, P, D]; both are 0 where the difference is 0.

    The difference is divided by its largest absolute component before it is squared, so that no square overflows
    or underflows where the norm itself is representable.
    """
    largest = difference_RPD.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    scaled = difference_RPD / torch.where(is_zero, 1.0, largest)
    squares = scaled.square().sum(dim=-1, keepdim=True)
    length = torch.where(is_zero, 1.0, squares).sqrt()
    norm = torch.where(is_zero, 0.0, largest * length)
    return norm.squeeze(-1), scaled / length


class _DistancePower(torch.autograd.Function):
    """``|v|^alpha`` over the last dimension with the gradient ``alpha |v|^(alpha-1) v/|v|``, and 0 at v = 0.

    Autograd's own chain would multiply by ``|v|^alpha`` and divide by ``|v|`` again, which overflows or vanishes
    where the gradient itself is representable, and gives NaN at v = 0 for alpha < 1.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(difference: Tensor, alpha: float) -> Tensor:
        norm, _ = _norm_and_direction(difference)
        return norm if alpha == 1 else norm.pow(alpha)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        difference, ctx.alpha = inputs
        ctx.save_for_backward(difference)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (difference,) = ctx.saved_tensors
        norm, direction = _norm_and_direction(difference)
        if ctx.alpha != 1:
            slope = ctx.alpha * torch.where(norm == 0, 1.0, norm).pow(ctx.alpha - 1)
            gradient = gradient * slope
        return gradient.unsqueeze(-1) * direction, None


def _plain_distance_power(difference: Tensor, alpha: float) -> Tensor:
    """:class:`_DistancePower` by torch's own derivatives, which exist in forward mode at any depth.

    They are 0 at v = 0, too, and overflow only where ``|v|^alpha`` does.
    """
    norm, _ = _norm_and_direction(difference)
    is_zero = norm == 0
    return norm if alpha == 1 else torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, norm).pow(alpha))


def distance_power(difference_RPD: Tensor, alpha: float, eps: float = 0.0) -> Tensor:
    """``|v|^alpha``, or ``(|v|^2 + eps^2)^(alpha/2)`` with ``eps`` > 0, over the last dimension.

    Any number of derivatives; the first one is 0 at v = 0 for every alpha in (0, 2].
    """
    if eps > 0:
        # The smoothed distance is the plain distance of a vector with one more component, eps.
        padding = difference_RPD.new_full((*difference_RPD.shape[:-1], 1), eps)
        difference_RPD = torch.cat([difference_RPD, padding], dim=-1)
    if not torch.compiler.is_compiling() and forward_mode_is_active():
        return _plain_distance_power(difference_RPD, alpha)
    return _DistancePower.apply(difference_RPD, alpha)


def draw_gaussian_targets(samples_RnD: Tensor, mean_RD: Tensor, log_std_RD: Tensor, num_targets: int) -> Tensor:
    """``mean + exp(log_std) * normal``, [R, m, D] in the working dtype; differentiable in mean and log_std."""
    dtype = working_dtype(samples_RnD, mean_RD, log_std_RD)
    mean_RD, log_std_RD = mean_RD.to(dtype), log_std_RD.to(dtype).expand_as(mean_RD)
    normals_RmD = torch.randn(*mean_RD.shape[:-1], num_targets, mean_RD.shape[-1], dtype=dtype, device=mean_RD.device)
    return mean_RD.unsqueeze(-2) + log_std_RD.exp().unsqueeze(-2) * normals_RmD


def differences(samples_RnD: Tensor, targets_RmD: Tensor, feature_weights_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples less targets [R, n, m, D] and samples i less j for i < j [R, P, D], times the roots of the weights."""
    n = samples_RnD.shape[-2]
    first, second = torch.triu_indices(n, n, offset=1, device=samples_RnD.device)
    to_targets_RnmD = samples_RnD.unsqueeze(-2) - targets_RmD.unsqueeze(-3)
    between_RPD = samples_RnD.index_select(-2, first) - samples_RnD.index_select(-2, second)
    if feature_weights_D is not None:
        root_D = feature_weights_D.sqrt()
        to_targets_RnmD, between_RPD = to_targets_RnmD * root_D, between_RPD * root_D
    return to_targets_RnmD, between_RPD


def energy_loss_rows(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    alpha: float,
    tau: float,
    feature_weights_D: Tensor | None = None,
    eps: float = 0.0,
    members_Rn: Tensor | None = None,
    fair: bool = True,
) -> Tensor:
    """Loss of every row, [R], in the dtype of the inputs: the general form of paper Eq. 10 (docs/model.md).

    ``2 mean_{i,k} |x_i - y_k|^alpha - tau mean_{i != j} |x_i - x_j|^alpha``, where i and j are those of the
    ``members``; without ``fair`` the second sum is divided by their number squared. A mean of nothing is 0.
    """
    n, m = samples_RnD.shape[-2], targets_RmD.shape[-2]
    first, second = torch.triu_indices(n, n, offset=1, device=samples_RnD.device)
    to_targets_RnmD, between_RPD = differences(samples_RnD, targets_RmD, feature_weights_D)
    to_targets_Rnm = distance_power(to_targets_RnmD, alpha, eps)
    between_RP = distance_power(between_RPD, alpha, eps)
    if members_Rn is None:
        diversity = between_RP.sum(dim=-1) / max(1, first.numel())
        return 2 * to_targets_Rnm.mean(dim=(-2, -1)) - fair_tau(tau, n, fair) * diversity
    # With eps a member that was left out, and replaced by 0, would still give a distance.
    to_targets_Rnm = torch.where(members_Rn.unsqueeze(-1), to_targets_Rnm, 0.0)
    both_RP = members_Rn.index_select(-1, first) & members_Rn.index_select(-1, second)
    between_RP = torch.where(both_RP, between_RP, 0.0)
    count_R = members_Rn.sum(dim=-1).clamp(min=1).to(between_RP.dtype)
    others_R = count_R - 1 if fair else count_R
    pairs_R = (count_R * others_R).clamp(min=1)
    return 2 * (to_targets_Rnm.sum(dim=(-2, -1)) / (m * count_R) - tau * between_RP.sum(dim=-1) / pairs_R)


def fair_tau(tau: float, n: int, fair: bool) -> float:
    """What multiplies the mean over pairs of different samples: without ``fair`` the mean is over all n^2 pairs."""
    return tau if fair else tau * (n - 1) / n


def energy_loss(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    *,
    alpha: float,
    tau: float,
    eps: float,
    reduction: str,
    members_Rn: Tensor | None = None,
    fair: bool = True,
) -> Tensor:
    """The reduced energy loss; arguments as checked by :func:`ear_kernels.energy_loss`."""
    dtype = working_dtype(samples_RnD, targets_RmD)
    samples_RnD, targets_RmD = samples_RnD.to(dtype), targets_RmD.to(dtype)
    if members_Rn is not None:
        members_Rn = members_Rn.bool().expand(samples_RnD.shape[:-1])
        samples_RnD = torch.where(members_Rn.unsqueeze(-1), samples_RnD, 0.0)
        # A row that has no loss, because too few are left, is one that is masked.
        enough_R = members_Rn.sum(dim=-1) >= (2 if fair else 1)
        mask_R = enough_R if mask_R is None else enough_R & mask_R.bool()
    samples_RnD, targets_RmD = zeros_where_masked(mask_R, samples_RnD, targets_RmD)
    if feature_weights_D is not None:
        feature_weights_D = feature_weights_D.to(dtype)
    rows_R = energy_loss_rows(samples_RnD, targets_RmD, alpha, tau, feature_weights_D, eps, members_Rn, fair)
    return reduced(rows_R, mask_R, weights_R, reduction)


def zeros_where_masked(mask_R: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``[R, n, D]`` each, 0 in masked rows.

    Before the first subtraction: a masked row may hold NaN or Inf, and 0 * NaN is NaN in its gradient too.
    """
    if mask_R is None:
        return tensors
    keep = mask_R.bool()[..., None, None]
    return tuple(torch.where(keep, tensor, 0.0) for tensor in tensors)


def reduced(rows_R: Tensor, mask_R: Tensor | None, weights_R: Tensor | None, reduction: str) -> Tensor:
    """Losses of rows by "mean", "sum" or "none"; a masked row counts as none, whatever it is."""
    dtype = rows_R.dtype
    row_weights_R = torch.ones_like(rows_R) if weights_R is None else weights_R.to(dtype).expand_as(rows_R)
    if mask_R is not None:
        row_weights_R = torch.where(mask_R.bool(), row_weights_R, 0.0)
        # With eps or a kernel a masked row would still give a number; with Inf in a weight it would give NaN.
        rows_R = torch.where(mask_R.bool(), rows_R, 0.0)
    weighted_R = rows_R if weights_R is None and mask_R is None else rows_R * row_weights_R
    if reduction == "none":
        return weighted_R
    total = weighted_R.sum()
    if reduction == "sum":
        return total
    weight = row_weights_R.sum()
    return total / torch.where(weight == 0, 1.0, weight)


def kernel_value(difference_RPD: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """``exp(-|v|^2 / (2 h^2))`` ("gaussian") or ``exp(-|v| / h)`` ("laplace") over the last dimension.

    Any number of derivatives; the first one is 0 at v = 0. Divided first, so that no square overflows or vanishes
    where the kernel is neither 0 nor 1.
    """
    if kernel == "laplace":
        return torch.exp(-distance_power(difference_RPD, 1.0) / bandwidth)
    # Beyond 1e30 the kernel is 0, and so is its gradient, which an infinite quotient would make NaN.
    scaled_RPD = (difference_RPD / bandwidth).clamp(-1e30, 1e30)
    return torch.exp(-0.5 * scaled_RPD.square().sum(dim=-1))


def kernel_score_loss(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    *,
    kernel: str,
    bandwidth: float,
    reduction: str,
) -> Tensor:
    """The reduced kernel score; arguments as checked by :func:`ear_kernels.kernel_score_loss`."""
    dtype = working_dtype(samples_RnD, targets_RmD)
    samples_RnD, targets_RmD = zeros_where_masked(mask_R, samples_RnD.to(dtype), targets_RmD.to(dtype))
    weights_D = None if feature_weights_D is None else feature_weights_D.to(dtype)
    to_targets_Rnm, between_RP = (
        kernel_value(each, kernel, bandwidth) for each in differences(samples_RnD, targets_RmD, weights_D)
    )
    rows_R = between_RP.mean(dim=-1) - 2 * to_targets_Rnm.mean(dim=(-2, -1))
    return reduced(rows_R, mask_R, weights_R, reduction)


def pairwise_sum(x_MD: Tensor, y_ND: Tensor, alpha: float, same: bool) -> Tensor:
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
