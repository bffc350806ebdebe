"""The public VQ-16 layout: the same numbers as its own program's maths, and files that only look like it."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ear_model import cli
from ear_model.config import ModelConfig, SamplingConfig, with_score
from ear_model.ear import EAR
from ear_model.sampling.decoder import Decoder
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.tokenizers.vq16 import VqAutoencoder
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, randomise, tiny_run, write_tree

SHAPE = AutoencoderConfig(
    channels=32, multipliers=(1, 2, 1), residual_blocks=1, latent_channels=3, attention=True, decoder_attention=True
)
CODES, INNER = 13, 6


def public_layout(autoencoder: VqAutoencoder) -> dict:
    """Our tensors under the public names, written down from the public program apart from the reader's code."""
    found = {}
    levels = len(SHAPE.multipliers)
    for name, tensor in autoencoder.state_dict().items():
        parts = name.split(".")
        if parts[1] == "down":
            parts[1:4] = ["conv_blocks", parts[2], {"block": "res"}.get(parts[3], parts[3])]
        elif parts[1] == "up":
            parts[1:4] = ["conv_blocks", str(levels - 1 - int(parts[2])), {"block": "res"}.get(parts[3], parts[3])]
        elif parts[1] == "mid":
            parts[2] = {"block_1": "0", "attn_1": "1", "block_2": "2"}[parts[2]]
        found[".".join(parts)] = tensor.clone()
    return {**found, "quantize.codebook_used": torch.zeros(65536)}


