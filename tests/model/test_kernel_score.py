"""The kernel score as a score of the framework: its loss, its samples, its options."""

import math
from dataclasses import replace

import pytest
import torch

from ear_kernels import kernel_score_loss
from ear_model.config import ModelConfig, from_dict, to_dict, with_score
from ear_model.ear import EAR
from ear_model.presets import EAR_BASE
from ear_model.scores import EnergyScore, make_score
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, randomise, tiny_run

KERNEL = with_score(TINY, "kernel")


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_the_loss_is_the_kernel_score_of_the_generator_s_samples(kernel, rows) -> None:
    score = randomise(make_score(replace(KERNEL, kernel=kernel, bandwidth=0.7, num_samples=3)))
    hidden, targets = torch.randn(rows, TINY.width, requires_grad=True), torch.randn(rows, TINY.token_dim)
    noise = score.draw_noise(rows, 3, like=hidden)
    loss = score.loss_of(hidden, targets, noise)
    samples = score.generator(hidden, noise)
    wanted = kernel_score_loss(samples, targets, kernel=kernel, bandwidth=0.7 * math.sqrt(TINY.token_dim))
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert torch.isfinite(hidden.grad).all()
    assert rows == 0 or hidden.grad.any()
    assert score.loss(hidden, targets).shape == ()


def test_it_samples_as_the_energy_score_does() -> None:
    """Both have the same generator, under the same names."""
    kernel, energy = randomise(make_score(KERNEL)).eval(), EnergyScore(TINY).eval()
    energy.load_state_dict(kernel.state_dict())
    hidden, null = torch.randn(2, 5, TINY.width)
    noise = kernel.draw_noise(5, like=hidden)
    for other, guidance in ((None, 1.0), (null, 2.5)):
        tokens = kernel.sample(hidden, other, guidance, 0.7, noise)
        assert torch.equal(tokens, energy.sample(hidden, other, guidance, 0.7, noise))


def test_the_bandwidth_is_counted_in_roots_of_the_token_s_size() -> None:
    with torch.device("meta"):
        assert make_score(with_score(EAR_BASE, "kernel")).bandwidth == 4.0
        assert make_score(replace(with_score(EAR_BASE, "kernel"), bandwidth=0.5)).bandwidth == 2.0


def test_options() -> None:
    for change, message in (
        ({"bandwidth": 0.0}, "bandwidth is 0.0; it must be positive and finite"),
        ({"kernel": "cauchy"}, "kernel is 'cauchy'; it must be 'gaussian' or 'laplace'"),
        ({"alpha": 1.5}, "alpha is 1.5; the kernel score has no alpha"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(KERNEL, **change)
    for change in ({"kernel": "laplace"}, {"bandwidth": 2.0}):
        with pytest.raises(ValueError, match="the energy score has no"):
            replace(TINY, **change)
    with pytest.raises(ValueError, match=r"bandwidth is .*from 1e-30 to 1e30"):
        EAR(replace(KERNEL, bandwidth=1e31))


def test_configurations_without_its_options_are_read() -> None:
    stored = to_dict(TINY)
    del stored["kernel"], stored["bandwidth"]
    assert from_dict(ModelConfig, stored, "config.json") == TINY
    assert from_dict(ModelConfig, to_dict(KERNEL), "config.json") == KERNEL


def test_a_run_trains_and_samples(tmp_path) -> None:
    trainer = Trainer(replace(tiny_run(steps=2), model=KERNEL), tmp_path / "run", device="cpu")
    trainer.run(quiet=True)
    model = EAR.from_pretrained(tmp_path / "run")
    assert model.config == KERNEL
    images = model.sample(torch.tensor([3, 7]), steps=3, guidance=2.0, temperature=0.7)
    assert images.shape == (2, 1, 8, 8)
    assert torch.isfinite(images).all()
