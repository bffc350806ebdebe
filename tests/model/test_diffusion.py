"""The diffusion score: its loss, its sampling, and what it refuses."""

import inspect
from dataclasses import replace

import pytest
import torch

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, with_score
from ear_model.draws import Draws, ImageDraws
from ear_model.ear import EAR
from ear_model.model.weights import public_key
from ear_model.scores.diffusion import DenoisingMLP
from tests.model.conftest import TINY, randomise

CONFIG = replace(with_score(TINY, "diffusion"), diffusion_steps=20, num_samples=3)
STEPS = {"diffusion_steps": 6}


@pytest.fixture
def score():
    score = randomise(EAR(CONFIG)).score
    score.net.final_layer.linear.weight.data.mul_(0.1)
    return score


def rows(count, score=None):
    hidden, null = torch.randn(2, count, CONFIG.width).unbind()
    noise = torch.randn(count, 6 * CONFIG.token_dim)
    return hidden, null, noise


def test_the_loss_is_the_mean_over_rows_and_levels(score):
    hidden, targets = torch.randn(5, CONFIG.width), torch.randn(5, 4)
    times, noise = torch.randint(0, 20, (5, 3)), torch.randn(5, 3, 4)
    loss = score.loss_of(hidden, targets, times, noise)
    alone = [
        score.loss_of(hidden[i : i + 1], targets[i : i + 1], times[i : i + 1, k : k + 1], noise[i : i + 1, k : k + 1])
        for i in range(5)
        for k in range(3)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    assert loss.dtype == torch.float32
    drawn = {score.loss(hidden, targets).item() for _ in range(3)}
    assert len(drawn) == 3
    assert float(score.loss(hidden[:0], targets[:0])) == 0


def test_the_noise_levels_are_uniform(score, monkeypatch):
    """Each of 20 of 60,000 draws within 6 deviations: a uniform draw fails once in 2e7 runs."""
    seen = []
    monkeypatch.setattr(score, "loss_of", lambda hidden, targets, times, noise: seen.append((times, noise)))
    score.loss(torch.zeros(20_000, CONFIG.width), torch.zeros(20_000, 4))
    (times, noise), count = seen[0], 60_000
    assert (times.shape, noise.shape) == ((20_000, 3), (20_000, 3, 4))
    errors = times.flatten().bincount(minlength=20) - count / 20
    assert errors.abs().max() < 6 * (count / 20 * 0.95) ** 0.5

    class Last(Draws):
        def rand(self, *shape, device="cpu"):
            return torch.full(shape, 1 - 2**-24)

    score.loss(torch.zeros(2, CONFIG.width), torch.zeros(2, 4), Last())
    assert torch.equal(seen[1][0], torch.full((2, 3), 19))


def test_layers_one_by_one_are_the_operation(score):
    """A hook makes the network call its layers."""
    states, times, hidden = torch.randn(7, 3, 4), torch.randint(0, 20, (7, 3)), torch.randn(7, CONFIG.width)
    expected = score.net(states, times, hidden)
    seen = []
    score.net.res_blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(1))
    torch.testing.assert_close(score.net(states, times, hidden), expected, rtol=1e-5, atol=1e-5)
    assert seen == [1]


