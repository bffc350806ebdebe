"""The Gaussian score: its loss is the logarithmic score up to a factor and a constant."""

import math

import torch
from torch import distributions

from ear_model.config import with_score
from ear_model.scores.gaussian import GaussianScore
from tests.model.conftest import TINY, randomise


def make_score() -> GaussianScore:
    score = GaussianScore(with_score(TINY, "gaussian")).double()
    randomise(score)
    return score


def test_loss_is_the_log_score_but_for_factor_and_constant():
    score, sigma = make_score(), 0.3
    hidden = torch.randn(11, TINY.width, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(11, TINY.token_dim, dtype=torch.float64)
    means = hidden @ score.linear.weight.T + score.linear.bias
    log_score = -distributions.Normal(means, sigma).log_prob(targets).sum(-1).mean()
    factor = TINY.token_dim / (2 * sigma**2)
    constant = TINY.token_dim / 2 * math.log(2 * math.pi * sigma**2)
    loss = score.loss(hidden, targets)
    torch.testing.assert_close(log_score, factor * loss + constant, rtol=1e-10, atol=1e-10)
    parameters = [hidden, *score.parameters()]
    ours, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(log_score, parameters)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(factor * own, other, rtol=1e-8, atol=1e-10)


def test_samples_have_the_mean_and_the_temperature_for_sigma():
    score = make_score()
    hidden, null = torch.randn(2, 5, TINY.width, dtype=torch.float64)
    noise = score.draw_noise(5, like=hidden)
    means, null_means = (each @ score.linear.weight.T + score.linear.bias for each in (hidden, null))
    tokens = score.sample(hidden, null, 2.5, 0.4, noise)
    torch.testing.assert_close(tokens, (2.5 * means - 1.5 * null_means + 0.4 * noise).float())
    torch.testing.assert_close(score.sample(hidden, None, 1.0, 0.0, noise), means.float())