class Public:
    """The public program's forward by the names of its file, in float64."""

    def __init__(self, tensors: dict) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)

    def res(self, name, x):
        hidden = x
        for index in ("1", "2"):
            hidden = self.norm(f"{name}.norm{index}", hidden)
            hidden = self.conv(f"{name}.conv{index}", hidden * hidden.sigmoid(), padding=1)
        return (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x) + hidden

    def attn(self, name, x):
        q, k, v = (self.conv(f"{name}.{each}", self.norm(f"{name}.norm", x)).flatten(2) for each in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def coder(self, name, x, resample):
        hidden = self.conv(f"{name}.conv_in", x, padding=1)

        def middle(hidden):
            for index, layer in enumerate((self.res, self.attn, self.res)):
                hidden = layer(f"{name}.mid.{index}", hidden)
            return hidden

        hidden = middle(hidden) if name == "decoder" else hidden
        for level in range(3):
            block = f"{name}.conv_blocks.{level}"
            for index in range(2 if name == "decoder" else 1):
                hidden = self.res(f"{block}.res.{index}", hidden)
                if f"{block}.attn.{index}.q.weight" in self.tensors:
                    hidden = self.attn(f"{block}.attn.{index}", hidden)
            if level < 2:
                hidden = resample(block, hidden)
        hidden = self.norm(f"{name}.norm_out", hidden if name == "decoder" else middle(hidden))
        return self.conv(f"{name}.conv_out", hidden * hidden.sigmoid(), padding=1)

    def indices(self, images):
        def down(block, x):
            return self.conv(f"{block}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)

        latents = F.normalize(self.conv("quant_conv", self.coder("encoder", images.double(), down)), dim=1)
        self.codes = F.normalize(self.tensors["quantize.embedding.weight"], dim=1)
        distances = (latents.movedim(1, -1).unsqueeze(-2) - self.codes).square().sum(-1)
        return distances.argmin(-1), distances

    def decode(self, indices):
        def up(block, x):
            return self.conv(f"{block}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)

        return self.coder("decoder", self.conv("post_quant_conv", self.codes[indices].movedim(-1, 1)), up)


@pytest.fixture
def public(tmp_path):
    tensors = public_layout(randomise(VqAutoencoder(SHAPE, INNER, CODES)))
    path = tmp_path / "vq.pt"
    torch.save({"model": tensors}, path)
    return path, tensors


def test_numbers_are_those_of_the_public_program(public):
    path, tensors = public
    tokenizer = load_latent_tokenizer(path)
    autoencoder, images = tokenizer.autoencoder, torch.rand(2, 3, 8, 12) * 2 - 1
    reference = Public(tensors)
    expected, distances = reference.indices(images)
    found = autoencoder.indices(images)
    assert found.shape == (2, 2, 3)
    chosen = distances.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= distances.amin(-1) + 1e-5).all())
    decoded = autoencoder.decode(autoencoder.vectors(expected))
    torch.testing.assert_close(decoded.double(), reference.decode(expected), rtol=1e-4, atol=1e-5)
    assert (tokenizer.latent_channels, tokenizer.downsampling, tokenizer.latent_scale) == (3, 4, 1.0)
    drawn = tokenizer.sample_latents(images)
    torch.testing.assert_close(drawn, autoencoder.vectors(found), rtol=0, atol=1e-5)


def test_files_that_do_not_fit_are_named(public):
    path, tensors = public

    def refused(change, named):
        given = dict(tensors)
        change(given)
        torch.save({"model": given}, path)
        with pytest.raises(ValueError, match=named) as caught:
            load_latent_tokenizer(path)
        assert "\n" not in str(caught.value)

    refused(lambda given: given.pop("encoder.mid.1.q.bias"), "1 tensors missing")
    refused(lambda given: given.update(more=torch.zeros(1)), "1 unknown")
    refused(lambda given: given.update({"quant_conv.bias": torch.zeros(4)}), r"quant_conv.bias has shape \(4,\)")
    refused(lambda given: given.update({"quantize.embedding.weight": torch.zeros(13)}), "no VQ autoencoder")
    refused(lambda given: given["decoder.conv_out.bias"].fill_(torch.nan), "NaN or infinite")
    refused(lambda given: given.update({"decoder.conv_out.bias": torch.zeros(3).int()}), "must be a floating-point")


def test_a_run_on_its_codes_from_a_cache_to_images(public, tmp_path):
    path, _ = public
    tree, cache, out = tmp_path / "tree", tmp_path / "cache", tmp_path / "run"
    write_tree(tree, {"a": 6, "b": 5}, size=16)
    options = ["--tokenizer", "autoencoder", "--weights", str(path), "--image-size", "16", "--dtype", "fp32"]
    assert cli.main(["cache", str(tree), "--out", str(cache), *options, "--workers", "0", "--device", "cpu"]) == 0
    shape = {"image_size": 4, "channels": 3, "patch_size": 1, "num_classes": 2, "codebook_size": CODES}
    model: ModelConfig = replace(with_score(TINY, "categorical"), **shape)
    run = replace(tiny_run(steps=2), data="cache", data_path=str(cache), tokenizer=str(path), codebook=str(path))
    trainer = Trainer(replace(run, model=model, sampling=SamplingConfig(4)), out, device="cpu")
    codes = load_latent_tokenizer(path).autoencoder.codes
    assert torch.equal(trainer.model.score.codebook, codes)
    latents, _ = trainer.batches[0]
    tokens = trainer.model.tokenizer.encode(latents)
    assert float((trainer.model.score.decode(trainer.model.score.encode(tokens)) - tokens).abs().max()) < 1e-5
    trainer.run(quiet=True)
    images = Decoder(trainer.config)(EAR.from_pretrained(out).sample(torch.tensor([0, 1]), steps=2))
    assert images.shape == (2, 3, 16, 16)
    assert bool(images.isfinite().all())


def test_an_autoencoder_without_a_codebook_is_no_codebook(tmp_path):
    from ear_model.tokenizers.kl16 import AutoencoderKL

    path = tmp_path / "kl.ckpt"
    torch.save({"state_dict": {**AutoencoderKL(SHAPE).state_dict(), "scale_factor": torch.tensor(1.0)}}, path)
    model = replace(with_score(TINY, "categorical"), codebook_size=CODES)
    with pytest.raises(ValueError, match=re.escape("kl.ckpt is an autoencoder without a codebook")):
        Trainer(replace(tiny_run(), model=model, codebook=str(path)), tmp_path / "run", device="cpu")
