"""What holds of every score of the registry: losses, files, sampling, and the commands on a run of it."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

from ear_model import cli
from ear_model.config import RunConfig, SamplingConfig, TrainConfig, check_sampling, with_score
from ear_model.draws import ImageDraws
from ear_model.ear import EAR
from ear_model.model.weights import load_into, load_weights, our_key, public_key, save_weights
from ear_model.presets import RUNS, with_score_and_order
from ear_model.run_dir import load_config, read_metrics, save_config
from ear_model.score_names import SCORES, ScoreEntry
from ear_model.training import checkpoint
from ear_model.training.engine import Engine
from ear_model.training.estimate import estimate_run, training_flops
from ear_model.training.optim import parameter_groups
from tests.model.conftest import TINY, randomise

EVERY = pytest.mark.parametrize("name", SCORES)
OTHERS = pytest.mark.parametrize("name", [name for name in SCORES if name != "energy"])


def make_model(name: str) -> EAR:
    return randomise(EAR(with_score(TINY, name)))


def targets_of(model: EAR, rows: int) -> torch.Tensor:
    """Tokens as the score's loss reads them."""
    images = torch.randn(rows, TINY.channels, TINY.image_size, TINY.image_size)
    return model.score.encode(model.tokenizer.encode(images))[:, 0]


@EVERY
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_loss_is_finite_and_differentiable(name, rows):
    model = make_model(name)
    hidden = torch.randn(rows, TINY.width, requires_grad=True)
    loss = model.score.loss(hidden, targets_of(model, rows))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    trained = [parameter for parameter in model.score.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [hidden, *trained], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@EVERY
def test_loss_in_float64(name):
    model = make_model(name).double()
    hidden = torch.randn(5, TINY.width, dtype=torch.float64, requires_grad=True)
    targets = targets_of(model, 5)
    loss = model.score.loss(hidden, targets.double() if targets.is_floating_point() else targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == torch.float64
    assert gradient.isfinite().all()


@EVERY
def test_no_rows_are_a_loss_of_zero(name):
    model = make_model(name)
    hidden = torch.zeros(0, TINY.width, requires_grad=True)
    loss = model.score.loss(hidden, targets_of(model, 1)[:0])
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert all((p.grad is None) or (p.grad == 0).all() for p in model.score.parameters())


@EVERY
def test_weight_files_round_trip(name, tmp_path):
    model = make_model(name)
    path = tmp_path / "model.safetensors"
    names = [parameter for parameter, _ in model.named_parameters()]
    assert [our_key(public_key(each, name), name) for each in names] == names
    save_weights(path, dict(model.named_parameters()), model.config)
    config, tensors = load_weights(path)
    assert config == model.config
    other = make_model(name)
    load_into(other, tensors, path)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@EVERY
def test_every_parameter_is_in_one_group(name):
    model = make_model(name)
    for grouping in ("paper", "public"):
        groups = parameter_groups(model, TrainConfig(parameter_groups=grouping))
        found = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(found) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


@EVERY
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_is_a_function_of_seed_and_index(name, guidance):
    model = make_model(name).eval()
    labels = torch.tensor([3, 9, 0])
    options = {"steps": 3, "guidance": guidance, "temperature": 0.9}
    together = model.sample(labels, draws=ImageDraws(5, range(3)), **options)
    assert together.isfinite().all()
    for index in range(3):
        alone = model.sample(labels[index : index + 1], draws=ImageDraws(5, [index]), **options)
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-3, atol=1e-3)
    assert not torch.equal(together, model.sample(labels, draws=ImageDraws(6, range(3)), **options))


@EVERY
def test_guidance_of_one_is_none(name):
    model = make_model(name).eval()
    options = {each: getattr(SamplingConfig(), each) for each in SCORES[name].sampling_options}
    hidden, null = torch.randn(2, 6, TINY.width)
    noise = model.score.draw_noise(2, 3, like=hidden, **options).flatten(0, 1)
    with torch.no_grad():
        plain = model.score.sample(hidden, None, 1.0, 0.8, noise, **options)
        guided = model.score.sample(hidden, null, 1.0, 0.8, noise, **options)
        strong = model.score.sample(hidden, null, 4.0, 0.8, noise, **options)
    assert plain.shape == (6, model.score.token_size)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, guided)
    assert not torch.equal(plain, strong)


@EVERY
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_temperature_is_taken(name, temperature):
    model = make_model(name).eval()
    labels = torch.tensor([1, 2])
    for guidance in (1.0, 3.0):
        images = model.sample(
            labels, steps=2, guidance=guidance, temperature=temperature, draws=ImageDraws(1, range(2))
        )
        assert images.isfinite().all()


@EVERY
def test_the_estimate_knows_every_score(name):
    run = with_score_and_order("digits", RUNS["digits"], name, None)
    assert training_flops(run.model) > 0
    text = estimate_run(run).report()
    assert ("was not measured" in text) == (name != "energy")
    assert estimate_run(run).peak_gb > 0


