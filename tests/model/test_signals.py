"""Signals: the first finishes the step, a second ends at once; workers end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ear_model import cli
from ear_model.run_dir import checkpoint_steps, read_metrics
from ear_model.training.trainer import Trainer
from tests.model.conftest import tiny_run, write_tree
from tests.model.real_runs import LONG, PIXELS, STEPS, has_steps, options, start, trained, training, until, wait


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_tree(folder / "tree", {"cat": 20, "dog": 20}, size=8)
    assert cli.main(["cache", str(folder / "tree"), "--out", str(folder / "cache"), *PIXELS]) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> dict[str, object]:
    """What a run leaves that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert wait(start(training(cache, folder / "run", *STEPS), folder / "log"), 120) == 0
    return trained(folder / "run")


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_and_its_checkpoint(cache, whole, tmp_path, number, status):
    """And the run goes on from there to the weights of one that was left alone."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(training(cache, out, *STEPS), log)
    until(lambda: has_steps(out))
    os.kill(process, getattr(signal, number))
    assert wait(process, 30) == status, log.read_text()
    (step,) = checkpoint_steps(out)
    assert 2 < step < 300, "the signal came too late to show anything"
    last = log.read_text().splitlines()[-1]
    what = "interrupted" if number == "SIGINT" else f"ended by {number}"
    assert last == f"ear: {what}; stopped after step {step} of 300, its checkpoint is written; --resume goes on"
    assert read_metrics(out)[-1]["step"] == step
    assert wait(start(training(cache, out, *STEPS, "--resume"), log), 120) == 0, log.read_text()
    assert trained(out) == whole


def test_a_second_signal_ends_at_once(cache, tmp_path, monkeypatch):
    """Also while the main thread waits where no handler runs, as in a library's exchange that hangs."""
    monkeypatch.setattr(Trainer, "save", lambda self: torch.zeros(1) if time.sleep(60) else None)
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(training(cache, out, *LONG), log)
    until(lambda: has_steps(out))
    os.kill(process, signal.SIGTERM)
    assert wait(process, 0.6) is None
    began = time.monotonic()
    os.kill(process, signal.SIGTERM)
    assert wait(process, 20) == 143
    assert time.monotonic() - began < 5
    assert "a second signal, SIGTERM: ended at once" in log.read_text()


def test_signals_that_come_together_are_one(cache, tmp_path):
    """`timeout` and schedulers send them to a process and to its group."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(training(cache, out, *LONG), log)
    until(lambda: has_steps(out))
    for _ in range(3):
        os.kill(process, signal.SIGTERM)
        time.sleep(0.01)
    assert wait(process, 30) == 143
    assert len(checkpoint_steps(out)) == 1, log.read_text()


def test_ignored_signals_stay_ignored(cache, tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    out, log = tmp_path / "run", tmp_path / "log"
    try:
        process = start(training(cache, out, *LONG), log)
    finally:
        signal.signal(signal.SIGHUP, before)
    until(lambda: has_steps(out))
    os.kill(process, signal.SIGHUP)
    assert wait(process, 1) is None
    os.kill(process, signal.SIGTERM)
    assert wait(process, 30) == 143


@pytest.mark.parametrize("command", ["glyphs", "sample", "train-tokenizer", "cache", "train-judge"])
def test_other_commands_end_plainly(cache, tmp_path, command):
    """They keep what is whole, leave nothing half, and the same call goes on."""
    log, out, tree = tmp_path / "log", tmp_path / "out", tmp_path / "tree"
    write_tree(tree, {"cat": 300, "dog": 300}, size=32)
    if command == "sample":
        trainer = Trainer(tiny_run(), tmp_path / "run", device="cpu")
        trainer.train_step()
        trainer.save()
    (tmp_path / "f").mkdir()
    arguments = {
        "glyphs": ["--out", out, *options(num_per_class=500, size=64, workers=2)],
        "sample": [tmp_path / "run", "--images-out", out, *options(num=100_000, batch_size=16, device="cpu")],
        "train-tokenizer": [tree, "--out", tmp_path / "f" / "t.safetensors", *options(steps=5000, image_size=32)],
        "cache": [tree, "--out", out, *options(tokenizer="pixels", image_size=64, shard_size=1, workers=2)],
        "train-judge": [tree, "--out", tmp_path / "f" / "judge", *options(epochs=5000, image_size=16)],
    }[command]
    process = start([command, *map(str, arguments)], log)
    if command in ("glyphs", "sample", "cache"):
        until(lambda: len(list(out.rglob("*.png")) + list(out.rglob("*.safetensors"))) > 2)
    else:
        time.sleep(3)
    os.kill(process, signal.SIGTERM)
    assert wait(process, 30) == 143, log.read_text()
    assert (
        f"ear: ended by SIGTERM; {cli.KEPT[command].split(',')[0][:8]}" in log.read_text()
        or "stopped" in log.read_text()
    )
    assert "Traceback" not in log.read_text()
    assert not list(tmp_path.rglob(".tmp-*"))
    if command == "train-tokenizer":
        assert (tmp_path / "f" / "t.safetensors.partial").is_file()


def children(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(words[1]) == process and words[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word to children is Linux's")
@pytest.mark.parametrize("command", ["glyphs", "cache"])
def test_workers_end_with_their_parent(tmp_path, command):
    write_tree(tmp_path / "tree", {"cat": 400, "dog": 400}, size=32)
    arguments = {
        "glyphs": options(num_per_class=5000, size=64, workers=2),
        "cache": [str(tmp_path / "tree"), *options(tokenizer="pixels", image_size=256, shard_size=4, workers=2)],
    }[command]
    process = start([command, "--out", str(tmp_path / "out"), *arguments], tmp_path / "log")
    until(lambda: len(children(process)) >= 2)
    until(lambda: len(list((tmp_path / "out").rglob("*.*"))) > 3)
    workers = children(process)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    until(lambda: not [each for each in workers if Path(f"/proc/{each}").exists()], 10)


@pytest.mark.slow
def test_a_job_of_torchrun_stops_at_one_step(cache, tmp_path):
    """SIGTERM to the launcher: all processes finish the same step, one checkpoint is written, --resume goes on."""
    out = tmp_path / "run"
    launcher = ["--standalone", "--nproc_per_node=2", "-m", "ear_model.train"]
    job = [sys.executable, "-m", "torch.distributed.run", *launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [*job, *training(cache, out, *LONG)[1:]]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        until(lambda: has_steps(out), 120)
        process.terminate()
        process.wait(60)
    (step,) = checkpoint_steps(out)
    words = log.read_text()
    assert words.count(f"ear: ended by SIGTERM; stopped after step {step} of 100000") == 1, words
    assert trained(out)
    more = [*LONG, *options(train__steps=step + 2), "--resume"]
    answer = subprocess.run(
        [*job, *training(cache, out, *more)[1:]], capture_output=True, env=environment, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    assert checkpoint_steps(out) == [step + 2]
