"""What users run today: the energy loss as the public EAR and CALM codes compute it, in plain PyTorch.

Written here from their formulas, with their order of operations and their intermediate tensors, because those are
what is measured. Samples are ``[rows, n, D]`` for EAR and ensembles, ``[n, rows, D]`` for CALM.
"""

import torch
from torch import Tensor


def ear_loss(samples: Tensor, target: Tensor) -> Tensor:
    """n samples against one target a row: distances by differences, the pairs of samples by index."""
    n = samples.shape[1]
    fidelity = (samples - target.unsqueeze(1)).norm(dim=-1).mean(dim=1)
    first, second = torch.triu_indices(n, n, offset=1, device=samples.device)
    diversity = (samples[:, first] - samples[:, second]).norm(dim=-1).mean(dim=1)
    return (2 * fidelity - diversity).mean()


def calm_loss(samples: Tensor, mean: Tensor, log_std: Tensor, num_targets: int) -> Tensor:
    """n samples in front against m draws: an ``[n, m, rows, D]`` tensor of differences."""
    n = samples.shape[0]
    noise = torch.randn(num_targets, *mean.shape, device=mean.device, dtype=mean.dtype)
    targets = mean + torch.exp(log_std) * noise
    fidelity = (samples.unsqueeze(1) - targets.unsqueeze(0)).norm(dim=-1).mean(dim=(0, 1))
    between = (samples.unsqueeze(0) - samples.unsqueeze(1)).norm(dim=-1).sum(dim=(0, 1)) / (n * (n - 1))
    return (2 * fidelity - between).mean()


def cdist_energy_distance(x: Tensor, y: Tensor, chunk: int = 10_000) -> Tensor:
    """Energy distance from ``torch.cdist`` in chunks of rows, which is what fits into memory."""
    totals = [
        sum(torch.cdist(a[i : i + chunk], b).sum(dtype=torch.float64) for i in range(0, len(a), chunk))
        for a, b in ((x, y), (x, x), (y, y))
    ]
    m, n = len(x), len(y)
    return 2 * totals[0] / (m * n) - totals[1] / (m * (m - 1)) - totals[2] / (n * (n - 1))
