"""Foreign files are read strictly: public checkpoints, and npz files of latents and statistics."""

import argparse
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from ear_model import cli
from ear_model.config import TrainConfig, to_dict
from ear_model.data.npz import NpzCache
from ear_model.ear import EAR
from ear_model.evaluation.fidelity import load_statistics
from ear_model.model.weights import public_key
from ear_model.npz_files import read_npz
from ear_model.run_dir import load_config
from ear_model.tensor_files import without_wrappers
from ear_model.training import checkpoint
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, tiny_run
from tests.model.test_convert import ARGS, public_file

DEEP = replace(TINY, depth=10**9)


def _converted(tmp_path, source, *options):
    out = tmp_path / "run"
    assert (
        cli.main(["convert", str(source), "--out", str(out), "--num-heads", "2", "--data", "digits", *options]) == 0
    )
    return out


def test_arguments_may_be_a_dict(tmp_path):
    """They were left out, and the paper's alpha, dropout and steps taken."""
    args = {**ARGS, "lr_schedule": "cosine", "min_lr": 1e-5, "ema_rate": None}
    public_file(tmp_path / "a.pth", args=args)
    config = load_config(_converted(tmp_path, tmp_path / "a.pth"))
    assert config.model == replace(TINY, alpha=1.5)
    assert (config.train.steps, config.train.schedule, config.train.min_lr) == (20, "cosine", 1e-5)
    assert config.train.ema == TrainConfig().ema


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("lr=3", "args is str"),
        ([1], "args is list"),
        ({1: 2}, "args is dict"),
        ({"lr": "fast"}, "lr in args is 'fast'"),
        ({"lr": float("nan")}, "lr in args is nan"),
        ({"lr": -1.0}, "lr in args is -1.0"),
        ({"lr": True}, "lr in args is True"),
        ({"alpha": 5.0}, "alpha is 5.0"),
        ({"attn_dropout": "x"}, "attn_dropout in args"),
        ({"accumulation_steps": 1.5}, "accumulation_steps in args"),
        ({"epochs": "many"}, "epochs in args"),
        ({"epochs": float("inf")}, "epochs in args"),
        ({"warmup_epochs": []}, "warmup_epochs in args"),
        ({"batch_size": 0}, "batch_size in args"),
        ({"world_size": 2.5}, "world_size in args"),
        ({"buffer_size": -2}, "buffer_size in args"),
        ({"buffer_size": 10**30}, "buffer_size in args"),
        ({"patch_size": 0}, "patch_size in args"),
        ({"score_batch_mul": "4"}, "score_batch_mul in args"),
        ({"lr_schedule": "step"}, "lr_schedule in args is 'step'"),
        ({"min_lr": 1.0}, "min_lr is 1.0"),
        ({"cached_path": 3}, "cached_path in args"),
        ({"device": torch.zeros(2)}, "device in args is Tensor"),
        ({"inner": argparse.Namespace(a=1)}, "inner in args is Namespace"),
        ({"ear_model_config": "{"}, "ear_model_config in args is damaged"),
        ({"ear_model_config": "[" * 100_000}, "ear_model_config in args is damaged"),
        ({"ear_model_config": 3}, "ear_model_config in args is int"),
        (
            {"ear_model_config": json.dumps(to_dict(replace(tiny_run(), model=replace(TINY, depth=10**9))))},
            "depth of",
        ),
    ],
)
def test_arguments_that_are_not_understood_are_refused(tmp_path, capsys, args, named):
    given = {**ARGS, **args} if isinstance(args, dict) else args
    public_file(tmp_path / "a.pth", args=given)
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "run"), "--num-heads", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a.pth" in error
    assert named in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["model", "model_ema"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda t: t * float("nan"), "holds NaN"),
        (lambda t: t.to(torch.int8), "torch.int8"),
        (lambda t: t.to(torch.complex64), "torch.complex64"),
        (lambda t: t.to(torch.bool), "torch.bool"),
        (lambda t: t[:1].clone(), "has shape"),
    ],
)
def test_weights_that_are_no_weights_are_refused(tmp_path, capsys, part, value, named):
    content, _ = public_file(tmp_path / "a.pth")
    key = "decoder_blocks.0.attn.qkv.weight"
    public_file(tmp_path / "a.pth", **{part: {**content[part], key: value(content[part][key])}})
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "run"), "--num-heads", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ("a.pth", "attn.qkv.weight", named))
    assert not (tmp_path / "run").exists()


