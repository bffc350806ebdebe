"""The command line in real processes, and its errors."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from ear_model import cli
from ear_model.run_dir import save_config
from ear_model.training import checkpoint
from tests.model.conftest import tiny_run


def _ear(*arguments, **options):
    command = [sys.executable, "-m", "ear_model.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


# Six steps at the preset's rates leave the output at its initial zero; these make samples that differ.
FAST = ("--train.lr", "0.02", "--train.warmup-steps", "1", "--train.generator-lr-scale", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short but whole run of `ear train digits` in its own process."""
    out = tmp_path_factory.mktemp("cli") / "run"
    small = "--train.steps 6 --train.batch-size 16 --train.log-every 2 --model.depth 1 --model.generator-depth 1"
    answer = _ear("train", "digits", "--out", out, *small.split(), "--sampling.steps", "3", *FAST)
    assert answer.returncode == 0, answer.stderr
    return out, answer


def test_train_leaves_pictures_scores_and_a_report(trained):
    out, answer = trained
    assert "class consistency" in answer.stdout
    assert "samples.png" in answer.stdout
    assert Image.open(out / "loss.png").size[0] > 300
    width, height = Image.open(out / "samples.png").size
    assert width == height  # 10 x 10
    scores = json.loads((out / "evaluation.json").read_text())
    assert scores["num_samples"] == 1000
    assert not list(out.rglob(".tmp-*"))


def test_sample_and_evaluate(trained, tmp_path):
    out, _ = trained
    picture = tmp_path / "new" / "grid.png"
    options = ["--classes", "3", "7", "--num", "16", "--guidance", "2", "--temperature", "0.7", "--steps", "3"]
    answer = _ear("sample", out, *options, "--out", picture)
    assert answer.returncode == 0, answer.stderr
    first = picture.read_bytes()
    assert Image.open(picture).size == (8 * 9 * 4 + 4, 2 * 9 * 4 + 4)
    _ear("sample", out, *options, "--out", picture)
    assert picture.read_bytes() == first
    _ear("sample", out, *options, "--out", picture, "--seed", 1)
    assert picture.read_bytes() != first
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    (copy / "evaluation.json").unlink()
    answer = _ear("evaluate", copy, "--num", 50, "--steps", 2)
    assert answer.returncode == 0, answer.stderr
    scores = json.loads((copy / "evaluation.json").read_text())
    assert (scores["guidance"], scores["temperature"], scores["num_samples"]) == (1.0, 1.0, 50)


def test_class_labels_are_spread_in_order():
    from ear_model.sampling.images import class_labels

    assert class_labels([3, 7], 6, 10).tolist() == [3, 3, 3, 7, 7, 7]
    assert class_labels([3, 7, 1], 4, 10).tolist() == [3, 3, 7, 1]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "digits", "--help"]])
def test_help_names_what_a_newcomer_needs(arguments, capsys):
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "digits" in text
    for command in (["sample", "--help"], ["evaluate", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert "Run directory of the trained model" in capsys.readouterr().out


BAD = [
    (["train", "digitz"], "unknown preset 'digitz'; use one of digits"),
    (["train", "ear_base"], "ear train imagenet256 --model ear_base"),
    (["train", "imagenet256"], "cache"),
    (["train", "digits", "--judge", "judge.safetensors"], "without --real TREE"),
    (["train", "digits", "--judge", "judge.safetensors", "--real", "tree"], "`ear train-judge` writes it"),
    (["train", "imagenet256", "--tokenizer", "kl16.safetensors"], "kl16.safetensors is not there"),
    (["paint"], "unknown command 'paint'"),
    (["train", "digits", "--train.stepz", "5"], "--train.stepz"),
    (["train", "digits", "--train.steps", "five"], "five"),
    (["train", "digits", "--model.alpha", "2.5"], "alpha is 2.5"),
    (["train", "digits", "--model.patch-size", "3"], "image_size 8 is not divisible by patch_size 3"),
    (["train", "digits", "--resume"], "config.json"),
    (["sample", "."], "not a run directory"),
    (["sample", "nowhere"], "not a directory"),
    (["sample"], "ear sample --help"),
    (["evaluate", "nowhere"], "not a directory"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_errors_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = ["--out", "."] if arguments[:2] == ["train", "digits"] else []
    assert cli.main([*arguments, *extra]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--classes", "3", "10"], "class 10 is out of range; this model knows 0..9"),
        (["--num", "0"], "num is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--guidance", "-1"], "guidance is -1.0"),
        (["--device", "tpu9"], "device 'tpu9'"),
        (["--out", "/proc/none/grid.png"], "can't write in /proc/none"),
    ],
)
def test_bad_sampling_is_one_line(tiny_model, tmp_path, options, named, capsys):
    save_config(tmp_path, tiny_run())
    checkpoint.save_checkpoint(tmp_path, 1, tiny_model, dict(tiny_model.named_parameters()), {})
    assert cli.main(["sample", str(tmp_path), *options]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1


def test_an_error_in_a_real_process():
    answer = _ear("train", "digitz")
    assert answer.returncode == 1
    assert (
        answer.stderr
        == "ear: error: unknown preset 'digitz'; use one of digits, glyphs64, mnist, imagenet256, imagenet512\n"
    )
    assert not answer.stdout


def test_non_finite_loss_is_one_line(tmp_path, monkeypatch, capsys):
    from ear_model.training.trainer import Trainer

    def nan_step(self):
        self.step += 1
        return torch.tensor(float("nan")), torch.tensor(1.0)

    monkeypatch.setattr(Trainer, "train_step", nan_step)
    assert cli.main(["train", "digits", "--out", str(tmp_path / "run")]) == 1
    assert "step 1: loss nan" in capsys.readouterr().err
