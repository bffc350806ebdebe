"""The autoencoder: the public layout, another implementation's numbers, and files that don't fit."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch

from ear_model.tokenizers.config import KL16, AutoencoderConfig
from ear_model.tokenizers.kl16 import AutoencoderKL, Posterior
from ear_model.tokenizers.latent import load_latent_tokenizer, save_autoencoder
from tests.model.conftest import randomise
from tests.model.make_golden_kl16 import (
    GOLDEN,
    IMAGE_SHAPE,
    LATENT_SHAPE,
    diffusers_kl16,
    drawn_input,
    drawn_weights,
)

SMALL = AutoencoderConfig(channels=32, multipliers=(1, 2), residual_blocks=1, latent_channels=4)


@pytest.fixture(scope="module")
def kl16() -> AutoencoderKL:
    with torch.device("meta"):
        model = AutoencoderKL()
    model.load_state_dict(drawn_weights(model), assign=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weight_files(kl16, tmp_path_factory):
    """kl16.ckpt as it is published, with the entries of a training loss beside the model's."""
    path = tmp_path_factory.mktemp("weights") / "kl16.ckpt"
    torch.save({"model": {**kl16.state_dict(), "loss.logvar": torch.zeros(())}}, path)
    return path


def _residual(prefix, inputs, outputs):
    table = {
        f"{prefix}.norm1": (inputs,),
        f"{prefix}.conv1": (outputs, inputs, 3, 3),
        f"{prefix}.norm2": (outputs,),
        f"{prefix}.conv2": (outputs, outputs, 3, 3),
    }
    return table | ({f"{prefix}.nin_shortcut": (outputs, inputs, 1, 1)} if inputs != outputs else {})


def _attention(prefix, width):
    return {f"{prefix}.norm": (width,)} | {
        f"{prefix}.{name}": (width, width, 1, 1) for name in ["q", "k", "v", "proj_out"]
    }


def _public_table():
    """Weight shapes of kl16.ckpt by module, written out."""
    widths = [128, 128, 256, 256, 512]
    table = {"quant_conv": (32, 32, 1, 1), "post_quant_conv": (16, 16, 1, 1)}
    table |= {"encoder.conv_in": (128, 3, 3, 3), "encoder.norm_out": (512,), "encoder.conv_out": (32, 512, 3, 3)}
    table |= {"decoder.conv_in": (512, 16, 3, 3), "decoder.norm_out": (128,), "decoder.conv_out": (3, 128, 3, 3)}
    for side in ("encoder", "decoder"):
        table |= _residual(f"{side}.mid.block_1", 512, 512) | _residual(f"{side}.mid.block_2", 512, 512)
        table |= _attention(f"{side}.mid.attn_1", 512)
    for level, width in enumerate(widths):
        before, above = ([128, *widths][level], [*widths, 512][level + 1])
        for block in range(2):
            table |= _residual(f"encoder.down.{level}.block.{block}", before if block == 0 else width, width)
        for block in range(3):
            table |= _residual(f"decoder.up.{level}.block.{block}", above if block == 0 else width, width)
        if level < 4:
            table[f"encoder.down.{level}.downsample.conv"] = (width, width, 3, 3)
        if level > 0:
            table[f"decoder.up.{level}.upsample.conv"] = (width, width, 3, 3)
    return table | _attention("encoder.down.4.attn.0", 512) | _attention("encoder.down.4.attn.1", 512)


def test_keys_and_shapes_are_the_public_ones(kl16):
    table = {}
    for name, shape in _public_table().items():
        table |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = kl16.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == table
    assert len(state) == 312
    assert sum(tensor.numel() for tensor in state.values()) == 66_456_019


