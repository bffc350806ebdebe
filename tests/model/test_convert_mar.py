"""Checkpoints of the public MAR code: both directions bit for bit, and files that are refused."""

import argparse
from dataclasses import replace

import pytest
import torch

from ear_model import cli
from ear_model.ear import EAR
from ear_model.model.weights import public_key
from ear_model.presets import MAR_SAMPLING, MODELS, RUNS
from ear_model.run_dir import load_config
from ear_model.training import checkpoint, public_checkpoint, public_format
from tests.model.test_convert import assert_same
from tests.model.test_mar import TINY_MAR

# The public program fixes the number of noise levels.
PUBLIC = replace(TINY_MAR, diffusion_steps=1000)
ARGS = {
    "model": "mar_tiny",
    "buffer_size": 2,
    "vae_embed_dim": 1,
    "patch_size": 2,
    "batch_size": 4,
    "world_size": 2,
    "epochs": 10,
    "warmup_epochs": 2,
    "lr": 1e-3,
    "diffusion_batch_mul": 3,
    "num_sampling_steps": "50",
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
    "diffloss_d": 2,
    "diffloss_w": 16,
    "use_cached": True,
    "cached_path": "somewhere",
}


def public_file(path, config=PUBLIC, steps=6, args=None, **changes):
    """A checkpoint as the public program writes it: AdamW over two groups, stepped on random gradients."""
    model = EAR(config)
    tensors = {
        public_key(n, "diffusion"): torch.nn.Parameter(torch.randn(p.shape)) for n, p in model.named_parameters()
    }
    plain = {key for key, p in tensors.items() if p.ndim == 1 or key.endswith(".bias") or "diffloss" in key}
    groups = [
        {"params": [p for key, p in tensors.items() if key in plain], "weight_decay": 0.0},
        {"params": [p for key, p in tensors.items() if key not in plain], "weight_decay": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        for parameter in tensors.values():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    content = {
        "model": {key: p.detach() for key, p in tensors.items()},
        "model_ema": {key: torch.randn(p.shape) for key, p in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 2,
        "scaler": {**torch.amp.GradScaler("cpu").state_dict(), "_growth_tracker": 7},
        "args": argparse.Namespace(**{**ARGS, **(args or {})}),
        **changes,
    }
    torch.save(content, path)
    return content, {key: optimizer.state[p] for key, p in tensors.items()}


def _load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_public_to_run_and_back(tmp_path, capsys):
    source, run, back = tmp_path / "checkpoint-last.pth", tmp_path / "run", tmp_path / "back.pth"
    content, moments = public_file(source)
    assert cli.main(["convert", str(source), "--out", str(run), "--num-heads", "2", "--data", "digits"]) == 0
    assert "epoch 2, step 6" in capsys.readouterr().out
    assert cli.main(["convert", str(run), "--out", str(back)]) == 0
    assert_same(content, _load(back))

    config = load_config(run)
    assert config.model == PUBLIC
    assert (config.train.steps, config.train.warmup_steps, config.train.batch_size) == (20, 4, 8)
    assert (config.train.parameter_groups, config.train.generator_lr_scale) == ("public", 1.0)
    assert (config.sampling.diffusion_steps, config.sampling.temperature) == (50, 1.0)
    averaged = EAR.from_pretrained(run)
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, content["model_ema"][public_key(name, "diffusion")]), name
    # Every moment is with its own parameter, in whatever group the trainer has it.
    saved = checkpoint.load_checkpoint(run)
    found = public_checkpoint.moments_by_name(saved.trainer_state["optimizer"], averaged, "public", "")
    for name, entries in found.items():
        assert all(torch.equal(entries[each], moments[public_key(name, "diffusion")][each]) for each in entries), name
    assert {group["lr"] for group in saved.trainer_state["optimizer"]["param_groups"]} == {1e-3}


def test_arguments_of_a_run():
    """What the file says of a run of ours, and reads again."""
    run = replace(RUNS["digits"], model=TINY_MAR, sampling=replace(RUNS["digits"].sampling, diffusion_steps=37))
    arguments = public_format.public_arguments(run)
    assert (arguments["diffloss_d"], arguments["diffusion_batch_mul"], arguments["num_sampling_steps"]) == (
        2,
        3,
        "37",
    )
    assert public_format.infer_sampling(TINY_MAR, arguments, "here").diffusion_steps == 37
    weights = dict(public_checkpoint._meta_model(TINY_MAR).named_parameters())
    assert public_format.infer_model(weights, arguments, 2, "here") == PUBLIC


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_sizes_are_told_from_the_shapes(name):
    config = MODELS[name]
    weights = dict(public_checkpoint._meta_model(config).named_parameters())
    found = public_format.infer_model(weights, {}, None, "file")
    assert found == config
    assert public_format.infer_sampling(found, {}, "file") == MAR_SAMPLING[name]


def _refused(capsys, tmp_path, source, *words, options=("--num-heads", "2")):
    run = tmp_path / "new-run"
    assert cli.main(["convert", str(source), "--out", str(run), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not run.exists()


def test_refused_files(tmp_path, capsys):
    source = tmp_path / "a.pth"
    content, _ = public_file(source)
    _refused(capsys, tmp_path, source, "none of MAR-B, L, H", "give --num-heads", options=())
    model = content["model"]

    def changed(**changes):
        tensors = {key: tensor for key, tensor in {**model, **changes}.items() if tensor is not None}
        public_file(source, model=tensors, model_ema=tensors)

    changed(**{"scoreloss.net.input_proj.weight": torch.zeros(2)})
    _refused(capsys, tmp_path, source, "two heads")
    changed(**{key: None for key in model if key.startswith("diffloss")})
    _refused(capsys, tmp_path, source, "no generator")
    changed(**{key: None for key in model if key.startswith("encoder_blocks")})
    _refused(capsys, tmp_path, source, "no encoder and the diffusion score")
    changed(**{"diffloss.net.input_proj.weight": None})
    _refused(capsys, tmp_path, source, "score.net.input_proj.weight", "is missing")
    changed(**{"z_proj_ln.weight": None})
    _refused(capsys, tmp_path, source, "1 tensors missing", "z_proj_ln")
    for steps in ("ddim50", "10,20", "0", 1001, "1e2"):
        public_file(source, args={"num_sampling_steps": steps})
        _refused(capsys, tmp_path, source, "num_sampling_steps in args", "a count in 1..1000")
    public_file(source, args={"num_sampling_steps": ""})
    run = tmp_path / "run"
    assert cli.main(["convert", str(source), "--out", str(run), "--num-heads", "2"]) == 0
    assert load_config(run).sampling.diffusion_steps == 1000
    optimizer = content["optimizer"]
    public_file(source, optimizer={**optimizer, "param_groups": optimizer["param_groups"][:1]})
    _refused(capsys, tmp_path, source, "groups of")


def test_models_that_no_public_code_has():
    config = replace(PUBLIC, backbone="ear", encoder_depth=12)
    with pytest.raises(ValueError, match="of score 'diffusion', backbone 'ear' and order 'masked'"):
        public_format.check_public_layout(config, "the run")
    public_format.check_public_layout(PUBLIC, "the run")
