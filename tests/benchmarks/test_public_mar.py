"""The stand-in for the public MAR code: its keys, and what it computes against tests/model/mar_reference.py."""

from dataclasses import replace

import numpy
import pytest
import torch

from benchmarks.public_ear import initialise
from benchmarks.public_mar import PublicMAR
from ear_kernels import accelerate
from ear_model.ear import EAR
from ear_model.model.weights import public_key
from ear_model.presets import MODELS
from tests.model import mar_reference
from tests.model.test_mar import DEPTHS, TINY_MAR

CONFIG = replace(TINY_MAR, diffusion_steps=1000)
STEPS = 9


@pytest.fixture
def model():
    model = PublicMAR(CONFIG, diffusion_batch_mul=2, num_sampling_steps=STEPS)
    initialise(model, int(torch.randint(1000, ())))
    return model.eval()


def weights_of(model):
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def test_keys_and_shapes_are_the_public_ones():
    """Those that ours are written with; MAR-B has as many numbers as the public one."""
    for config, numbers in ((CONFIG, None), (MODELS["mar_base"], 207_924_768)):
        with torch.device("meta"):
            theirs, ours = PublicMAR(config), EAR(config)
        expected = {public_key(name, "diffusion"): tensor.shape for name, tensor in ours.named_parameters()}
        assert {name: tensor.shape for name, tensor in theirs.named_parameters()} == expected
        assert numbers in (None, sum(tensor.numel() for tensor in theirs.parameters()))


@torch.no_grad()
def test_hidden_states_and_the_net(model):
    tokens, classes = torch.randn(3, 16, 4), torch.randn(3, 16)
    masked = torch.rand(3, 16).argsort(1) >= 5
    hidden = model.forward_mae_decoder(model.forward_mae_encoder(tokens, masked.float(), classes), masked.float())
    weights, wide = weights_of(model), [each.double() for each in (tokens, classes)]
    expected = mar_reference.hidden_states(weights, wide[0], masked, wide[1], 2, DEPTHS)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-4, atol=1e-5)
    x, times = torch.randn(7, 4), torch.randint(0, 1000, (7,))
    found = model.diffloss.net(x, times, hidden[0, :7])
    torch.testing.assert_close(
        found.double(), mar_reference.head(weights, x.double(), times, expected[0, :7]), rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_losses(model):
    target, z, noise = torch.randn(9, 4).clamp(-1, 1), torch.randn(9, 16), torch.randn(9, 4)
    times = torch.tensor([0, 0, 0, 1, 5, 100, 500, 998, 999])
    process = mar_reference.Diffusion(1000)
    wide = [each.double() for each in (target, z, noise)]
    output = mar_reference.head(weights_of(model), process.noisy(wide[0], times, wide[2]), times, wide[1])
    expected = process.loss(output, wide[0], times, wide[2])
    found = model.diffloss.losses(target, z, times, noise).double()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_tokens_of_rows(model, guidance):
    z, times = torch.randn(10, 16), [int(time) for time in model.diffloss.gen_diffusion.timestep_map]
    assert (times[0], times[-1], len(times)) == (0, 999, STEPS)
    # Untrained, tokens grow by what the schedule takes off the noise; predict about the noise itself.
    model.diffloss.net.final_layer.linear.weight.mul_(0.1)
    torch.manual_seed(3)
    found = model.diffloss.sample(z, 0.8, guidance)
    rows = 5 if guidance != 1 else 10
    torch.manual_seed(3)
    draws = [torch.randn(rows, 4)]
    draws += [torch.randn(10, 4)[:rows] for _ in range(STEPS)]
    noise = torch.stack(draws).double()
    process = mar_reference.Diffusion(1000).respaced(times)
    null = z.double()[5:] if guidance != 1 else None
    hidden = z.double()[:rows]
    expected = mar_reference.sample_tokens(weights_of(model), hidden, null, guidance, 0.8, noise, process, times)
    limit = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(found[:rows].double(), expected, rtol=1e-2, atol=limit)


def test_training_and_sampling_run_and_accelerate_keeps_the_loss(model):
    latents, labels = torch.rand(4, 1, 8, 8), torch.tensor([1, 0, 3, 2])
    model.train()
    torch.manual_seed(2)
    loss = model(latents, labels)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "MAR" in str(accelerate(model))
    torch.manual_seed(2)
    torch.testing.assert_close(model(latents, labels), loss, rtol=1e-4, atol=1e-5)
    model.eval()
    numpy.random.seed(1)
    with torch.no_grad():
        images = model.sample_tokens(3, 4, 2.0, labels=labels[:3])
        assert images.shape == (3, 1, 8, 8)
        assert model.sample_tokens(2, 4).isfinite().all()
    with pytest.raises(ValueError, match="cfg_schedule is 'cosine'"):
        model.sample_tokens(2, 4, cfg_schedule="cosine")
