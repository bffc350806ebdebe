"""The whole path on a tiny image tree, by the commands that a newcomer would type."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from ear_model import cli
from ear_model.data.batches import Dataset
from ear_model.data.glyphs import CLASS_NAMES
from ear_model.data.images import load_tree
from ear_model.presets import RUNS
from ear_model.run_dir import load_config, save_config

SMALL_MODEL = (
    *("--model.num-classes", "4", "--model.width", "64", "--model.depth", "2"),
    *("--model.num-heads", "2", "--model.generator-width", "48", "--model.generator-depth", "2"),
    *("--model.class-tokens", "2", "--sampling.steps", "6", "--sampling.guidance", "1.5"),
)
PIXELS = ("--model.image-size", "16", "--model.channels", "3", "--model.patch-size", "4")
SHORT = (
    *("--train.steps", "30", "--train.batch-size", "32", "--train.lr", "3e-3", "--train.warmup-steps", "5"),
    *("--train.ema", "0.9", "--train.generator-lr-scale", "1", "--train.log-every", "10"),
)


def ear(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Training and held-out trees, and a judge."""
    root = tmp_path_factory.mktemp("walk")
    options = ("--classes", 4, "--size", 16, "--workers", 1)
    ear("glyphs", "--out", root / "train", "--num-per-class", 40, *options)
    ear("glyphs", "--out", root / "test", "--num-per-class", 20, "--split", "test", *options)
    ear("glyphs", "--out", root / "other", "--num-per-class", 2, "--classes", 3, "--size", 16, "--workers", 1)
    judge = root / "judge.safetensors"
    network = ("--channels", 8, 16, 32, 32, "--epochs", 3, "--batch-size", 32)
    ear("train-judge", root / "train", "--test", root / "test", "--out", judge, *network, "--device", "cpu")
    return root


def check_run(trees, run, *options):
    """What a finished run must have left, and what sample and evaluate make of it."""
    for name in ("samples.png", "loss.png"):
        assert Image.open(run / name).size[0] > 100
    ear("sample", run, "--num", 8, "--device", "cpu")
    assert Image.open(run / "grid.png").size[0] > 8 * 16
    judged = ("--judge", trees / "judge.safetensors", "--real", trees / "test", "--num", 40, "--batch-size", 20)
    ear("evaluate", run, *judged, *options, "--device", "cpu")
    scores = json.loads((run / "evaluation.json").read_text())
    assert list(scores["accuracy_per_class"]) == list(CLASS_NAMES[:4])
    assert (scores["guidance"], scores["temperature"], scores["num_samples"]) == (1.0, 1.0, 40)
    assert scores["other_settings"][0]["guidance"] == 1.5
    assert scores["num_compared"] == 40
    assert scores["num_train"] == 160
    assert 0 <= scores["accuracy"] <= 1
    # 30 steps can't draw digits: their distance must show, and the floors be those of real images.
    assert scores["energy_distance_pixels"] > 3 * abs(scores["energy_distance_pixels_floor"])
    assert scores["frechet_distance"] > scores["frechet_distance_floor"] > 0
    assert not list(run.rglob(".tmp-*"))


def test_images_to_scores(trees, tmp_path, capsys):
    """docs/glyphs.md: 64 latents of 8 numbers there, 16 of 8 here."""
    tokenizer, cache, run = tmp_path / "tokenizer.safetensors", tmp_path / "cache", tmp_path / "run"
    network = ("--model.channels", 16, "--model.multipliers", 1, 1, 2, "--model.norm-groups", 4)
    short = ("--image-size", 16, "--steps", 100, "--batch-size", 16, "--workers", 1, "--device", "cpu")
    ear("train-tokenizer", trees / "train", "--out", tokenizer, *network, *short)
    encoded = ("--tokenizer", "autoencoder", "--weights", tokenizer, "--image-size", 16, "--no-flips")
    ear("cache", trees / "train", *encoded, "--out", cache, "--workers", 0, "--device", "cpu")
    given = ("--data-path", cache, "--tokenizer", tokenizer, "--model.image-size", 4)
    ear("train", "glyphs64", *given, *SMALL_MODEL, *SHORT, "--out", run, "--device", "cpu")
    assert load_config(run).model.masking == "cosine"
    check_run(trees, run, "--train-images", trees / "train")
    ear("sample", run, "--num", 8, "--images-out", tmp_path / "images", "--device", "cpu")
    assert load_tree(tmp_path / "images", 16).class_names == CLASS_NAMES[:4]

    wide = replace(load_config(run), model=replace(RUNS["glyphs64"].model, image_size=8))
    (tmp_path / "wide").mkdir()
    save_config(tmp_path / "wide", wide)
    judged = ("--judge", trees / "judge.safetensors", "--real", trees / "test")
    assert cli.main([str(word) for word in ("evaluate", tmp_path / "wide", *judged)]) == 1
    assert "makes images of 32 pixels" in capsys.readouterr().err


def test_training_scores_by_a_judge(trees, tmp_path, monkeypatch, capsys):
    """On pixels and without a cache: the tree itself is the data set."""

    def from_tree(config):
        tree = load_tree(trees / "train", 16)
        return Dataset(tree.images.float() / 127.5 - 1, tree.labels)

    monkeypatch.setattr("ear_model.training.trainer.load_training_data", from_tree)
    monkeypatch.setattr("ear_model.evaluation.scoring.load_training_data", from_tree)
    run = tmp_path / "run"
    judged = ("--judge", trees / "judge.safetensors", "--real", trees / "test")
    ear("train", "glyphs64", *SMALL_MODEL, *PIXELS, *SHORT, "--out", run, "--device", "cpu", *judged)
    assert "least recognised" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["num_samples"] == 1000
    check_run(trees, run)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "is scored with --judge FILE --real TREE"),
        (("--judge", "{root}/judge.safetensors"), "without --real TREE"),
        (("--real", "{root}/test"), "without --judge FILE"),
        (("--judge", "{root}/nowhere", "--real", "{root}/test"), "`ear train-judge` writes it"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/nowhere"), "is no image tree"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/test", "--num", "0"), "num is 0"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/test", "--num", "3"), "a judge of 4 classes"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/other"), "the judge was trained on 4"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/test", "--steps", "0"), "steps is 0"),
        (("--judge", "{root}/judge.safetensors", "--real", "{root}/test"), "images of 64 pixels"),
    ],
)
def test_what_can_not_be_scored_is_named(trees, options, named, tmp_path, capsys):
    run = RUNS["glyphs64"]
    size = 64 if named.startswith("images of") else 16
    save_config(tmp_path, replace(run, model=replace(run.model, image_size=size, channels=3)))
    given = [option.format(root=trees) for option in options]
    assert cli.main(["evaluate", str(tmp_path), *given]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
