"""Hypothesis strategies for the energy loss: structures (what is compiled) and data (drawn from a seed)."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


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


ALPHAS = (1.0, 2.0, 0.5, 1.3)


@st.composite
def problems(draw, magnitudes=(1.0, 1e-3, 300.0)) -> Problem:
    """Any structure: for the interpreter, which compiles nothing."""
    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    return Problem(
        rows=rows,
        n=draw(st.sampled_from((2, 2, 3, 4, 5))),
        m=draw(st.sampled_from((1, 1, 2, 3))),
        features=draw(st.sampled_from((1, 1, 2, 3, 8, 16, 17, 40))),
        sample_dim=draw(st.integers(-len(rows) - 2, -2)),
        strided=draw(st.booleans()),
        alpha=draw(st.sampled_from((*ALPHAS, 0.7, 1.9))),
        tau=draw(st.sampled_from((1.0, 0.99, 0.5))),
        eps=draw(st.sampled_from((0.0, 0.0, 0.1))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        mask=draw(st.sampled_from(("none", "none", "some", "broadcast", "number", "nothing"))),
        weights=draw(st.booleans()),
        feature_weights=draw(st.booleans()),
        coincident=draw(st.booleans()),
        magnitude=draw(st.sampled_from(magnitudes)),
        seed=draw(st.integers(0, 2**31)),
    )


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
    ((3,), 3, 2, 9000, -2, False, 0.5, 0.1, "none", "some", False, False),
    ((2, 2, 2), 3, 2, 5, 1, True, 1.0, 0.0, "sum", "none", True, True),
    ((), 5, 4, 8, -2, False, 1.0, 0.0, "mean", "nothing", False, False),
]


@st.composite
def gpu_problems(draw, magnitudes=(1.0, 1e-3, 300.0)) -> Problem:
    """One of ``STRUCTURES`` with any data."""
    rows, n, m, features, sample_dim, strided, alpha, eps, reduction, mask, weights, fw = draw(
        st.sampled_from(STRUCTURES)
    )
    # The number of a general alpha is no structure: it is an argument of the kernel.
    alpha = alpha if alpha in (1.0, 2.0) else draw(st.floats(0.3, 1.95))
    return Problem(
        rows, n, m, features, sample_dim, strided, alpha, draw(st.floats(0.1, 1.0)), eps, reduction, mask, weights, fw,
        coincident=draw(st.booleans()), magnitude=draw(st.sampled_from(magnitudes)), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
