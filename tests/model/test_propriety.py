"""Every score is proper: of several forecasts the true distribution has the least expected loss.

The truth is two Gaussians whose coordinates go together; the forecasts are wrong in one way each. A forecast's and
the truth's losses are compared on the same observations and random numbers, which are drawn anew in every run: over
ROWS of them the mean difference is normal, and it has to be Z of its standard errors above 0. A score that ranks a
wrong forecast as high as the truth passes with a probability of at most 1e-6 a comparison; expected differences are
11 standard errors and more, so that a proper one fails far less often. Where scores are blind, the difference has to
be within Z_BOTH.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, distributions

from ear_kernels import energy_loss, kernel_score_loss
from ear_model.scores.diffusion_process import DiffusionProcess, cosine_betas
from ear_model.scores.mixture import Mixture

ROWS, SAMPLES = 20_000, 6
Z, Z_BOTH = 4.76, 4.9  # one side and both sides of 1e-6


@dataclass(frozen=True)
class Forecast:
    """A mixture of k diagonal Gaussians in the plane, float64."""

    weights_k: Tensor
    means_kD: Tensor
    scales_kD: Tensor

    def sample(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Points ``[*shape, D]``; generators of one seed give all forecasts the same random numbers."""
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        normal_D = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
        chosen = torch.bucketize(uniform, self.weights_k.cumsum(0)[:-1])
        return self.means_kD[chosen] + self.scales_kD[chosen] * normal_D

    def mean(self) -> Tensor:
        return self.weights_k @ self.means_kD

    def mixture(self) -> Mixture:
        """As the mixture score predicts it, of one row."""
        return Mixture(self.weights_k.log()[None], self.means_kD[None], self.scales_kD.log()[None])

    def noise(self, points_RD: Tensor, signal_R1: Tensor, spread_R1: Tensor) -> Tensor:
        """The noise ``[R, D]`` to expect in ``signal x + spread e`` if x is of this forecast: minus the spread times
        the gradient of the log-density there."""
        scales_RkD = (signal_R1.unsqueeze(1) * self.scales_kD).square().add(spread_R1.unsqueeze(1).square()).sqrt()
        away_RkD = points_RD.unsqueeze(1) - signal_R1.unsqueeze(1) * self.means_kD
        log_Rk = self.weights_k.log() - (0.5 * (away_RkD / scales_RkD).square() + scales_RkD.log()).sum(-1)
        return spread_R1 * (log_Rk.softmax(-1).unsqueeze(-1) * away_RkD / scales_RkD.square()).sum(1)

    def cells(self) -> Tensor:
        """Probabilities ``[16]`` of the cells of :func:`cell_of`."""
        normal = distributions.Normal(self.means_kD, self.scales_kD)
        below = torch.stack([normal.cdf(edge) for edge in EDGES])
        ends = torch.zeros(1, *below.shape[1:], dtype=torch.float64)
        column, row = torch.cat([ends, below, ends + 1]).diff(dim=0).unbind(-1)  # [4, k] each
        return torch.einsum("k,ik,jk->ij", self.weights_k, column, row).flatten()


EDGES = torch.tensor([-1.5, 0.0, 1.5], dtype=torch.float64)


def cell_of(points_RD: Tensor) -> Tensor:
    """The plane as 16 words: the number of the cell that a point lies in."""
    column, row = torch.bucketize(points_RD.contiguous(), EDGES).unbind(-1)
    return 4 * column + row


def forecast(means: list[list[float]], scale: float = 0.7) -> Forecast:
    means_kD = torch.tensor(means, dtype=torch.float64)
    return Forecast(torch.full((len(means),), 1 / len(means)).double(), means_kD, torch.full_like(means_kD, scale))


TRUTH = forecast([[-1.5, -1.5], [1.5, 1.5]])
SAME_MEAN = {
    "narrowed": replace(TRUTH, means_kD=0.6 * TRUTH.means_kD, scales_kD=0.6 * TRUTH.scales_kD),
    "widened": replace(TRUTH, means_kD=1.6 * TRUTH.means_kD, scales_kD=1.6 * TRUTH.scales_kD),
    # The same coordinates, drawn one by one.
    "decorrelated": forecast([[-1.5, -1.5], [1.5, -1.5], [-1.5, 1.5], [1.5, 1.5]]),
}
OTHER_MEAN = {
    "shifted": replace(TRUTH, means_kD=TRUTH.means_kD + 0.6),
    "mode dropped": forecast([[1.5, 1.5]]),
}
WRONG = SAME_MEAN | OTHER_MEAN


def of_samples(loss: Callable[..., Tensor], forecast: Forecast, observations_RD: Tensor, seed: int) -> Tensor:
    samples_RnD = forecast.sample(len(observations_RD), SAMPLES, generator=torch.Generator().manual_seed(seed))
    return loss(samples_RnD, observations_RD, reduction="none")


PROCESS = DiffusionProcess(cosine_betas(100))