@pytest.mark.parametrize("count", [0, 1, 5])
@torch.no_grad()
def test_sampling_is_a_function_of_its_arguments(score, count):
    hidden, null, noise = rows(count)
    first = score.sample(hidden, null, 2.0, 0.9, noise, **STEPS)
    assert (first.shape, first.dtype) == ((count, 4), torch.float32)
    assert torch.equal(score.sample(hidden, null, 2.0, 0.9, noise, **STEPS), first)
    for row in range(count):
        alone = score.sample(hidden[row, None], null[row, None], 2.0, 0.9, noise[row, None], **STEPS)
        torch.testing.assert_close(alone[0], first[row], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_guidance(score):
    hidden, null, noise = rows(5)
    plain = score.sample(hidden, None, 1.0, 1.0, noise, **STEPS)
    torch.testing.assert_close(score.sample(hidden, null, 1.0, 1.0, noise, **STEPS), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score.sample(null, hidden, 0.0, 1.0, noise, **STEPS).shape, plain.shape)
    # One step from the start: the mixed noise alone, without what the variance adds.
    one = noise[:, :4]
    times = torch.zeros(5, 1, dtype=torch.long)
    known, other = (score.net(one.unsqueeze(1), times, each)[:, 0, :4] for each in (hidden, null))
    beta = score.process.betas[0]
    mixed = other + 2.5 * (known - other)
    expected = (one - beta**0.5 * mixed) / (1 - beta) ** 0.5
    found = score.sample(hidden, null, 2.5, 1.0, one, diffusion_steps=1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_temperature_is_of_the_steps_not_of_the_start(score):
    hidden, _, noise = rows(5)
    other = torch.cat([noise[:, :4], torch.randn(5, 20)], 1)
    cold = score.sample(hidden, None, 1.0, 0.0, noise, **STEPS)
    assert torch.equal(score.sample(hidden, None, 1.0, 0.0, other, **STEPS), cold)
    assert not torch.equal(score.sample(hidden, None, 1.0, 0.0, -noise, **STEPS), cold)
    double = torch.cat([noise[:, :4], 2 * noise[:, 4:]], 1)
    torch.testing.assert_close(
        score.sample(hidden, None, 1.0, 2.0, noise, **STEPS), score.sample(hidden, None, 1.0, 1.0, double, **STEPS)
    )


def test_noise(score):
    draws = ImageDraws(3, [4, 5])
    noise = score.draw_noise(2, 7, like=torch.zeros(1), draws=draws, **STEPS)
    assert (noise.shape, noise.dtype) == ((2, 7, 24), torch.float32)
    alone = score.draw_noise(1, 7, like=torch.zeros(1), draws=ImageDraws(3, [5]), **STEPS)
    assert torch.equal(alone[0], noise[1])


def test_autocast_and_half_weights():
    model = randomise(EAR(CONFIG))
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.score.parameters())
    sampled = (
        model.bfloat16()
        .eval()
        .score.sample(torch.randn(2, 16).bfloat16(), None, 1.0, 1.0, torch.randn(2, 8), diffusion_steps=2)
    )
    assert sampled.dtype == torch.float32


def test_public_names_and_start():
    net = DenoisingMLP(6, 8, 4, depth=2)
    keys = [public_key(f"score.net.{name}", "diffusion") for name, _ in net.named_parameters()]
    assert keys[:8] == [
        f"diffloss.net.{name}.{kind}"
        for name in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj")
        for kind in ("weight", "bias")
    ]
    output = net(torch.randn(3, 2, 4), torch.randint(0, 9, (3, 2)), torch.randn(3, 6))
    assert torch.equal(output, torch.zeros(3, 2, 8))


@pytest.mark.parametrize("steps", [0, 21])
def test_impossible_steps(score, steps):
    model = EAR(CONFIG)
    hidden, _, noise = rows(2)
    message = rf"diffusion_steps is {steps}; it must be at least 1|diffusion_steps is {steps}; "
    with pytest.raises(ValueError, match=message):
        model.sample(torch.tensor([1]), diffusion_steps=steps)
    with pytest.raises(ValueError, match=message):
        score.draw_noise(2, 1, like=noise, diffusion_steps=steps)
    with pytest.raises(ValueError, match=message):
        score.sample(hidden, None, 1.0, 1.0, noise, diffusion_steps=steps)
    with pytest.raises(ValueError, match="noise has 24 numbers a token; 5 diffusion steps of tokens of 4 need 20"):
        score.sample(hidden, None, 1.0, 1.0, noise, diffusion_steps=5)


def test_a_run_of_more_steps_than_levels():
    with pytest.raises(ValueError, match="diffusion_steps is 100; it must not exceed the model's, 20"):
        RunConfig(model=CONFIG)
    assert RunConfig(model=CONFIG, sampling=SamplingConfig(diffusion_steps=20)).sampling.diffusion_steps == 20


def test_options_reach_the_score():
    parameters = inspect.signature(EAR.sample).parameters
    assert parameters["diffusion_steps"].default == SamplingConfig().diffusion_steps
    assert ModelConfig().diffusion_steps == 1000
