"""The script of the GPU run, at a size for a CPU: every stage runs and everything it promises is left."""

import json
import sys

import pytest
from PIL import Image

from benchmarks import glyph_run

TINY = {
    **{"seconds": 2, "images": 120, "real": 48, "num": 30, "workers": 1, "classes": 3, "size": 16, "width": 16},
    **{"depth": 1, "heads": 2, "generator-width": 16, "generator-depth": 1, "batch-size": 8, "judge-epochs": 1},
    **{"judge-batch-size": 40, "steps": 2, "settings": "1:1,2:0.7", "warmup-steps": 2, "grid-every": 1},
}


def test_every_stage(tmp_path, monkeypatch, capsys):
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", str(tmp_path / "out"), *options, "--save-weights"])
    glyph_run.main()
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["steps"] > 20
    assert 2 <= scores["training_seconds"] < 6
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
    monkeypatch.setattr(sys, "argv", ["glyph_run.py", *again])
    glyph_run.main()
    continued = json.loads((tmp_path / "again" / "progress.json").read_text())["curve"]
    assert continued[0][2] < curve[0][2]
