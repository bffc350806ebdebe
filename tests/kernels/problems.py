"""Calls of the energy loss for tests and for the check on the GPU machine (which may lack Hypothesis)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One call of the energy loss. ``build`` makes its tensors."""

    rows: tuple[int, ...]
    n: int
    m: int
    features: int
    sample_dim: int
    strided: bool
    alpha: float
    tau: float
    eps: float
    reduction: str
    mask: str
    weights: bool
    feature_weights: bool
    coincident: bool
    magnitude: float
    seed: int

    def options(self) -> dict:
        return {"alpha": self.alpha, "tau": self.tau, "eps": self.eps * self.magnitude, "reduction": self.reduction}

    def build(self, dtype: torch.dtype, device: torch.device) -> dict:
        """samples, target, mask, weights, feature_weights; the samples lie along ``sample_dim``."""
        g = torch.Generator().manual_seed(self.seed)
        width = 2 * self.features if self.strided else self.features
        x = torch.randn(*self.rows, self.n, width, generator=g, dtype=torch.float64) * self.magnitude
        y = torch.randn(*self.rows, self.m, width, generator=g, dtype=torch.float64) * self.magnitude
        if self.coincident:
            x[..., 0, :] = x[..., -1, :]
            y[..., 0, :] = x[..., 0, :]
        x, y = x.to(dtype).to(device), y.to(dtype).to(device)
        # The given memory order, then a view: samples in front, or every second feature.
        x = x.movedim(-2, self.sample_dim).contiguous()
        if self.strided:
            x, y = x[..., ::2], y[..., ::2]
        mask = None
        if self.mask != "none":
            keep = torch.rand(self.rows, generator=g) < 0.6
            if self.mask == "nothing":
                keep = torch.zeros(self.rows, dtype=torch.bool)
            if self.mask == "broadcast" and self.rows:
                keep = keep[..., :1]
            bad = ~keep.expand(self.rows)
            x.movedim(self.sample_dim, -2)[bad.to(device)] = float("nan")
            y[bad.to(device)] = float("inf")
            mask = keep.to(device) if self.mask != "number" else keep.float().to(device)
        weights = torch.rand(self.rows, generator=g).to(device) if self.weights else None
        fw = torch.rand(self.features, generator=g).to(device) if self.feature_weights else None
        if fw is not None:
            fw[0] = 1.0
        return {"samples": x, "target": y, "mask": mask, "weights": weights, "feature_weights": fw}


# What a GPU compiles: two dozen structures that cover every switch, instead of hundreds.
STRUCTURES = [
    # rows, n, m, features, sample_dim, strided, alpha, eps, reduction, mask, weights, feature_weights
    ((32,), 2, 1, 16, -2, False, 1.0, 0.0, "mean", "none", False, False),
    ((4, 8), 2, 1, 16, -2, False, 1.0, 0.0, "mean", "some", False, False),
    ((4, 8), 2, 1, 16, 0, False, 1.0, 0.0, "mean", "broadcast", True, False),
    ((40,), 4, 1, 16, -2, False, 1.3, 0.0, "mean", "none", False, False),
    ((40,), 4, 3, 17, -2, True, 0.5, 0.1, "sum", "some", False, True),
    ((3, 5), 3, 2, 40, 1, False, 2.0, 0.0, "none", "some", True, False),
    ((64,), 16, 1, 1, -2, False, 1.0, 0.0, "mean", "none", False, False),
    ((64,), 9, 1, 1, -2, False, 0.5, 0.1, "none", "number", True, True),
    ((6,), 8, 20, 128, 0, False, 1.0, 0.0, "mean", "none", False, False),
    ((6,), 8, 20, 128, 0, False, 1.3, 0.0, "mean", "some", False, True),
    ((2,), 33, 5, 70, -2, False, 1.0, 0.1, "none", "none", False, False),
    ((2,), 8, 1, 3000, -2, False, 1.0, 0.0, "mean", "some", True, True),
    ((16,), 2, 2, 129, -2, False, 1.0, 0.0, "mean", "none", False, False),
    ((4, 3), 4, 3, 257, 0, True, 1.3, 0.1, "none", "some", True, True),
    ((3,), 3, 2, 9000, -2, False, 0.5, 0.1, "none", "some", False, False),
    ((2, 2, 2), 3, 2, 5, 1, True, 1.0, 0.0, "sum", "none", True, True),
    ((), 5, 4, 8, -2, False, 1.0, 0.0, "mean", "nothing", False, False),
]