@OTHERS
def test_what_only_the_energy_score_has_is_refused(name):
    model = with_score(TINY, name)
    own = SCORES[name].train_options
    for option, value in (("tau", 0.9), ("loss_chunks", 2), ("rows_per_noise", 4)):
        if option not in own:
            with pytest.raises(ValueError, match=f"{option} is {value}; the {name} score has no {option}"):
                RunConfig(model=model, train=TrainConfig(**{option: value}))
    if "finetune_tau" not in own:
        with pytest.raises(ValueError, match=f"finetune_tau is 0.99; the {name} score has no finetune_tau"):
            RunConfig(model=model, train=TrainConfig(finetune_steps=5))
        RunConfig(model=model, train=TrainConfig(finetune_steps=5, finetune_tau=1.0))
    if "loss_chunks" not in own:
        with pytest.raises(ValueError, match=f"loss_chunks is 2; the {name} score"):
            Engine(EAR(model), loss_chunks=2)


def test_sampling_options_of_another_score_are_refused(tiny_model, monkeypatch):
    """With an option of sampling given to a score of the test's own."""
    monkeypatch.setitem(SCORES, "other", ScoreEntry("nowhere:Nothing", sampling_options=("steps",)))
    with pytest.raises(ValueError, match="steps is 3; the energy score has no steps"):
        tiny_model.sample(torch.tensor([1]), steps=3)
    check_sampling(with_score(TINY, "energy"), SamplingConfig())


def test_orders_that_no_model_has(capsys, tmp_path):
    assert cli.main(["train", "digits", "--order", "sideways", "--out", str(tmp_path / "run")]) == 1
    assert "unknown order 'sideways'; use one of masked, causal, random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--score", "brier"], "unknown score 'brier'; use one of energy, "),
        (["--score=brier"], "unknown score 'brier'"),
        (["--score"], "--score needs a name; use one of energy, "),
        (["--order"], "--order needs a name; use one of masked, causal, random"),
        (["--score", "mixture", "--model.components", "0"], "components"),
        (["--score", "mixture", "--model.alpha", "1.5"], "alpha is 1.5; the mixture score has no alpha"),
        (["--model.components", "8"], "components is 8; the energy score has no components"),
        (["--score", "gaussian", "--train.loss-chunks", "2"], "the gaussian score has no loss_chunks"),
    ],
)
def test_bad_names_and_options_are_one_line(options, named, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "digits", "--out", str(out), "--dry-run", *options]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@OTHERS
def test_presets_take_every_score(name):
    for preset, run in RUNS.items():
        made = with_score_and_order(preset, run, name, None)
        assert made.model.score == name
        has_generator = "noise_dim" in SCORES[name].options
        assert made.train.generator_lr_scale == (run.train.generator_lr_scale if has_generator else 1)
        assert made.train.finetune_tau == 1
    assert with_score_and_order("digits", RUNS["digits"], "energy", "masked") == RUNS["digits"]


def test_a_checkpoint_of_another_score(tmp_path):
    """The weight file of one score in the run of another."""
    config = replace(RUNS["digits"], model=with_score(TINY, "mixture"))
    model = make_model("gaussian")
    save_config(tmp_path, config)
    path = tmp_path / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    for name in ("model.safetensors", "ema.safetensors"):
        save_weights(path / name, dict(model.named_parameters()), model.config)
    for load in (EAR.from_pretrained, checkpoint.load_checkpoint):
        with pytest.raises(ValueError, match=r"holds a model of score 'gaussian'; the run .* is of score 'mixture'"):
            load(tmp_path)


SMALL = "--train.batch-size 8 --train.checkpoint-every 2 --train.log-every 1 --sampling.steps 2"


@pytest.mark.parametrize("name", ["mixture", "gaussian"])
def test_the_commands_on_a_run_of_it(name, tmp_path, capsys):
    out = tmp_path / "run"
    sizes = "--model.width 16 --model.depth 1 --model.num-heads 2 --model.class-tokens 2"
    train = ["train", "digits", "--out", str(out), *SMALL.split(), *sizes.split()]
    own = ["--model.components", "2"] if name == "mixture" else []
    assert cli.main([*train, "--score", name, *own, "--train.steps", "2"]) == 0, capsys.readouterr().err
    assert load_config(out).model.score == name
    assert ("rejection: " in capsys.readouterr().out) == (name == "mixture")
    resume = ["train", "digits", "--out", str(out), "--resume", "--train.steps", "4"]
    for wrong in (["--score", "energy"], ["--order", "causal"]):
        assert cli.main([*resume, *wrong]) == 1
        error = capsys.readouterr().err
        assert f"{out} is a run of {wrong[0].removeprefix('--')}" in error
        assert f"leave {wrong[0]} out" in error
    assert cli.main([*resume, "--score", name]) == 0, capsys.readouterr().err
    metrics = read_metrics(out)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and "tau" not in line for line in metrics)
    images = tmp_path / "images"
    sample = ["sample", str(out), "--num", "6", "--images-out", str(images), "--guidance", "2"]
    assert cli.main(sample) == 0, capsys.readouterr().err
    assert ("guided tokens" in capsys.readouterr().out) == (name == "mixture")
    assert len(list(images.rglob("*.png"))) == 6
    described = json.loads((images / "sampling.json").read_text())
    assert {field.name for field in dataclasses.fields(SamplingConfig)} <= set(described)
    assert cli.main(["evaluate", str(out), "--num", "20"]) == 0, capsys.readouterr().err
    assert json.loads((out / "evaluation.json").read_text())["num_samples"] == 20
    capsys.readouterr()
    assert cli.main(["convert", str(out), "--out", str(tmp_path / "public.pth")]) == 1
    error = capsys.readouterr().err
    assert f"is of score '{name}', backbone 'ear' and order 'masked'; public checkpoints are of energy" in error
    assert error.count("\n") == 1
