"""Checkpoints of the public EAR code: both directions bit for bit, and files that are refused."""

import argparse
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch

from ear_model import cli
from ear_model.config import TrainConfig
from ear_model.ear import EAR
from ear_model.model.weights import public_key
from ear_model.presets import MODELS
from ear_model.run_dir import checkpoint_steps, load_config
from ear_model.training import checkpoint, optimizer_state, public_checkpoint, public_format
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, tiny_run

ARGS = {
    "model": "ear_tiny",
    "buffer_size": 2,
    "vae_embed_dim": 1,
    "patch_size": 2,
    "batch_size": 4,
    "world_size": 2,
    "accumulation_steps": 1,
    "epochs": 10,
    "warmup_epochs": 2,
    "lr": 1e-3,
    "score_lrscale": 0.25,
    "score_batch_mul": 1,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
    "alpha": 1.5,
    "use_cached": True,
    "cached_path": "somewhere",
}


def public_file(path, config=TINY, steps=6, **changes):
    """A checkpoint as the public program writes it: its AdamW over its groups, stepped on random gradients.

    The groups follow the words of docs/model.md, "Optimiser", by key names, apart from the program's own code.
    """
    model = EAR(config)
    tensors = {public_key(n): torch.nn.Parameter(torch.randn(p.shape)) for n, p in model.named_parameters()}
    plain = [p for key, p in tensors.items() if p.ndim == 1 or key.endswith(".bias")]
    matrices = [(key, p) for key, p in tensors.items() if not (p.ndim == 1 or key.endswith(".bias"))]
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for key, p in matrices if not key.startswith("scoreloss")], "weight_decay": 0.02},
        {"params": [p for key, p in matrices if key.startswith("scoreloss")], "weight_decay": 0.0, "lr_scale": 0.25},
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
        "args": argparse.Namespace(**ARGS),
        **changes,
    }
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    moments = {key: optimizer.state[p] for key, p in tensors.items()} if steps else {}
    return content, moments


