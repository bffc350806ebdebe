"""The curves of docs/score_curves.png: their least value, their flat one, and the losses they stand for."""

import math
from functools import partial

import pytest
import torch

from benchmarks.score_curves import ALPHAS, CURVES, expected_loss
from ear_kernels import energy_loss, kernel_score_loss

LOSSES = [partial(energy_loss, alpha=alpha) for alpha in ALPHAS]
LOSSES += [partial(kernel_score_loss, kernel=kernel) for kernel in ("gaussian", "laplace")]


@pytest.mark.parametrize("name", CURVES)
def test_the_true_scale_is_the_best_or_any_is(name) -> None:
    scale = torch.linspace(0.2, 3.0, 281, dtype=torch.float64)
    losses = expected_loss(name, scale)
    if name.endswith("= 2"):
        torch.testing.assert_close(losses, torch.full_like(losses, 2.0))
    else:
        assert scale[losses.argmin()].item() == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "loss"), zip(CURVES, LOSSES, strict=True), ids=list(CURVES))
def test_losses_of_samples_have_that_mean(name, loss) -> None:
    """Within 4.9 standard errors: off by chance once in a million."""
    scale = 0.3 + 2 * torch.rand((), dtype=torch.float64)
    samples, target = scale * torch.randn(20_000, 2, 1, dtype=torch.float64), torch.randn(20_000, 1).double()
    rows = loss(samples, target, reduction="none")
    assert abs(rows.mean() - expected_loss(name, scale)) < 4.9 * rows.std() / math.sqrt(len(rows))
