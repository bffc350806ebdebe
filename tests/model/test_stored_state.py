"""Stored state is read strictly: each test is a kind of damage or foreign file that once was taken, or crashed."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from ear_model import cli
from ear_model.config import ModelConfig, RunConfig, SamplingConfig, TrainConfig, from_dict, to_dict
from ear_model.data.cache_format import class_names
from ear_model.ear import EAR
from ear_model.errors import shown
from ear_model.model.weights import load_weights, save_weights
from ear_model.run_dir import latest_checkpoint, load_config, read_metrics, save_config
from ear_model.torch_files import read_torch
from ear_model.training import checkpoint, optim
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, randomise, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    Trainer(tiny_run(steps=2, finetune_steps=1), out, device="cpu").run(quiet=True)
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(trained, tmp_path / "run")


# Configurations


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("train", "precision", "x"),
        ("train", "precision", ["fp32"]),
        ("train", "steps", 7.5),
        ("train", "steps", True),
        ("train", "steps", 10**30),
        ("train", "compile", 1),
        ("train", "cuda_graphs", "no"),
        ("train", "lr", "1e-3"),
        ("train", "lr", True),
        ("train", "clip", float("inf")),
        ("train", "clip", 1e308),
        ("sampling", "guidance", 1e39),
        ("model", "bandwidth", 3.5e38),
        ("train", "tau", float("nan")),
        ("train", "seed", None),
        ("train", "min_lr", 1.0),
        ("train", "parallel", 3),
        ("model", "width", 16.0),
        ("model", "dropout", None),
        ("model", "noise", 1),
        ("sampling", "steps", "4"),
        ("sampling", "order", None),
        ("sampling", "guidance", False),
        (None, "data_path", 3),
        (None, "tokenizer", None),
        (None, "data", "web"),
        (None, "model", None),
    ],
)
def test_stored_configurations_are_checked_by_field(run, capsys, part, field, value):
    stored = json.loads((run / "config.json").read_text())
    (stored if part is None else stored[part])[field] = value
    with pytest.raises(ValueError, match="config.json.*" + ("ModelConfig" if field == "model" else f"{field} is ")):
        from_dict(RunConfig, stored, "config.json")
    (run / "config.json").write_text(json.dumps(stored))
    assert cli.main(["sample", str(run), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.json" in error


@pytest.mark.parametrize("value", [1.0, "16", None, True])
def test_configurations_in_python_are_checked_too(value):
    for kind, name in ((ModelConfig, "width"), (TrainConfig, "steps"), (SamplingConfig, "steps")):
        with pytest.raises(TypeError, match=f"{name} is .*; it must be an integer"):
            replace(kind(), **{name: value})
    assert replace(SamplingConfig(), guidance=2).guidance == 2  # an integer is a number
    assert SamplingConfig(int(np.int64(3)), np.float64(2.0)).steps == 3


def test_configurations_without_the_least_rate_end_at_zero():
    stored = to_dict(tiny_run(schedule="cosine"))
    del stored["train"]["min_lr"]
    train = from_dict(RunConfig, stored, "config.json").train
    assert train.min_lr == 0
    train = replace(train, min_lr=1e-4)
    rates = [optim.learning_rate(step, train) for step in range(2, train.steps)]
    assert rates[0] == pytest.approx(train.lr)
    assert rates[2] == pytest.approx((train.lr + 1e-4) / 2)  # half way
    assert rates == sorted(rates, reverse=True)


# Weights


def _edit(path, change):
    """Rewrite a safetensors file with ``change(tensors, metadata)``."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def _config(**changes):
    def change(tensors, metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **changes})

    return change


def _tensor(name, value):
    def change(tensors, metadata):
        tensors[name] = value(tensors[name])

    return change


def _poisoned(tensor):
    tensor.view(-1)[-1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_config(width=200_000), "architecture"),
        (_config(depth=10**9), "architecture|depth"),
        (_config(generator_depth=10**9), "architecture|depth"),
        (_config(width=10**18, num_heads=1), "architecture"),
        (_config(width="16"), "wrong type"),
        (_config(alpha=1.5), "architecture"),
        (lambda tensors, metadata: metadata.update(config="[" * 100_000), "damaged"),
        (lambda tensors, metadata: metadata.update(config="3"), "version None"),
        (_tensor("z_proj.bias", _poisoned), "z_proj.bias holds NaN"),
        (_tensor("z_proj.bias", lambda t: t.to(torch.int8)), "z_proj.bias is a tensor of torch.int8"),
        (_tensor("z_proj.bias", lambda t: t.to(torch.complex64)), "z_proj.bias is a tensor of torch.complex64"),
        (_tensor("z_proj.bias", lambda t: t.to(torch.float8_e4m3fn)), "z_proj.bias is a tensor of torch.float8"),
        (_tensor("z_proj.bias", lambda t: t.double() + 1e300), "z_proj.bias holds NaN or infinite"),
        (_tensor("z_proj.bias", lambda t: t[:-1].clone()), "z_proj.bias has shape"),
    ],
)
def test_weights_are_compared_before_a_model_is_made(run, change, named):
    for name in ("ema.safetensors", "model.safetensors"):
        _edit(latest_checkpoint(run) / name, change)
    for read in (EAR.from_pretrained, checkpoint.load_checkpoint, lambda run: EAR.from_pretrained(run, ema=False)):
        with pytest.raises(ValueError, match=rf"\.safetensors.*({named})"):
            read(run)