def test_weights_in_16_bits_are_cast(tmp_path):
    """The first resumed step died of dtypes."""
    content, _ = public_file(tmp_path / "a.pth")
    low = {part: {key: t.bfloat16() for key, t in content[part].items()} for part in ("model", "model_ema")}
    states = {
        index: {**state, "exp_avg": state["exp_avg"].half(), "step": int(state["step"])}
        for index, state in content["optimizer"]["state"].items()
    }
    public_file(tmp_path / "a.pth", **low, optimizer={**content["optimizer"], "state": states})
    run = _converted(tmp_path, tmp_path / "a.pth")
    assert torch.equal(
        EAR.from_pretrained(run).backbone.z_proj.weight, content["model_ema"]["z_proj.weight"].bfloat16().float()
    )
    loss, norm = Trainer(load_config(run), run, resume=True, device="cpu").train_step()
    assert loss.isfinite()
    assert norm.isfinite()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module.module.{key}",
        lambda key: key.replace("decoder_blocks.0.", "decoder_blocks.0._orig_mod."),
        lambda key: f"_fsdp_wrapped_module.{key}",
    ],
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, wrapped):
    content, _ = public_file(tmp_path / "a.pth")
    model = {wrapped(key): tensor for key, tensor in content["model"].items()}
    public_file(tmp_path / "a.pth", model=model, model_ema=content["model_ema"], optimizer=content["optimizer"])
    saved = checkpoint.load_checkpoint(_converted(tmp_path, tmp_path / "a.pth"))
    assert all(torch.equal(t, content["model"][public_key(name)]) for name, t in saved.weights.items())
    assert all(torch.equal(t, content["model_ema"][public_key(name)]) for name, t in saved.averages.items())


def test_two_names_that_become_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.pth: module\.a is there twice"):
        without_wrappers({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epoch": "x"}, "epoch is 'x'"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": torch.ones(3)}, "epoch is tensor"),
        ({"optimizer": [1]}, "optimizer is list"),
        ({"scaler": 3}, "scaler is int"),
        ({"model": {1: torch.zeros(1)}}, "no state dict 'model'"),
        ({"model_ema": {"a": 1}}, "model_ema"),
        ({"optimizer": {"state": {}, "param_groups": [{}] * 3}}, "param_groups"),
    ],
)
def test_entries_that_are_something_else(tmp_path, capsys, changes, named):
    public_file(tmp_path / "a.pth", **changes)
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "run"), "--num-heads", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a.pth" in error
    assert named in error


# npz files and statistics


def test_npz_files_that_are_something_else(tmp_path):
    path = tmp_path / "a" / "0.npz"
    path.parent.mkdir()
    moments = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    good = {"moments": moments, "moments_flip": -moments}
    np.savez(path, **good)
    NpzCache(tmp_path)
    content = path.read_bytes()
    for changes, named in (
        ({"moments": moments * np.nan}, "moments holds NaN"),
        ({"moments": moments.astype(complex)}, "complex"),
        ({"moments": np.array([object()])}, "pickle"),
        ({"moments": np.array("x")}, "floating-point"),
    ):
        np.savez(path, **{**good, **changes})
        with pytest.raises(ValueError, match=rf"0\.npz.*{named}"):
            NpzCache(tmp_path)
    place = content.find(moments.tobytes()) + 5
    flipped = content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
    for damaged in (b"", content[:100], content[:-30], flipped, b"PK\x05\x06" + bytes(18)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0\.npz"):
            NpzCache(tmp_path)


def test_an_array_that_is_not_there_takes_no_memory(tmp_path):
    """A header of 128 bytes that announces a terabyte."""
    path = tmp_path / "x.npz"
    for shape in ((10**12,), (-3,), (3, 10**15)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", header.getvalue() + bytes(24))
        with pytest.raises(ValueError, match=r"x\.npz is damaged.*mu\.npy"):
            list(read_npz(path, ("mu",)))


def test_statistics_that_are_something_else(tmp_path):
    path = tmp_path / "statistics.npz"
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(path, **good)
    load_statistics(path)
    skewed = np.eye(3)
    skewed[0, 1] = 0.5
    for changes, named in (
        ({"mu": np.full(3, np.nan)}, "mu holds NaN"),
        ({"sigma": np.full((3, 3), np.inf)}, "sigma holds"),
        ({"sigma": -np.eye(3)}, "covariance"),
        ({"sigma": skewed}, "symmetric"),
        ({"mu": np.zeros(3, complex)}, "mu is complex128"),
        ({"mu": np.array(["a", "b", "c"])}, "mu is <U1"),
        ({"mu": np.zeros((3, 1))}, r"mu has shape \(3, 1\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "covariance"),
    ):
        np.savez(path, **{**good, **changes})
        with pytest.raises(ValueError, match=rf"statistics\.npz.*{named}"):
            load_statistics(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"statistics\.npz.*no 'sigma'"):
        load_statistics(path)
