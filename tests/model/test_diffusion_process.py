"""The diffusion process against closed forms, numerical integration and a target whose denoiser is known."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from ear_kernels import functional
from ear_model.scores.diffusion_process import DiffusionProcess, cosine_betas, log_likelihood, respaced_times

PROCESS = DiffusionProcess(cosine_betas(1000))


def step_back(process, at, state, output, noise, temperature) -> torch.Tensor:
    """x_{t-1}; noise None is none."""
    after, states = state.clone(), torch.empty_like(state)
    steps = len(process.betas)
    noise = torch.zeros_like(state) if noise is None else noise
    given = noise.unsqueeze(1).expand(-1, steps, -1).contiguous()
    table = process.table(temperature)
    functional.denoise_step(output, after, states, given, table, torch.tensor([at]), 0)
    assert torch.equal(after, states)
    return after


@pytest.mark.parametrize("steps", [1, 2, 37, 1000])
def test_the_schedule_is_the_cosine(steps):
    """The product of 1 - b telescopes to A(u), but for the last step, whose variance is cut at 0.999."""
    process = DiffusionProcess(cosine_betas(steps))
    shares = np.arange(1, steps + 1) / steps
    expected = np.cos((shares + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(process.alpha_bars[:-1], expected[:-1], rtol=1e-9)
    assert process.betas[-1] == 0.999
    assert process.betas.dtype == np.float64


@pytest.mark.parametrize("steps", [2, 37, 1000])
def test_one_step_after_another_is_the_process_at_once(steps):
    """x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) e: the moments step by step are those of diffuse."""
    process = DiffusionProcess(cosine_betas(steps))
    mean, variance = 1.0, 0.0
    for time, beta in enumerate(process.betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        at = torch.tensor([[time]])
        signal = process.diffuse(torch.ones(1, 1, 1).double(), at, torch.zeros(1, 1, 1).double())
        spread = process.diffuse(torch.zeros(1, 1, 1).double(), at, torch.ones(1, 1, 1).double())
        assert (float(signal), float(spread) ** 2) == pytest.approx((mean, variance), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("time", [1, 2, 500, 998, 999])
def test_posterior(time):
    """Of x_{t-1} given x_t and x_0: two Gaussians multiplied, precisions added."""
    before, beta = PROCESS.alpha_bars[time - 1], PROCESS.betas[time]
    start, noise = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    state = PROCESS.diffuse(start, torch.full((5,), time), noise)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * start / (1 - before) + math.sqrt(1 - beta) * state / beta) / precision
    least = torch.cat([noise, -torch.ones(5, 3).double()], 1)
    torch.testing.assert_close(step_back(PROCESS, time, state, least, None, 1.0), mean, rtol=1e-7, atol=1e-9)
    step = torch.randn(5, 3).double()
    found = step_back(PROCESS, time, state, least, step, 0.5) - mean
    torch.testing.assert_close(found, 0.5 * step / math.sqrt(precision), rtol=1e-5, atol=1e-9)
    most = torch.cat([noise, torch.ones(5, 3).double()], 1)
    found = step_back(PROCESS, time, state, most, step, 2.0) - mean
    torch.testing.assert_close(found, 2 * step * math.sqrt(beta), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("time", [1, 300, 999])
def test_bound_is_the_kl_divergence(time):
    """By numerical integration in one dimension, in bits; the loss less the squared error."""
    start, noise = torch.randn(1, 1).double(), torch.randn(1, 1).double()
    predicted, place = noise + 0.3 * torch.randn(1, 1), torch.rand(1, 1).double() * 2 - 1
    at = torch.tensor([time])
    state = PROCESS.diffuse(start, at, noise)
    share = float(place + 1) / 2
    log_variance = share * PROCESS.most_log_variance[time] + (1 - share) * PROCESS.least_log_variance[time]
    true_mean = step_back(PROCESS, time, state, torch.cat([noise, place], 1), None, 1.0)
    mean = step_back(PROCESS, time, state, torch.cat([predicted, place], 1), None, 1.0)
    true = Normal(true_mean, torch.full_like(mean, PROCESS.least_log_variance[time] / 2).exp())
    model = Normal(mean, torch.full_like(mean, log_variance / 2).exp())
    grid = torch.linspace(-12, 12, 200_001).double() * true.scale + true.loc
    kl = torch.trapezoid(true.log_prob(grid).exp() * (true.log_prob(grid) - model.log_prob(grid)), grid)
    loss = PROCESS.loss(torch.cat([predicted, place], 1), start, at, noise)
    expected = (predicted - noise).square() + kl / math.log(2)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-8)


def test_time_0_is_the_likelihood_of_a_bin():
    """Of 8-bit values under the Gaussian, within what the approximation of its distribution is off (3e-4)."""
    start = torch.cat([torch.rand(100, 1).double() * 1.9 - 0.95, torch.tensor([[-1.0], [1.0]]).double()])
    above, log_variance = 0.01 * torch.randn(102, 1).double(), torch.full((102, 1), math.log(0.02**2)).double()
    normal = Normal(start - above, 0.02)
    upper, lower = normal.cdf(start + 1 / 255), normal.cdf(start - 1 / 255)
    upper[-1], lower[-2] = 1.0, 0.0
    torch.testing.assert_close(log_likelihood(start, above, log_variance).exp(), upper - lower, rtol=0, atol=1e-3)
    far = log_likelihood(start, above + 100, log_variance)
    expected = torch.full_like(far, math.log(1e-12))
    expected[-2] = 0.0  # its bin has no end towards the mean
    torch.testing.assert_close(far, expected)
    # In the loss: only at time 0, per dimension, in bits.
    noise, output = torch.randn(102, 1).double(), torch.randn(102, 2).double()
    predicted, place = output.chunk(2, 1)
    share = (place + 1) / 2
    log_variance = share * PROCESS.most_log_variance[0] + (1 - share) * PROCESS.least_log_variance[0]
    likelihood = log_likelihood(start, PROCESS.error[0] * (predicted - noise), log_variance)
    expected = (predicted - noise).square() - likelihood / math.log(2)
    loss = PROCESS.loss(output, start, torch.zeros(102, dtype=torch.long), noise)
    torch.testing.assert_close(loss, expected[:, 0], rtol=1e-9, atol=1e-9)


def test_the_bound_trains_the_variance_alone():
    output = torch.randn(50, 6).double().requires_grad_()
    start, noise = torch.randn(50, 3).double(), torch.randn(50, 3).double()
    times = torch.randint(0, 1000, (50,))
    times[0] = 0
    PROCESS.loss(output, start, times, noise).sum().backward()
    torch.testing.assert_close(output.grad[:, :3], 2 * (output.detach()[:, :3] - noise) / 3, rtol=1e-9, atol=1e-12)
    assert output.grad[1:, 3:].abs().min() > 0


@pytest.mark.parametrize(
    ("times", "steps"), [(1000, 100), (1000, 1000), (1000, 2), (1000, 999), (37, 9), (5, 4), (1, 1)]
)
def test_respacing(times, steps):
    kept = respaced_times(times, steps)
    assert len(set(kept)) == steps
    assert (kept[0], kept[-1]) == (0, times - 1 if steps > 1 else 0)
    exact = np.linspace(0, times - 1, steps)
    assert np.abs(np.array(kept) - exact).max() <= 0.5 + 1e-9
    process = DiffusionProcess(cosine_betas(times))
    found, respaced = process.respaced(steps)
    assert found == kept
    np.testing.assert_allclose(respaced.alpha_bars, process.alpha_bars[kept], rtol=1e-6)


def test_a_single_step_keeps_time_0():
    """As the public code has it: the start is then taken for a token with the least noise."""
    assert respaced_times(1000, 1) == [0]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_respacing(steps):
    with pytest.raises(ValueError, match=rf"diffusion_steps is {steps}; it must be in 1\.\.1000"):
        respaced_times(1000, steps)


@pytest.mark.parametrize("steps", [2, 60])
def test_sampling_a_gaussian(steps):
    """With the exact denoiser, and its variance in the range, a Gaussian is sampled exactly but for its last step.

    Mean and variance of 20,000 samples in 3 dimensions; 6 deviations of each: a sound sampler fails once in 8e7 runs.
    """
    count = 20_000
    mean, variance = torch.tensor([0.5, -2.0, 0.0]).double(), torch.tensor([0.04, 1.5, 1.0]).double()
    _, process = PROCESS.respaced(steps)
    state = torch.randn(count, 3).double()
    for at in reversed(range(steps)):
        bar, noisy = process.alpha_bars[at], 1 - process.alpha_bars[at]
        marginal = bar * variance + noisy
        predicted = math.sqrt(noisy) * (state - math.sqrt(bar) * mean) / marginal
        # What is not known of the noise adds to the posterior's variance.
        wanted = math.exp(process.least_log_variance[at]) + process.error[at] ** 2 * bar * variance / marginal
        least, most = process.least_log_variance[at], process.most_log_variance[at]
        place = 2 * (wanted.log() - least) / (most - least) - 1 if at else torch.zeros(3)
        output = torch.cat([predicted, place.expand(count, 3)], 1)
        state = step_back(process, at, state, output, torch.randn(count, 3).double() if at else None, 1.0)
    bar = process.alpha_bars[0]
    expected = variance * bar * variance / (bar * variance + 1 - bar)  # of the mean of x_0 given the last x
    errors = (state.mean(0) - mean).abs() / (expected / count).sqrt()
    assert errors.max() < 6
    errors = (state.var(0) / expected - 1).abs() / math.sqrt(2 / count)
    assert errors.max() < 6
