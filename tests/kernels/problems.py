"""Calls of the energy loss for tests and for the check on the GPU machine (which may lack Hypothesis)."""

import math
import random
from dataclasses import dataclass

import torch

REDUCTIONS = ("mean", "sum", "none")
MOST_DIFFERENCES = 2**27


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
    fair: bool = True

    def options(self) -> dict:
        return {
            "alpha": self.alpha, "tau": self.tau, "eps": self.eps * self.magnitude, "reduction": self.reduction,
            "fair": self.fair,
        }  # fmt: skip

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


def random_problem(structure: int, data: int, large: bool) -> Problem:
    """Any call: what is compiled is of the number ``structure``, and the rest of ``data``.

    ``large`` for a GPU: rows that fill tiles and whole fields.
    """
    draw = random.Random(structure)
    fair = draw.random() < 0.7
    n = draw.choice((2, 2, 2, 3, 4, 5, 8) if fair else (1, 1, 2, 3, 4))
    features = draw.choice((1, 2, 3, 7, 16, 17, 40, 128, 129, 130, 257))
    m = draw.choice((1, 1, 2, 2, 3, 5))
    sizes = (1, 2, 3, 5)
    if large:
        features = draw.choice((features, features, features, 512, 513, 1000, 2048, 3000, 9000))
        n, m, sizes = draw.choice((n, n, n, 16, 33)), draw.choice((m, m, 20, 100)), (1, 3, 8, 20)
    rows = tuple(draw.choice(sizes) for _ in range(draw.choice((0, 1, 1, 2, 3))))
    # The reference holds all differences in float64, and other tests run beside this one.
    while math.prod(rows) * n * (n + m) * features > MOST_DIFFERENCES:
        rows = tuple(size // 2 + 1 if size > 2 else 1 for size in rows)
    sample_dim, strided = draw.choice((-2, 0, -len(rows) - 2)), draw.random() < 0.3
    mode, smooth, reduction = draw.choice((1.0, 1.0, 2.0, None)), draw.random() < 0.3, draw.choice(REDUCTIONS)
    mask = draw.choice(("none", "none", "some", "broadcast", "number", "nothing"))
    weights, feature_weights = draw.random() < 0.3, draw.random() < 0.3
    draw = random.Random(data)
    return Problem(
        rows, n, m, features, sample_dim, strided, mode or draw.uniform(0.2, 1.98), draw.uniform(0.05, 1.0),
        draw.choice((0.01, 0.1, 1.0)) if smooth else 0.0, reduction, mask, weights, feature_weights,
        draw.random() < 0.4, draw.choice((1.0, 1.0, 1e-3, 300.0)), data, fair,
    )  # fmt: skip


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
