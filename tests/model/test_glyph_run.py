"""The script of the GPU run, at a size for a CPU: every stage runs and everything it promises is left."""

import itertools
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import glyph_data, glyph_run
from ear_model.data.images import LabelledImages
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.training import autoencoder as training
from tests.model.conftest import write_tree

# 16 latents of 4 numbers, of images of 16 pixels.
TINY = {
    **{"seconds": 4, "images": 120, "real": 48, "num": 30, "workers": 1, "settings": "1:1,2:0.7", "grid-every": 2},
    **{
        "model.num-classes": 3,
        "model.width": 16,
        "model.depth": 1,
        "model.num-heads": 2,
        "model.generator-width": 16,
    },
    **{
        "model.generator-depth": 1,
        "model.image-size": 4,
        "model.channels": 4,
        "train.batch-size": 8,
        "train.ema": 0.9,
    },
    **{"train.warmup-steps": 2, "sampling.steps": 2, "judge-epochs": 1, "judge-batch-size": 40},
    **{"autoencoder.multipliers": (1, 1, 2), "autoencoder.latent-channels": 4, "autoencoder.norm-groups": 4},
    **{"autoencoder.channels": 16, "tokenizer-seconds": 3, "tokenizer-batch-size": 8},
}


def words(**changed) -> list[str]:
    """The command line of TINY."""
    options: dict = {**TINY, **{name.replace("_", "-"): value for name, value in changed.items()}}
    lists = {name: value if isinstance(value, tuple) else (value,) for name, value in options.items()}
    return [str(word) for name, values in lists.items() for word in (f"--{name}", *values)]


