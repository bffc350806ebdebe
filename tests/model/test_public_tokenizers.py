"""Autoencoders in the layouts of latent-diffusion and of diffusers, and files that only look like some."""

import json
import re
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

from ear_model.tokenizers.config import KL16, AutoencoderConfig, TokenizerTraining
from ear_model.tokenizers.kl16 import AutoencoderKL
from ear_model.tokenizers.latent import AutoencoderTokenizer, load_latent_tokenizer, save_autoencoder
from ear_model.tokenizers.public_files import autoencoder_shape
from tests.model.conftest import randomise

SHAPES = {
    "stable": AutoencoderConfig(
        channels=32, multipliers=(1, 2, 2), residual_blocks=2, latent_channels=3, attention=False
    ),
    "attention": AutoencoderConfig(channels=32, multipliers=(1, 2), residual_blocks=1, latent_channels=2),
    "both": AutoencoderConfig(
        channels=32, multipliers=(2, 1), residual_blocks=1, latent_channels=2, decoder_attention=True
    ),
}
# diffusers' names of what is in a residual block and in an attention, by ours.
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def diffusers_layout(tensors: dict, levels: int, names: dict) -> dict:
    """Our tensors under diffusers' names, written down from its AutoencoderKL apart from the program's own code."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down", "up"):
            level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
            head = [parts[0], f"{parts[1]}_blocks", str(level)]
            rest = parts[3:]
            if rest[0] == "block":
                rest = ["resnets", rest[1], "conv_shortcut" if rest[2] == "nin_shortcut" else rest[2], *rest[3:]]
            elif rest[0] == "attn":
                rest = ["attentions", rest[1], names[rest[2]], *rest[3:]]
            else:
                rest = [f"{rest[0]}rs", "0", *rest[1:]]
            parts = head + rest
        elif parts[1] == "mid":
            kind, number = parts[2].split("_")
            where = ["resnets" if kind == "block" else "attentions", str(int(number) - 1)]
            layer = names[parts[3]] if kind == "attn" else parts[3]
            parts = [parts[0], "mid_block", *where, layer, *parts[4:]]
        elif parts[1] == "norm_out":
            parts[1] = "conv_norm_out"
        if (
            any(word in ".".join(parts) for word in ("to_", "query", "key", "value", "proj_attn"))
            and tensor.ndim == 4
        ):
            tensor = tensor[:, :, 0, 0].clone()
        renamed[".".join(parts)] = tensor
    return renamed


def expect(path, model, scale):
    """The file at ``path`` decodes as ``model``."""
    tokenizer = load_latent_tokenizer(path)
    assert tokenizer.autoencoder.config == model.config
    assert tokenizer.latent_scale == pytest.approx(scale)
    latents = torch.randn(2, model.config.latent_channels, 3, 4)
    torch.testing.assert_close(tokenizer.decode(latents * scale), model.decode(latents).clamp(-1, 1).detach())
    images = torch.rand(1, 3, 16, 8) * 2 - 1
    torch.testing.assert_close(tokenizer.encode(images)[:, : model.config.latent_channels], model.encode(images).mean)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", [ATTENTION, OLD_ATTENTION], ids=["linear", "old"])
def test_files_of_diffusers_are_read(tmp_path, shape, names):
    model = randomise(AutoencoderKL(SHAPES[shape])).eval().requires_grad_(False)
    tensors = diffusers_layout(model.state_dict(), len(model.config.multipliers), names)
    assert not set(tensors) & {name for name in model.state_dict() if re.search(r"\.(down|up|mid)\.", name)}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    expect(path, model, 0.18215)
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 0.6}))
    expect(path, model, 0.6)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    expect(tmp_path / "diffusion_pytorch_model.bin", model, 0.6)
    for value in ("x", True, [1]):
        (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": value}))
        with pytest.raises(ValueError, match=r"config\.json: scaling_factor is"):
            load_latent_tokenizer(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dicts_of_latent_diffusion_are_read(tmp_path, shape):
    model = randomise(AutoencoderKL(SHAPES[shape])).eval().requires_grad_(False)
    state, path = dict(model.state_dict()), tmp_path / "model.ckpt"
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(()), "loss.steps": torch.zeros(1).int()}}, path)
    with pytest.raises(ValueError, match=r"model\.ckpt does not say its latent scale.*scaling_factor.*config\.json"):
        load_latent_tokenizer(path)
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.5}')
    expect(path, model, 0.5)
    for prefix in ("module.", "_orig_mod."):
        torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, path)
        expect(path, model, 0.5)
    low = {name: tensor.double() for name, tensor in state.items()}
    safetensors.torch.save_file(low, tmp_path / "model.safetensors")
    expect(tmp_path / "model.safetensors", model, 0.5)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    whole |= {"scale_factor": torch.tensor(0.25), "model.diffusion_model.out.weight": torch.zeros(3).int()}
    torch.save({"state_dict": whole}, path)
    expect(path, model, 0.25)


def test_the_shape_of_kl16_is_told_from_its_tensors(tmp_path):
    with torch.device("meta"):
        tensors = AutoencoderKL(KL16).state_dict()
    assert autoencoder_shape(tmp_path, tensors) == KL16


def test_public_tokenizers_that_do_not_fit_are_named(tmp_path):
    model, path = AutoencoderKL(SHAPES["attention"]), tmp_path / "model.ckpt"
    state = dict(model.state_dict())
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.5}')
    name = "encoder.mid.attn_1.q.weight"
    for changes, named in (
        ({name: state[name] * float("nan")}, f"{name} holds NaN"),
        ({name: state[name].to(torch.int8)}, f"{name} is a tensor of torch.int8"),
        ({name: state[name].to(torch.complex64)}, f"{name} is a tensor of torch.complex64"),
        ({name: state[name][:1].clone()}, f"{name} has shape"),
        ({name: 3}, f"{name} is int"),
        ({"encoder.extra": torch.zeros(1)}, "1 unknown.*encoder.extra"),
        ({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, "first convolution of 48"),
        ({"encoder.conv_in.weight": torch.zeros(3)}, "autoencoder"),
        ({"post_quant_conv.weight": torch.zeros(())}, "autoencoder"),
        ({"scale_factor": torch.tensor(float("inf"))}, "latent_scale is inf"),
        ({"scale_factor": torch.tensor(-1.0)}, "latent_scale is -1"),
        ({"scale_factor": torch.tensor(1e30)}, "latent_scale is 1.*e.30; it must be from 1e-06 to 1e.06"),
        ({"scale_factor": torch.tensor(1e-30)}, "latent_scale is 1"),
    ):
        torch.save({"state_dict": {**state, **changes}}, path)
        with pytest.raises(ValueError, match=rf"model\.ckpt.*{named}"):
            load_latent_tokenizer(path)
    torch.save({"state_dict": state}, path)
    for scale in ("1e30", "0", "-1", "1e-30"):
        (tmp_path / "config.json").write_text(f'{{"scaling_factor": {scale}}}')
        with pytest.raises(ValueError, match=r"model\.ckpt: its latent_scale is"):
            load_latent_tokenizer(path)
    for foreign in ({"x": torch.zeros(1)}, {"state_dict": {"x": torch.zeros(1)}}):
        torch.save(foreign, path)
        with pytest.raises(ValueError, match=r"model\.ckpt is no autoencoder of ours"):
            load_latent_tokenizer(path)


@pytest.mark.parametrize(
    "changes",
    [{"channels": True}, {"channels": 32.0}, {"attention": 1}, {"multipliers": "12"}, {"multipliers": [1, 2.0]},
     {"multipliers": [1] * 200}, {"residual_blocks": 10**9}, {"channels": 10**15}, {"decoder_attention": None}],
)  # fmt: skip
def test_metadata_of_own_tokenizers_are_checked_by_field(tmp_path, changes):
    """Nor do they order huge work."""
    path, model = tmp_path / "small.safetensors", AutoencoderKL(SHAPES["attention"])
    description = {"version": 1, "config": {**asdict(model.config), "norm_groups": 1, **changes}, "latent_scale": 1.0}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, {"ear_model_autoencoder": json.dumps(description)})
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        load_latent_tokenizer(path)


@pytest.mark.parametrize(
    "description", ["[" * 100_000, "3", "[]", '{"version": 1, "version": 1}', '{"version": 1, "config": [1]}', "{"]
)
def test_metadata_that_are_something_else(tmp_path, description):
    path = tmp_path / "small.safetensors"
    save_autoencoder(path, AutoencoderKL(SHAPES["attention"]), 1.0)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"ear_model_autoencoder": description})
    with pytest.raises(ValueError, match=r"small\.safetensors.*metadata"):
        load_latent_tokenizer(path)


@pytest.mark.parametrize("scale", [1e308, 1e30, 1e-30, 0.0, -1.0, float("nan")])
def test_scales_that_leave_no_finite_latents(tmp_path, scale):
    path, model = tmp_path / "small.safetensors", AutoencoderKL(SHAPES["attention"])
    with pytest.raises(ValueError, match=r"latent_scale is .*; it must be from 1e-06 to 1e.06"):
        AutoencoderTokenizer(model, scale)
    save_autoencoder(path, model, scale)
    with pytest.raises(ValueError, match=r"small\.safetensors.*(latent_scale|NaN)"):
        load_latent_tokenizer(path)


def test_training_options_are_checked_by_field():
    with pytest.raises(TypeError, match=r"steps is 1\.5"):
        TokenizerTraining(steps=1.5)  # type: ignore[arg-type]