def test_equals_diffusers(kl16):
    golden = np.load(GOLDEN)
    moments = kl16.moments(drawn_input(IMAGE_SHAPE)).numpy()
    image = kl16.decode(drawn_input(LATENT_SHAPE)).numpy()
    np.testing.assert_allclose(moments, golden["moments"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(image, golden["image"], rtol=0, atol=1e-4)


def test_the_golden_numbers_are_what_diffusers_says(kl16):
    pytest.importorskip("diffusers", reason="the kept numbers are compared with diffusers where it is installed")
    theirs = diffusers_kl16(kl16.state_dict())
    with torch.no_grad():
        moments = theirs.encode(drawn_input(IMAGE_SHAPE)).latent_dist.parameters.numpy()
        image = theirs.decode(drawn_input(LATENT_SHAPE)).sample.numpy()
    np.testing.assert_allclose(moments, np.load(GOLDEN)["moments"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(image, np.load(GOLDEN)["image"], rtol=0, atol=1e-4)


def test_the_golden_numbers_see_every_weight(kl16):
    """A weight that did not matter could be wired wrongly unnoticed."""
    moments = _gradients(kl16, lambda model: model.moments(drawn_input(IMAGE_SHAPE)), "encoder")
    image = _gradients(kl16, lambda model: model.decode(drawn_input(LATENT_SHAPE)), "decoder")
    blind = {name for name, size in (moments | image).items() if not size > 1e-4}
    # Softmax and norms take away what the same bias adds to all keys.
    assert blind <= {name for name in moments | image if re.search(r"attn.*\.k\.bias$", name)}
    assert len(moments | image) == 308


def _gradients(model, compute, side):
    with torch.enable_grad():
        parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if name.startswith(side)}
        output = compute(model)
        gradients = torch.autograd.grad((output * drawn_input(tuple(output.shape))).sum(), list(parameters.values()))
    model.requires_grad_(False)
    return {name: float(gradient.abs().max()) for name, gradient in zip(parameters, gradients, strict=True)}


def test_shapes_and_odd_sizes():
    model = AutoencoderKL(SMALL).eval()
    assert model.config.downsampling == 2
    with torch.no_grad():
        assert model.moments(torch.zeros(2, 3, 10, 6)).shape == (2, 8, 5, 3)
        assert model.decode(torch.zeros(2, 4, 5, 3)).shape == (2, 3, 10, 6)
    with pytest.raises(ValueError, match=r"images are 10 x 7; .* multiples of 2, such as 10 x 8"):
        model.moments(torch.zeros(2, 3, 10, 7))
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\)"):
        model.moments(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\)"):
        model.decode(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="channels is 48"):
        AutoencoderConfig(channels=48)
    with torch.device("meta"), pytest.raises(ValueError, match=r"250 x 256; .* multiples of 16, such as 256 x 256"):
        AutoencoderKL(KL16).moments(torch.zeros(1, 3, 250, 256))


def test_posterior():
    moments = torch.zeros(1, 4, 64, 64)
    moments[:, :2] = 3.0
    moments[:, 2], moments[:, 3] = -100.0, 2 * np.log(0.5)
    posterior = Posterior(moments)
    assert posterior.logvar.min() == -30
    assert Posterior(moments + 100).logvar.max() == 20
    assert torch.equal(posterior.mean, moments[:, :2])
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0][:, 0] - 3).abs().max() < 1e-5  # exp(-15) times a few
    assert draws[0][:, 1].mean() == pytest.approx(3, abs=5 * 0.5 / 64)
    assert draws[0][:, 1].std() == pytest.approx(0.5, rel=0.1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    assert posterior.kl().item() == pytest.approx(expected.item(), rel=1e-5)


def test_loads_the_public_file(kl16, weight_files):
    tokenizer = load_latent_tokenizer(weight_files)
    assert (tokenizer.latent_channels, tokenizer.downsampling, tokenizer.latent_scale) == (16, 16, 0.2325)
    for name, tensor in kl16.state_dict().items():
        assert torch.equal(tokenizer.autoencoder.state_dict()[name], tensor)
    latents = drawn_input(LATENT_SHAPE)
    expected = kl16.decode(latents / 0.2325).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(latents), expected)


def test_own_files_round_trip(tmp_path):
    model = randomise(AutoencoderKL(SMALL)).eval()
    path = tmp_path / "small.safetensors"
    save_autoencoder(path, model, 0.7)
    tokenizer = load_latent_tokenizer(path)
    assert tokenizer.autoencoder.config == SMALL
    assert tokenizer.latent_scale == 0.7
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    moments = tokenizer.encode(images)
    posterior = model.encode(images)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], 1).detach())
    latents = torch.randn(5, 4, 4, 4)
    torch.testing.assert_close(tokenizer.decode(latents, batch_size=2), tokenizer.decode(latents), rtol=0, atol=1e-5)
    sampled = tokenizer.sample_latents(images, torch.Generator().manual_seed(1))
    expected = Posterior(moments).sample(torch.Generator().manual_seed(1)) * 0.7
    torch.testing.assert_close(sampled, expected)


class _Runs:
    """A pickle of this makes a directory when it is read by a careless program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "kl16.ckpt"
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        write({"model": _Runs(mark)}, path)
        with pytest.raises(ValueError, match="wants to run code, which is refused"):
            load_latent_tokenizer(path)
        assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # the file was a live one


def test_files_that_do_not_fit_are_named(kl16, tmp_path):
    path = tmp_path / "kl16.ckpt"
    state = kl16.state_dict()

    def refused(contents, match):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=match):
            load_latent_tokenizer(path)

    name = "encoder.down.4.attn.0.q.weight"
    small = {key: tensor[:1].clone() for key, tensor in state.items()}
    refused({"model": {key: value for key, value in small.items() if key != name}}, f"1 tensors missing.*{name}")
    refused({"model": {**small, "encoder.extra": torch.zeros(1)}}, "1 unknown.*encoder.extra")
    refused({"model": small}, r"has shape \(1,.*; it must be")
    refused({"model": {**state, name: state[name].int()}}, f"{name} is a tensor of torch.int32")
    refused({"model": {**state, name: state[name] * float("nan")}}, f"{name} holds NaN")
    refused({"state_dict": {}}, r'under the key "model".*state_dict')
    refused([1], 'under the key "model".*list')
    with pytest.raises(ValueError, match="not there"):
        load_latent_tokenizer(tmp_path / "none.ckpt")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged"):
        load_latent_tokenizer(path)


def test_own_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "small.safetensors"
    model = AutoencoderKL(SMALL)
    save_autoencoder(path, model, 1.0)
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_latent_tokenizer(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no autoencoder of ours"):
        load_latent_tokenizer(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for changes, match in [
        ({"version": 2}, "version 2; this program reads 1"),
        ({"config": {"channels": 32}}, "fields"),
        ({"config": {**vars(SMALL), "channels": 33}}, "channels is 33"),
        ({"config": {**vars(SMALL), "multipliers": 3}}, "not iterable"),
        ({"latent_scale": "wide"}, "wide"),
        ({"latent_scale": -1.0}, "latent_scale is -1.0"),
        ({"config": {**vars(SMALL), "latent_channels": 5}}, "has shape"),
    ]:
        description = {"version": 1, "config": vars(SMALL), "latent_scale": 1.0, **changes}
        safetensors.torch.save_file(tensors, path, {"ear_model_autoencoder": json.dumps(description)})
        with pytest.raises(ValueError, match=match):
            load_latent_tokenizer(path)
    save_autoencoder(path, model, 1.0)
    assert path.read_bytes() == good