@pytest.fixture
def _one_thread():
    """Threads that wait for each other on a busy machine make a step of this size take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_every_stage(tmp_path, capsys):
    out, renders = tmp_path / "out", tmp_path / "renders.pt"
    glyph_run.main([str(out), *words(renders=renders), "--save-weights"])
    scores = json.loads((out / "scores.json").read_text())
    assert scores["steps"] > 20
    assert 0 < scores["training_seconds"] < 20
    assert scores["options"]["config"]["model"]["masking"] == "cosine"
    assert [setting["guidance"] for setting in scores["settings"]] == [1.0, 2.0]
    assert scores["settings"][0]["num_samples"] == 30
    assert scores["settings"][0]["num_train"] == 120
    assert len(scores["grids_recognised"]) >= 2  # of the untrained model, and at the end
    curve = json.loads((out / "progress.json").read_text())["curve"]
    assert curve[-1][2] == pytest.approx(scores["final_loss"])
    assert curve[-1][2] < curve[0][2]
    # Better than the mean of the training images for every one of them.
    stored = torch.load(renders, weights_only=True)
    real, train = (stored[name][0].float() / 127.5 - 1 for name in ("real", "train"))
    assert scores["reconstruction"]["psnr"] > 10 * math.log10(4 / (real - train.mean(0)).square().mean())
    assert load_latent_tokenizer(out / "tokenizer.safetensors").downsampling == 4
    assert Image.open(out / "samples.png").size == (10 * 17 * 2 + 2, 3 * 17 * 2 + 2)
    assert {path.name for path in out.iterdir()} >= {"judge.safetensors", "ema.safetensors", "loss.png"}
    told = capsys.readouterr().out
    assert "grid of 30 samples" in told
    assert "held-out reconstructions" in told

    again, kept = tmp_path / "again", {name: out / f"{name}.safetensors" for name in ("judge", "tokenizer")}
    deadline = time.time() + 120
    glyph_run.main([str(again), *words(renders=renders, init=out / "ema.safetensors", deadline=deadline, **kept)])
    continued = json.loads((again / "progress.json").read_text())["curve"]
    assert continued[0][2] < curve[0][2]
    repeated = json.loads((again / "scores.json").read_text())
    assert repeated["judge_accuracy"] == scores["judge_accuracy"]
    assert repeated["reconstruction"] == scores["reconstruction"]
    assert not (again / "judge.safetensors").exists()


@pytest.mark.usefixtures("_one_thread")
def test_deadline_cuts_training_and_scores(tmp_path, monkeypatch, capsys):
    # A second to train, and the time is up before the second setting.
    now = time.time()
    limits = {"seconds": 600, "scoring-seconds": -1, "deadline": now, "tokenizer-seconds": 1}
    monkeypatch.setattr(glyph_run.time, "time", lambda: now)
    glyph_run.main([str(tmp_path), *words(**limits)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["settings"]) == 1
    assert scores["training_seconds"] < 6
    assert "no time left for guidance 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the deadline leaves -5 s to train"):
        glyph_run.main([str(tmp_path), *words(**{**limits, "scoring-seconds": 5})])


@pytest.mark.usefixtures("_one_thread")
def test_its_tokenizer_is_that_of_train_tokenizer(tmp_path, monkeypatch):
    """The same images give the same losses and the same autoencoder, by the clock as by a number of steps."""
    write_tree(tmp_path / "tree", {"a": 20, "b": 20}, size=16)
    shape = AutoencoderConfig(16, (1, 1), 1, 4, norm_groups=4)
    settings = training.TokenizerTraining(image_size=16, steps=30, batch_size=4)
    step, seen, losses = training.AutoencoderSteps.step, [], []

    def kept(self, images, number, lr):
        loss = step(self, images, number, lr)
        seen.append(images)
        losses.append((number, lr, loss.item()))
        return loss

    monkeypatch.setattr(training.AutoencoderSteps, "step", kept)
    training.train_autoencoder(tmp_path / "tree", tmp_path / "one.safetensors", shape, settings, quiet=True)
    by_steps, images = losses.copy(), iter(seen.copy())
    losses.clear()
    report = glyph_data.Report(tmp_path / "out")
    ticks = itertools.chain([0], itertools.count())
    monkeypatch.setattr(glyph_data, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(glyph_data, "pixels", lambda data, chosen: next(images))
    data = LabelledImages(torch.zeros(9, 3, 16, 16, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ("a",))
    tokenizer = glyph_data.train_tokenizer(data, shape, settings, 30.0, report)
    assert len(by_steps) == 30
    assert losses == [(number, pytest.approx(lr), loss) for number, lr, loss in by_steps]
    stored = load_latent_tokenizer(tmp_path / "one.safetensors").autoencoder.state_dict()
    assert all(stored[name].equal(value) for name, value in tokenizer.autoencoder.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model.channels": 8}, "model.channels is 8 and autoencoder.latent-channels 4"),
        ({"init": "ema.safetensors"}, "give --tokenizer too"),
        ({"model.masking": "none"}, "masking is 'none'"),
        ({"autoencoder.norm-groups": 3}, "a multiple of norm_groups, 3"),
    ],
)
def test_what_does_not_fit_is_named_at_once(changed, named, tmp_path, capsys):
    with pytest.raises(SystemExit):
        glyph_run.main([str(tmp_path / "out"), *words(**changed)])
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_renders_of_other_images_are_refused(tmp_path):
    report = glyph_data.Report(tmp_path)
    options = {"seed": 0, "workers": 1, "report": report}
    first = glyph_data.find_renders(tmp_path / "g.pt", 4, 8, 2, 16, **options)
    again = glyph_data.find_renders(tmp_path / "g.pt", 4, 8, 2, 16, **options)
    assert all(one.images.equal(other.images) for one, other in zip(first, again, strict=True))
    with pytest.raises(SystemExit, match=r"2 classes of \(3, 16, 16\); this run has 2 of \(3, 32, 32\)"):
        glyph_data.find_renders(tmp_path / "g.pt", 4, 8, 2, 32, **options)
    with pytest.raises(SystemExit, match="this run has 3 of"):
        glyph_data.find_renders(tmp_path / "g.pt", 4, 8, 3, 16, **options)