def assert_same(a, b, where=""):
    """Equality bit for bit of nested dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert a == b, where


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
    assert config.model == replace(TINY, alpha=1.5)
    assert (config.train.steps, config.train.warmup_steps, config.train.batch_size) == (20, 4, 8)
    assert config.train.parameter_groups == "public"
    averaged = EAR.from_pretrained(run)
    assert torch.equal(averaged.backbone.z_proj.weight, content["model_ema"]["z_proj.weight"])
    # Every moment is with its own parameter, as the trainer sees it.
    trainer = Trainer(config, run, resume=True, device="cpu")
    assert trainer.step == 6
    for name, parameter in trainer.model.named_parameters():
        key = public_key(name)
        assert torch.equal(parameter, content["model"][key]), key
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(trainer.optimizer.state[parameter][moment], moments[key][moment]), (key, moment)
    trainer.train_step()
    trainer.save()
    # What the public program said survives training on; three epochs were six steps, so seven are still three.
    assert cli.main(["convert", str(run), "--out", str(tmp_path / "later.pth")]) == 0
    later = _load(tmp_path / "later.pth")
    assert (later["epoch"], later["args"], later["scaler"]) == (2, content["args"], content["scaler"])
    assert later["optimizer"]["state"][0]["step"] == 7


@pytest.mark.parametrize("grouping", ["paper", "public"])
def test_run_to_public_and_back(tmp_path, grouping):
    config = tiny_run(parameter_groups=grouping, steps=4, warmup_steps=1)
    first, second = tmp_path / "first", tmp_path / "second"
    Trainer(config, first, device="cpu").run(quiet=True)
    assert cli.main(["convert", str(first), "--out", str(tmp_path / "a.pth"), "--epoch", "0"]) == 0
    content = _load(tmp_path / "a.pth")
    assert list(content) == ["model", "model_ema", "optimizer", "epoch", "scaler", "args"]
    assert isinstance(content["args"], argparse.Namespace)
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--out", str(second)]) == 0
    assert load_config(second) == config
    a, b = checkpoint.load_checkpoint(first), checkpoint.load_checkpoint(second)
    for tensors, others in ((a.weights, b.weights), (a.averages, b.averages)):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert_same(a.trainer_state["optimizer"], b.trainer_state["optimizer"])
    assert a.trainer_state["step"] == b.trainer_state["step"] == 4
    # The public program's own optimiser takes the state.
    model = EAR(TINY)
    names = optimizer_state.grouped_names(model, "public")
    own = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [own[name] for name in group]} for group in names])
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[2]["lr_scale"] == 0.25
    for name, parameter in own.items():
        expected = public_checkpoint.moments_by_name(a.trainer_state["optimizer"], model, grouping, "")[name]
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], expected["exp_avg_sq"]), name


@pytest.mark.parametrize(("name", "count"), [("ear_base", 352), ("ear_large", 464), ("ear_huge", 592)])
def test_sizes_are_told_from_the_shapes(name, count):
    config = MODELS[name]
    model = public_checkpoint._meta_model(config)
    weights = dict(model.named_parameters())
    assert len(weights) == count
    assert public_format.infer_model(weights, {}, None, "file") == config
    groups = optimizer_state.grouped_names(model, "public")
    assert sum(len(group) for group in groups) == count
    moments = {key: {"step": torch.tensor(float(index))} for index, key in enumerate(weights)}
    states, numbers = public_checkpoint.number_moments(moments, model, "public")
    # The file's order of keys within each group, 1-D parameters and biases first.
    keys = [public_key(key) for key in weights]
    first = [i for i, key in enumerate(keys) if weights[list(weights)[i]].ndim == 1 or key.endswith(".bias")]
    assert [int(states[number]["step"]) for number in numbers[0]] == first
    assert keys[int(states[numbers[1][0]]["step"])] == "fake_latent"
    assert keys[int(states[numbers[2][0]]["step"])] == "scoreloss.net.noise_embed.weight"


def test_key_order_is_that_of_the_public_model(tiny_model):
    """Its parameters first, then its modules in the order of its constructor."""
    keys = [public_key(name) for name, _ in tiny_model.named_parameters()]
    assert keys[:4] == ["fake_latent", "mask_token", "decoder_pos_embed_learned", "class_emb.weight"]
    block = [key.split(".", 2)[2] for key in keys if key.startswith("decoder_blocks.0.") and key.endswith(".weight")]
    assert block == [f"{name}.weight" for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    assert keys[-4:] == [
        f"scoreloss.net.final_layer.{name}"
        for name in ("linear.weight", "linear.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
    ]


def test_without_average_and_optimiser(tmp_path, capsys):
    source, run = tmp_path / "a.pth", tmp_path / "run"
    content, _ = public_file(source, model_ema=None, optimizer=None, args=None, scaler=None)
    assert cli.main(["convert", str(source), "--out", str(run), "--num-heads", "2"]) == 1
    assert "18 positions are not 64 class tokens" in capsys.readouterr().err  # the arguments would have said 2
    public_file(source, model_ema=None, optimizer=None, scaler=None)
    assert cli.main(["convert", str(source), "--out", str(run), "--num-heads", "2"]) == 0
    assert "no averages and no optimizer" in capsys.readouterr().out
    assert checkpoint_steps(run) == [0]
    assert len(content["model"]) == len(checkpoint.load_checkpoint(run).averages)


class _Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def _refused(capsys, tmp_path, source, *words, options=("--num-heads", "2")):
    run = tmp_path / "new-run"
    assert cli.main(["convert", str(source), "--out", str(run), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not run.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["args", "model", "scaler"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys, place):
    marker, source = tmp_path / "ran", tmp_path / "evil.pth"
    public_file(source, **{place: _Attack(marker)})
    _refused(capsys, tmp_path, source, "is refused: it asks to run code", "mkdir")
    assert not marker.exists()
    source.write_bytes(pickle.dumps(_Attack(marker)))
    _refused(capsys, tmp_path, source, str(source))
    assert not marker.exists()
    pickle.loads(source.read_bytes())
    assert marker.exists(), "the attack would not have worked"


def test_files_that_are_no_ear_checkpoints(tmp_path, capsys):
    source = tmp_path / "a.pth"
    _refused(capsys, tmp_path, source, "is not there")
    source.write_bytes(b"nothing of the kind")
    _refused(capsys, tmp_path, source, "truncated or no torch file")
    content, _ = public_file(source)
    source.write_bytes(source.read_bytes()[:5000])
    _refused(capsys, tmp_path, source, "truncated or no torch file")
    torch.save(content["model"], source)
    _refused(capsys, tmp_path, source, "no state dict 'model'")
    model = dict(content["model"])
    public_file(source, model={**model, "diffloss.net.input_proj.weight": torch.zeros(2)})
    _refused(capsys, tmp_path, source, "two heads", "neither EAR nor MAR")
    public_file(source, model={key: t for key, t in model.items() if not key.startswith("scoreloss")})
    _refused(capsys, tmp_path, source, "no generator")
    public_file(source)
    _refused(capsys, tmp_path, source, "give --num-heads", options=())
    broken = {key: t for key, t in model.items() if key != "mask_token"}
    public_file(source, model=broken, model_ema=broken)
    _refused(capsys, tmp_path, source, "1 tensors missing", "mask_token")


def test_optimisers_of_other_models(tmp_path, capsys):
    source = tmp_path / "a.pth"
    content, _ = public_file(source)
    optimizer = content["optimizer"]
    public_file(source, optimizer={**optimizer, "param_groups": optimizer["param_groups"][:2]})
    _refused(capsys, tmp_path, source, "groups of")
    swapped = dict(optimizer["state"])
    last = max(swapped)
    swapped[0], swapped[last] = swapped[last], swapped[0]
    public_file(source, optimizer={**optimizer, "state": swapped})
    _refused(capsys, tmp_path, source, "exp_avg of backbone", "has shape")
    public_file(source, model=dict(reversed(content["model"].items())))
    _refused(capsys, tmp_path, source, "in another order")


def test_nothing_is_overwritten(tmp_path, capsys):
    source, run = tmp_path / "a.pth", tmp_path / "run"
    public_file(source)
    before = source.read_bytes()
    convert = ["convert", str(source), "--out", str(run), "--num-heads", "2"]
    assert cli.main(convert) == 0
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(convert) == 1
    assert cli.main(["convert", str(run), "--out", str(source)]) == 1
    assert capsys.readouterr().err.count("exists already") == 2
    assert files == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert source.read_bytes() == before
    (run / "config.json").write_text(json.dumps({"format_version": 1}))
    assert cli.main(["convert", str(run), "--out", str(tmp_path / "b.pth")]) == 1
    assert not (tmp_path / "b.pth").exists()


def test_defaults_are_the_papers():
    """A file without arguments and optimiser goes on with the paper's training, in the public grouping."""
    assert public_format.infer_training({}, 0, 0) == replace(TrainConfig(), parameter_groups="public", warmup_steps=0)