def test_a_tiny_file_orders_no_huge_work(tmp_path):
    """Sizes in the metadata of file and run alike: compared with the tensors on meta, without memory or time."""
    for changes in ({"width": 200_000}, {"depth": 10**9}, {"num_classes": 10**15}, {"width": 10**18, "num_heads": 1}):
        run = tmp_path / "-".join(changes)
        config = replace(TINY, **changes)
        (run / "checkpoints" / "step_00000002").mkdir(parents=True)
        save_config(run, replace(tiny_run(), model=config))
        path = latest_checkpoint(run) / "ema.safetensors"
        save_weights(path, dict(EAR(TINY).named_parameters()), TINY)
        _edit(path, lambda tensors, metadata, config=config: metadata.update(config=json.dumps(to_dict(config))))
        with pytest.raises(ValueError, match=r"ema\.safetensors"):
            EAR.from_pretrained(run)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_cast(run, kind):
    whole = EAR.from_pretrained(run)
    for name in ("ema.safetensors", "model.safetensors"):
        _edit(
            latest_checkpoint(run) / name,
            lambda tensors, _: tensors.update({k: t.to(kind) for k, t in tensors.items()}),
        )
    for name, parameter in EAR.from_pretrained(run).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, dict(whole.named_parameters())[name].to(kind).float())
    config = load_config(run)
    longer = replace(config, train=replace(config.train, steps=3))
    save_config(run, longer)
    Trainer(longer, run, resume=True, device="cpu").train_step()


def test_the_tau_of_fine_tuning_is_kept(run):
    assert EAR.from_pretrained(run).score.tau == 0.99
    config = load_config(run)
    save_config(run, replace(config, train=replace(config.train, steps=20)))
    assert EAR.from_pretrained(run).score.tau == 1.0  # step 2 of 20 was none of the last


# trainer.pt


def _states(change):
    def edit(state):
        for moments in state["optimizer"]["state"].values():
            change(moments)

    return edit


def _set(**values):
    return lambda state: state.update(values)


def _group(**values):
    return lambda state: state["optimizer"]["param_groups"][1].update(values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_states(lambda m: m.update(exp_avg=torch.zeros(m["exp_avg"].numel() + 1))), "exp_avg of .* has shape"),
        (
            _states(lambda m: m.update(exp_avg_sq=m["exp_avg_sq"].flatten()[:-1].clone())),
            "exp_avg_sq of .* has shape",
        ),
        (_states(lambda m: m.update(exp_avg=m["exp_avg"].int())), "exp_avg of .* is torch.int32"),
        (_states(lambda m: m.update(exp_avg=m["exp_avg"] * float("nan"))), "exp_avg of .* holds"),
        (_states(lambda m: m.update(exp_avg_sq=-1 - m["exp_avg_sq"])), "exp_avg_sq of .* holds"),
        (_states(lambda m: m.update(exp_avg=None)), "exp_avg of .* has shape None"),
        (_states(lambda m: m.pop("exp_avg_sq")), "exp_avg_sq of .* has shape None"),
        (_states(lambda m: m.update(step=torch.tensor(float("nan")))), "step of .* must be a count"),
        (_states(lambda m: m.update(step=torch.zeros(3))), "step of .* must be a count"),
        (_states(lambda m: m.update(step="two")), "step of .* must be a count"),
        (_states(lambda m: m.update(max_exp_avg_sq=m["exp_avg"])), "holds .*max_exp_avg_sq"),
        (lambda state: state["optimizer"]["state"].pop(3), "no state of 1 parameters"),
        (lambda state: state["optimizer"]["state"].update({999: {}}), "one of 1 others"),
        (lambda state: state["optimizer"].update(state={}), "no state after 2 steps"),
        (lambda state: state["optimizer"].update(state=[]), "no state of a torch optimiser"),
        (lambda state: state["optimizer"].pop("param_groups"), "param_groups"),
        (lambda state: state["optimizer"]["param_groups"].pop(), "groups of"),
        (lambda state: state["optimizer"]["param_groups"][0]["params"].reverse(), "numbered|has shape"),
        (_group(weight_decay="x"), "weight_decay of the optimiser is 'x'"),
        (_group(weight_decay=0.5), "weight_decay of the optimiser is 0.5; config.json says"),
        (_group(betas=(2.0, 3.0)), "betas"),
        (_group(betas=None), "betas"),
        (_group(lr=float("nan")), "lr"),
        (_group(lr_scale=torch.ones(3)), "lr_scale"),
        (_group(amsgrad=True), "amsgrad"),
        (_set(optimizer=None), "optimiser"),
        (_set(step=7), "step is 7"),
        (_set(step=2.0), "step is 2.0"),
        (_set(step=-1), "step is -1"),
        (_set(cpu_rng=torch.zeros(5056)), "cpu_rng"),
        (_set(cpu_rng=torch.zeros(3, dtype=torch.uint8)), "cpu_rng"),
        (_set(cpu_rng=None), "cpu_rng"),
        (_set(cuda_rng=torch.zeros(16)), "cuda_rng"),
        (_set(process_rng=7), "process_rng"),
        (_set(process_rng=[{"cpu_rng": 1}]), "cpu_rng of process 0"),
        (_set(public=[1]), "public"),
        (_set(public={"epoch": "x"}), "epoch of public"),
        (lambda state: state.pop("cuda_rng"), "lacks cuda_rng"),
    ],
)
def test_every_entry_of_the_trainer_is_compared_with_its_parameter(run, change, named):
    """Moments one element long were a SIGSEGV on resume."""
    path = latest_checkpoint(run) / "trainer.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"trainer\.pt.*{named}"):
        Trainer(load_config(run), run, resume=True, device="cpu")
    with pytest.raises(ValueError, match=rf"trainer\.pt.*{named}"):
        checkpoint.load_checkpoint(run)


