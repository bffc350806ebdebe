"""The script of the GPU run, at a size for a CPU: every stage runs and everything it promises is left."""

import argparse
import json
import math
import sys
import time
from collections import Counter

import pytest
import torch
from PIL import Image

from benchmarks import glyph_run
from ear_model.config import RUNS
from ear_model.ear import EAR
from ear_model.tokenizers.latent import load_latent_tokenizer

TINY = {
    **{"seconds": 6, "images": 120, "real": 48, "num": 30, "workers": 1, "classes": 3, "size": 16, "width": 16},
    **{"depth": 1, "heads": 2, "generator-width": 16, "generator-depth": 1, "batch-size": 8, "judge-epochs": 1},
    **{"judge-batch-size": 40, "steps": 2, "settings": "1:1,2:0.7", "warmup-steps": 2, "grid-every": 3, "ema": 0.9},
}


@pytest.fixture
def _one_thread():
    """Threads that wait for each other on a busy machine make a step of this size take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_every_stage(tmp_path, monkeypatch, capsys):
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", str(tmp_path / "out"), *options, "--save-weights"])
    glyph_run.main()
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["steps"] > 20
    assert 0 < scores["training_seconds"] < 20
    assert [setting["guidance"] for setting in scores["settings"]] == [1.0, 2.0]
    assert scores["settings"][0]["num_samples"] == 30
    assert scores["settings"][0]["num_train"] == 120
    curve = json.loads((out / "progress.json").read_text())["curve"]
    assert curve[-1][2] == pytest.approx(scores["final_loss"])
    assert curve[-1][2] < curve[0][2]
    assert Image.open(out / "samples.png").size == (10 * 17 * 2 + 2, 3 * 17 * 2 + 2)
    assert {path.name for path in out.iterdir()} >= {"judge.safetensors", "ema.safetensors", "loss.png"}
    assert "grid of 30 samples" in capsys.readouterr().out

    again = [str(tmp_path / "again"), *options, "--init", str(out / "ema.safetensors")]
    again += ["--judge", str(out / "judge.safetensors"), "--deadline", str(time.time() + 120)]
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", *again])
    glyph_run.main()
    continued = json.loads((tmp_path / "again" / "progress.json").read_text())["curve"]
    assert continued[0][2] < curve[0][2]
    repeated = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert repeated["judge_accuracy"] == scores["judge_accuracy"]
    assert not (tmp_path / "again" / "judge.safetensors").exists()


def test_deadline_cuts_training_and_scores(tmp_path, monkeypatch, capsys):
    options = [word for name, value in TINY.items() if name != "seconds" for word in (f"--{name}", str(value))]
    # A second to train, and the time is up before the second setting.
    limits = ["--masks", "cosine", "--positions", "0.2", "--seconds", "600"]
    limits += ["--scoring-seconds", "-1", "--deadline", str(time.time())]
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", str(tmp_path), *options, *limits])
    monkeypatch.setattr(glyph_run.time, "time", lambda: float(limits[-1]))
    glyph_run.main()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["settings"]) == 1
    assert scores["training_seconds"] < 6
    assert "no time left for guidance 2" in capsys.readouterr().out


def test_cosine_masks_follow_the_decoding():
    config = RUNS["glyphs64"].model
    counts = [glyph_run.draw_num_masked("cosine", config) for _ in range(4000)]
    assert min(counts) >= 1
    assert max(counts) == 256
    assert sum(counts) / len(counts) == pytest.approx(256 * 2 / 3.14159, rel=0.05)
    assert Counter(count < 128 for count in counts)[True] / len(counts) == pytest.approx(1 / 3, abs=0.04)
    assert glyph_run.draw_num_masked("paper", config) is None


def test_started_positions_know_their_neighbours():
    model = EAR(RUNS["glyphs64"].model)
    first, classes = model.backbone.decoder_pos_embed_learned[0].clone(), model.config.class_tokens
    glyph_run.start_positions(model, 0.25)
    positions = model.backbone.decoder_pos_embed_learned[0]
    assert positions[:classes].equal(first[:classes])
    assert positions[classes:].std().item() == pytest.approx(0.25, rel=0.1)
    distances = (positions[classes:] - positions[classes + 8 * 16 + 8]).norm(dim=1).unflatten(0, (16, 16))
    # Nearest to the token in row 8, column 8: itself, then those beside, above and below it.
    assert distances.flatten().argsort()[0] == 8 * 16 + 8
    beside = distances[[7, 9, 8, 8], [8, 8, 7, 9]].max()
    assert (distances <= beside).sum() == 5


@pytest.mark.usefixtures("_one_thread")
def test_with_a_tokenizer(tmp_path, monkeypatch, capsys):
    changed = {
        "downsampling": 4,
        "latent-channels": 4,
        "tokenizer-seconds": 3,
        "tokenizer-batch-size": 8,
        "seconds": 3,
    }
    options = [word for name, value in {**TINY, **changed}.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", str(tmp_path / "out"), *options])
    glyph_run.main()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["model"]["image_size"], scores["model"]["channels"], scores["model"]["patch_size"]) == (4, 4, 1)
    # Better than the mean of the training images for every one of them.
    options = argparse.Namespace(classes=3, seed=0, size=16, workers=1)
    real, train = (
        glyph_run.render(count, options, split).images / 127.5 - 1 for count, split in ((48, "test"), (120, "train"))
    )
    assert scores["reconstruction"]["psnr"] > 10 * math.log10(4 / (real - train.mean(0)).square().mean())
    assert scores["settings"][0]["num_samples"] == 30
    assert load_latent_tokenizer(tmp_path / "out" / "tokenizer.safetensors").downsampling == 4
    assert Image.open(tmp_path / "out" / "samples.png").size == (10 * 17 * 2 + 2, 3 * 17 * 2 + 2)
    assert "held-out reconstructions" in capsys.readouterr().out
