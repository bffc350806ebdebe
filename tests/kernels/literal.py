"""The energy loss once more, a pair at a time, from the formula of docs/model.md: slow, and nothing like the code."""

import torch
from torch import Tensor


def literal_energy_loss(samples, target, mask, weights, feature_weights, *, alpha, tau, reduction, eps) -> Tensor:
    """float64 loss of samples ``[*rows, n, D]`` and targets ``[*rows, m, D]``, differentiable by autograd."""
    rows = samples.shape[:-2]
    n, m, features = samples.shape[-2], target.shape[-2], samples.shape[-1]
    count = max(1, int(torch.tensor(rows).prod())) if rows else 1
    flat_samples = samples.reshape(count, n, features)
    flat_target = target.reshape(count, m, features)
    flat_mask = None if mask is None else mask.expand(rows).reshape(count)
    flat_weights = torch.ones(count).double() if weights is None else weights.expand(rows).reshape(count)
    scale = torch.ones(features).double() if feature_weights is None else feature_weights

    def distance(a: Tensor, b: Tensor) -> Tensor:
        squared = (scale * (a - b) ** 2).sum() + eps**2
        return squared ** (alpha / 2) if float(squared.detach()) > 0 else (0 * (a - b)).sum()

    losses, total = [], torch.zeros(()).double()
    for row in range(count):
        if flat_mask is not None and not bool(flat_mask[row]):
            losses.append(torch.zeros(()).double())
            continue
        x, y = flat_samples[row], flat_target[row]
        to_target = sum(distance(x[i], y[k]) for i in range(n) for k in range(m)) / (n * m)
        between = sum(distance(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        losses.append(flat_weights[row] * (2 * to_target - tau * between))
        total = total + flat_weights[row]
    stacked = torch.stack(losses)
    if reduction == "none":
        return stacked.reshape(rows)
    return stacked.sum() if reduction == "sum" else stacked.sum() / (total if float(total) > 0 else 1)