def test_moments_of_other_precisions_are_cast(run):
    path = latest_checkpoint(run) / "trainer.pt"
    state = torch.load(path, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments.update(exp_avg=moments["exp_avg"].bfloat16(), step=2)
    torch.save(state, path)
    states = checkpoint.load_checkpoint(run).trainer_state["optimizer"]["state"]
    assert {moments[name].dtype for moments in states.values() for name in moments} == {torch.float32}


def test_a_torch_file_with_a_flipped_bit_is_damaged(run):
    """torch itself looks at no checksum."""
    path = latest_checkpoint(run) / "trainer.pt"
    content = bytearray(path.read_bytes())
    place = content.find(torch.load(path, weights_only=True)["cpu_rng"].numpy().tobytes()[:64])
    assert place > 0
    content[place + 40] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"trainer\.pt is damaged or foreign.*CRC"):
        checkpoint.load_trainer_state(path.parent)


def _nested(levels):
    inner = [1]
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda: {"a": torch.zeros(1).expand(10**12)}, "has only a part"),
        (lambda: {"a": torch.eye(3).to_sparse()}, "layout"),
        (lambda: {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, "layout"),
        (lambda: [torch.empty(3, device="meta")], "meta"),
        (lambda: _nested(60), "levels"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_program_saves_of_weights(tmp_path, content, named):
    torch.save(content(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt .*{named}"):
        read_torch(tmp_path / "x.pt")


def test_what_is_referred_to_many_times_is_looked_at_once(tmp_path):
    shared = [torch.ones(1)]
    for _ in range(25):
        shared = [shared, shared]  # 2^25 ways to the tensor
    torch.save({"a": shared}, tmp_path / "x.pt")
    assert len(shown(read_torch(tmp_path / "x.pt"))) <= 200


def test_metrics_that_are_something_else(run):
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    for damage in ("[" * 100_000 + "\n", '{"loss": 1}\n', '{"step": "x", "loss": 1}\n', "\x00\n", "3\n"):
        path.write_text(damage + whole)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1,"):
            read_metrics(run)


# Others


def test_class_names_that_point_elsewhere_are_not_used(tmp_path):
    config = replace(tiny_run(), data="cache", data_path=str(tmp_path))
    for names in (["a", "../b"], ["a", "a"], ["a", 3], "ab", ["a", ""], ["a", "b\0"], {"a": 1}, ["a", "/b"]):
        (tmp_path / "manifest.json").write_text(json.dumps({"classes": names}))
        assert class_names(config) is None
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert class_names(config) is None
    (tmp_path / "manifest.json").write_text('{"classes": ["a", "b"]}')
    assert class_names(config) == ("a", "b")


@pytest.mark.slow
def test_a_run_that_can_not_be_written_in_is_scored_elsewhere(run, tmp_path, capsys):
    """``ear evaluate --out``."""
    before = sorted(run.rglob("*"))
    out = tmp_path / "scores" / "a.json"
    evaluate = ["evaluate", str(run), "--num", "20", "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main(evaluate) == 0
    assert f"scores: {out}" in capsys.readouterr().out
    assert json.loads(out.read_text())["num_samples"] == 20
    assert sorted(run.rglob("*")) == before
    assert cli.main(evaluate) == 1
    assert "exists already" in capsys.readouterr().err


def test_weight_files_that_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        read_torch(tmp_path / "x.safetensors")
    save_weights(tmp_path / "y.safetensors", dict(randomise(EAR(TINY)).named_parameters()), TINY)
    assert load_weights(tmp_path / "y.safetensors")[0] == TINY
