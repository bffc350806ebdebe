"""The lock of a run directory, what --resume takes, where paths lead, and leftovers."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ear_model import cli
from ear_model.files import DirectoryLock, remove_temporaries
from ear_model.run_dir import checkpoint_steps, load_config, save_config
from ear_model.training.trainer import Trainer
from tests.model.conftest import tiny_run, write_tree
from tests.model.real_runs import LONG, PIXELS, has_steps, options, start, training, until, wait


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_tree(folder / "tree", {"cat": 20, "dog": 20}, size=8)
    assert cli.main(["cache", str(folder / "tree"), "--out", str(folder / "cache"), *PIXELS]) == 0
    return folder / "cache"


def test_two_runs_of_one_directory(cache, tmp_path, capsys):
    """The second is refused with the first one's number, new and with --resume, and leaves no trace."""
    out = tmp_path / "run"
    Trainer(tiny_run(), out, device="cpu").save()
    before = sorted(out.rglob("*"))
    with DirectoryLock(out):
        for more in (["--resume"], []):
            assert cli.main(["train", "digits", "--out", str(out), *more]) == 1
            assert f"process {os.getpid()} is writing in {out}" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before
    process = start(training(cache, tmp_path / "new", *LONG), tmp_path / "log")
    until(lambda: has_steps(tmp_path / "new"))
    assert cli.main(training(cache, tmp_path / "new", "--resume")) == 1
    assert f"process {process} is writing in {tmp_path / 'new'}" in capsys.readouterr().err
    os.kill(process, signal.SIGKILL)  # the kernel releases it
    os.waitpid(process, 0)
    DirectoryLock(tmp_path / "new").release()


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--train.lr", "0.1"], "--train.lr is 0.1, the run was begun with 0.001"),
        (["--train.seed", "5"], "--train.seed is 5"),
        (["--data", "cache", "--data-path", "x"], "--data is 'cache'"),
        (["--model.width", "32"], "--model.width is 32"),
        (["--sampling.guidance", "9"], "--sampling.guidance is 9"),
        (["--train.no-cuda-graphs"], "--train.cuda-graphs is False"),
        (["--train.steps", "1"], "steps is 1; "),
        (["--model", "ear_base"], "--model is another model"),
    ],
)
def test_resume_refuses_what_changes_a_run(tmp_path, typed, named, capsys):
    out = tmp_path / "run"
    trainer = Trainer(tiny_run(), out, device="cpu", preset="digits")
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    stored = (out / "config.json").read_text()
    assert cli.main(["train", "digits", "--out", str(out), "--resume", "--device", "cpu", *typed]) == 1
    words = capsys.readouterr().err
    assert named in words
    assert words.count("\n") == 1
    assert (out / "config.json").read_text() == stored
    assert cli.main(["train", "glyphs64", "--out", str(out), "--resume"]) == 1
    assert "is a run of the preset digits, not glyphs64" in capsys.readouterr().err


def test_resume_takes_what_extends_a_run(cache, tmp_path, monkeypatch):
    """More steps, other intervals, moved data; recorded, so that the next --resume needs none of it."""
    out, log = tmp_path / "run", tmp_path / "log"
    assert wait(start(training(cache, out, *options(train__steps=4)), log), 60) == 0, log.read_text()
    moved = tmp_path / "moved"
    cache.rename(moved)
    try:
        monkeypatch.chdir(tmp_path)
        more = options(train__steps=9, train__log_every=2, train__checkpoint_every=5, data_path="moved", device="cpu")
        assert wait(start(["train", "imagenet256", "--out", "run", "--resume", *more], log), 60) == 0, log.read_text()
        config = load_config(out)
        assert config.data_path == str(moved)
        assert (config.train.steps, config.train.log_every, config.train.checkpoint_every) == (9, 2, 5)
        assert checkpoint_steps(out) == [9]
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert cli.main(["train", "imagenet256", "--out", "../run", "--resume", "--device", "cpu"]) == 0
        assert cli.main(["sample", "../run", *options(num=2, steps=1, images_out="images", device="cpu")]) == 0
        assert sorted(path.name for path in Path("images").iterdir() if path.is_dir()) == ["cat", "dog"]
    finally:
        moved.rename(cache)


def test_paths_are_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_config(tmp_path, replace(tiny_run(), data_path="some/../cache", tokenizer="kl16.ckpt"))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["data_path"], stored["tokenizer"]) == (str(tmp_path / "cache"), str(tmp_path / "kl16.ckpt"))
    save_config(tmp_path, tiny_run())
    assert load_config(tmp_path).data_path == ""


def test_leftovers_of_a_kill_are_removed(cache, tmp_path):
    out = tmp_path / "run"
    trainer = Trainer(tiny_run(steps=2), out, device="cpu")
    trainer.save()
    (out / "checkpoints" / ".tmp-step_00000002").mkdir()
    (out / "checkpoints" / ".tmp-step_00000002" / "model.safetensors").write_text("half")
    (out / ".tmp-123-config.json").write_text("half")
    Trainer(tiny_run(steps=2), out, resume=True, device="cpu")
    assert not list(out.rglob(".tmp-*"))
    new = tmp_path / "new"
    new.mkdir()
    (new / ".tmp-123-config.json").write_text("half")
    Trainer(tiny_run(steps=2), new, device="cpu")
    remove_temporaries(new)
