"""The expected loss of a forecast N(0, s^2) of observations N(0, 1), over its scale s: docs/score_curves.png.

    python -m benchmarks.score_curves --out docs/score_curves.png

In closed form, so there is nothing to draw. Of a normal difference of variance v, with the gamma function G,

    E |d|^alpha = 2^(alpha/2) G((alpha + 1) / 2) / sqrt(pi) v^(alpha/2)
    E exp(-d^2 / (2 h^2)) = h / sqrt(h^2 + v)        E exp(-|d| / h) = erfcx(sqrt(v / 2) / h)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ALPHAS = (0.5, 1.0, 1.5, 2.0)
COLOURS = ("#0b3f7a", "#1f77d0", "#7ab8f5", "#8a8f98", "#d1480b", "#f2b134")


def distance(alpha: float) -> Callable[[Tensor], Tensor]:
    """What pairs of the energy loss are on average: a function of the variance of their difference."""
    factor = 2 ** (alpha / 2) * math.gamma((alpha + 1) / 2) / math.sqrt(math.pi)
    return lambda variance: factor * variance ** (alpha / 2)


def gaussian_kernel(variance: Tensor, bandwidth: float = 1.0) -> Tensor:
    """Minus the kernel's mean."""
    return -bandwidth / (bandwidth**2 + variance).sqrt()


def laplace_kernel(variance: Tensor, bandwidth: float = 1.0) -> Tensor:
    """Minus the kernel's mean."""
    return -torch.special.erfcx((variance / 2).sqrt() / bandwidth)


CURVES = {f"energy, alpha = {alpha:g}": distance(alpha) for alpha in ALPHAS} | {
    "kernel, Gaussian, h = 1": gaussian_kernel,
    "kernel, Laplace, h = 1": laplace_kernel,
}


def expected_loss(name: str, scale: Tensor) -> Tensor:
    """Of forecasts with these scales, in their dtype: twice sample to observation less sample to sample."""
    return 2 * CURVES[name](1 + scale**2) - CURVES[name](2 * scale**2)


def plot(path: Path) -> None:
    """Write the curves, less the loss of the true forecast, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scale = torch.logspace(-2, 2, 401, base=2, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, colour in zip(CURVES, COLOURS, strict=True):
        excess = expected_loss(name, scale) - expected_loss(name, torch.ones((), dtype=torch.float64))
        axes.plot(scale, excess, color=colour, label=name, linewidth=1.8, linestyle="--" if "kernel" in name else "-")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.set(xlabel="standard deviation of the forecast; that of the observations is 1", ylabel="expected loss")
    axes.set_title("Excess of the expected loss over that of the true forecast", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/score_curves.png"), help="the picture")
    plot(parser.parse_args().out)


if __name__ == "__main__":
    main()