def of_diffusion(forecast: Forecast, observations_RD: Tensor, seed: int) -> Tensor:
    """The loss of the noise that the forecast expects at a random time, and of variances at their lower end."""
    generator = torch.Generator().manual_seed(seed)
    times_R = torch.randint(1, len(PROCESS.betas), (len(observations_RD),), generator=generator)
    noise_RD = torch.randn(observations_RD.shape, generator=generator, dtype=torch.float64)
    noised_RD = PROCESS.diffuse(observations_RD, times_R, noise_RD)
    signal_R1, spread_R1 = (torch.from_numpy(each)[times_R, None] for each in (PROCESS.signal, PROCESS.noise))
    predicted_RD = forecast.noise(noised_RD, signal_R1, spread_R1)
    output = torch.cat([predicted_RD, -torch.ones_like(predicted_RD)], dim=-1)
    return PROCESS.loss(output, observations_RD, times_R, noise_RD)


# How each score scores a forecast: losses [R] of observations [R, D] and, for what it draws, a seed.
ADAPTERS: dict[str, Callable[[Forecast, Tensor, int], Tensor]] = {
    "energy, alpha 0.5": partial(of_samples, partial(energy_loss, alpha=0.5)),
    "energy": partial(of_samples, energy_loss),
    "energy, alpha 1.5": partial(of_samples, partial(energy_loss, alpha=1.5)),
    "energy, alpha 2": partial(of_samples, partial(energy_loss, alpha=2.0)),
    "kernel, gaussian": partial(of_samples, partial(kernel_score_loss, kernel="gaussian", bandwidth=math.sqrt(2))),
    "kernel, laplace": partial(of_samples, partial(kernel_score_loss, kernel="laplace", bandwidth=math.sqrt(2))),
    "diffusion": of_diffusion,
    "mixture": lambda forecast, points_RD, seed: -forecast.mixture().log_density(points_RD[None])[0],
    "categorical": lambda forecast, points_RD, seed: -forecast.cells().log()[cell_of(points_RD)],
    "gaussian": lambda forecast, points_RD, seed: (forecast.mean() - points_RD).square().sum(-1),
}
BLIND = ("energy, alpha 2", "gaussian")
"""Proper, but not strictly: they see the mean only. The Gaussian of fixed width is strictly proper in its family."""
STRICT = tuple(name for name in ADAPTERS if name not in BLIND)


def expected_loss(name: str, forecast: Forecast, observations_RD: Tensor, seed: int = 0) -> Tensor:
    """The losses ``[R]`` of a score, whose mean is the expected loss of a forecast."""
    return ADAPTERS[name](forecast, observations_RD, seed)


def standard_errors(name: str, wrong: Forecast) -> float:
    """By how many of its standard errors the mean loss of a forecast is above that of the truth."""
    observations_RD, seed = TRUTH.sample(ROWS), int(torch.randint(2**31, ()))
    wrong_R, true_R = (expected_loss(name, each, observations_RD, seed) for each in (wrong, TRUTH))
    difference_R = wrong_R - true_R
    return (difference_R.mean() / (difference_R.std() / math.sqrt(ROWS)).clamp(min=1e-12)).item()


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", STRICT)
def test_a_wrong_forecast_scores_worse(name: str, how: str) -> None:
    assert standard_errors(name, WRONG[how]) > Z


@pytest.mark.parametrize("how", OTHER_MEAN)
@pytest.mark.parametrize("name", BLIND)
def test_a_wrong_mean_is_seen_by_all(name: str, how: str) -> None:
    assert standard_errors(name, WRONG[how]) > Z


@pytest.mark.parametrize("how", SAME_MEAN)
@pytest.mark.parametrize("name", BLIND)
def test_blindness_to_all_but_the_mean(name: str, how: str) -> None:
    """At alpha = 2 the energy loss is 2 |mean - y|^2 in expectation, and distributions of equal means score alike."""
    assert abs(standard_errors(name, SAME_MEAN[how])) < Z_BOTH


@pytest.mark.parametrize("name", ["energy", "kernel, gaussian", "kernel, laplace"])
def test_the_number_of_samples_does_not_matter(name: str) -> None:
    """The loss over pairs i != j is unbiased: its expectation is that of two samples."""
    observations_RD = TRUTH.sample(ROWS)
    loss = ADAPTERS[name].args[0]
    few, many = (loss(TRUTH.sample(ROWS, n), observations_RD, reduction="none") for n in (2, 7))
    difference_R = few - many
    assert abs(difference_R.mean()) < Z_BOTH * difference_R.std() / math.sqrt(ROWS)


def test_the_cells_are_those_of_the_samples() -> None:
    counts = torch.bincount(cell_of(TRUTH.sample(ROWS)), minlength=16)
    cells = TRUTH.cells()
    assert cells.sum().item() == pytest.approx(1)
    deviations = (counts - ROWS * cells) / (ROWS * cells * (1 - cells)).sqrt().clamp(min=1.0)
    assert deviations.abs().max() < 6
