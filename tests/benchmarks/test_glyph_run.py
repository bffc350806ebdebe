"""The glyph run at a size for a CPU: every stage runs, what it promises is left, and the limit holds."""

import json
import time

import pytest
import torch

from benchmarks import glyph_run
from ear_model.run_dir import load_config

# 16 latents of 4 numbers, of images of 16 pixels.
TINY = {
    "model.num_classes": 3,
    "model.width": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.generator_width": 16,
    "model.generator_depth": 1,
    "model.image_size": 4,
    "model.channels": 4,
    "train.batch_size": 8,
    "train.ema": 0.9,
    "train.warmup_steps": 2,
    "train.log_every": 5,
    "autoencoder.multipliers": [1, 1, 2],
    "autoencoder.latent_channels": 4,
    "autoencoder.norm_groups": 4,
    "autoencoder.channels": 16,
    "tokenizer.image_size": 16,
    "tokenizer.steps": 30,
    "tokenizer.batch_size": 8,
    "judge.epochs": 1,
    "judge.batch_size": 40,
}


def words(out, seconds, **changed) -> list[str]:
    options = [str(out), "--seconds", str(seconds), "--scoring-seconds", "0", "--images", "40", "--real", "12"]
    options += ["--num", "12", "--workers", "1"]
    for name, value in changed.items():
        options += [f"--{name}", str(value)]
    for name, value in TINY.items():
        options += ["--set", f"{name}={json.dumps(value)}"]
    return options


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(glyph_run.Run, "steps_that_fit", lambda self, config: 20)
    out = tmp_path / "out"
    glyph_run.main(words(out, 600))
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["seconds"]) == ["trees", "judge", "tokenizer", "cache", "trial", "training", "scoring"]
    assert scores["steps"] == 20 == scores["curve"]["step"][-1]
    assert scores["config"]["model"]["masking"] == "cosine"
    assert [scores["evaluation"]["guidance"], scores["evaluation"]["other_settings"][0]["guidance"]] == [1.0, 2.0]
    assert scores["evaluation"]["num_samples"] == 12
    assert 0 <= scores["judge_accuracy"] <= 1
    assert load_config(out / "run").train.steps == 20
    assert {path.name for path in out.iterdir()} >= {
        "judge.safetensors",
        "tokenizer.safetensors",
        "loss.png",
        "cache",
    }
    assert not list(out.glob(".tmp-*"))

    # What is there stays: another run of the same directory only trains.
    (out / "run").rename(tmp_path / "first")
    glyph_run.main(words(out, 600, judge=out / "judge.safetensors"))
    assert list(json.loads((out / "scores.json").read_text())["seconds"])[:2] == ["trees", "cache"]


def test_steps_fit_into_what_is_left(tmp_path, monkeypatch):
    """By a simulated clock: a trial step takes 0.5 s, setting up 3 s, and 20 s are kept for scoring."""
    clock = [100.0]

    class Trial:
        def __init__(self, config, folder, device):
            clock[0] += 2.5

        def train_step(self):
            clock[0] += 0.5
            return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(glyph_run, "Trainer", Trial)
    monkeypatch.setattr(glyph_run.time, "perf_counter", lambda: clock[0])
    run = glyph_run.Run.__new__(glyph_run.Run)
    run.out, run.begun = tmp_path, 90.0
    run.options = type("Options", (), {"seconds": 200.0, "scoring_seconds": 20.0})
    # 90 + 200 - (100 + 3 + 20 in the trial) - 3 - 20 = 144 s of 0.5 s each
    assert run.steps_that_fit(None) == 288
    run.options.seconds = 100.0
    with pytest.raises(SystemExit, match="s are left to train; give more --seconds"):
        run.steps_that_fit(None)


@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        ("train.lr=-1", ValueError),
        ("train.unknown=1", TypeError),
        ("autoencoder.norm_groups=3", ValueError),
        ("train.lr=fast", json.JSONDecodeError),
        ("nothing.lr=1", KeyError),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, assignment, error):
    begun = time.perf_counter()
    with pytest.raises(error):
        glyph_run.main([str(tmp_path / "out"), "--set", assignment])
    assert not (tmp_path / "out").exists()
    assert time.perf_counter() - begun < 5
