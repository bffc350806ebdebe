"""Commands killed with SIGKILL at random moments and started again, until they are done: as if nothing had been.

A few kills with fixed seeds in every run; `pytest -m soak tests/model/test_killed_runs.py -s` does 200 and more.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ear_model import cli
from ear_model.ear import EAR
from ear_model.run_dir import save_config
from ear_model.training import checkpoint
from tests.model.conftest import tiny_run, write_tree
from tests.model.real_runs import PIXELS, SMALL, options, start, trained, wait


@dataclass(frozen=True)
class Work:
    """A command, and what it leaves."""

    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, object]]


def files(out: Path) -> dict[str, object]:
    """Every file by its name; none may be a leftover."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not [name for name in found if ".tmp" in name]
    return found


@pytest.fixture(scope="module")
def works(tmp_path_factory) -> dict[str, Work]:
    folder = tmp_path_factory.mktemp("inputs")
    write_tree(folder / "tree", {"cat": 20, "dog": 20}, size=8)
    assert cli.main(["cache", str(folder / "tree"), "--out", str(folder / "cache"), *PIXELS]) == 0
    run = folder / "run"
    config = tiny_run()
    run.mkdir()
    save_config(run, config)
    torch.manual_seed(0)
    model = EAR(config.model)
    checkpoint.save_checkpoint(run, 1, model, {name: torch.randn_like(p) for name, p in model.named_parameters()}, {})

    def train(out: Path) -> list[str]:
        resume = ["--resume"] if (out / "config.json").exists() else []
        return ["train", "imagenet256", "--data-path", str(folder / "cache"), "--out", str(out), *SMALL, *resume]

    def sample(out: Path) -> list[str]:
        where = ["--images-out", str(out / "images"), "--npz", str(out / "all.npz")]
        return ["sample", str(run), "--num", "60", "--steps", "2", "--batch-size", "4", "--device", "cpu", *where]

    glyphs = options(num_per_class=3, classes=20, size=16, workers=1)
    return {
        "cache": Work(lambda out: ["cache", str(folder / "tree"), "--out", str(out), *PIXELS], files),
        "glyphs": Work(lambda out: ["glyphs", "--out", str(out), *glyphs], files),
        "sample": Work(sample, files),
        "train": Work(train, trained),
    }


def kill_until_done(work: Work, folder: Path, seed: int, expected: dict[str, object], seconds: float) -> int:
    """Number of kills on the way to the same result, each at a random moment of what one whole run takes."""
    draws, kills, out, log = random.Random(seed), 0, folder / f"out-{seed}", folder / "log"
    while True:
        process = start(work.arguments(out), log)
        # Later tries get longer, so that it ends.
        status = wait(process, draws.uniform(0, 1.1) * seconds * (1 + kills / 10))
        if status is None:
            os.kill(process, signal.SIGKILL)
            _, raw = os.waitpid(process, 0)
            status = os.waitstatus_to_exitcode(raw)
            if status == -signal.SIGKILL:
                kills += 1
                continue
        assert status == 0, f"seed {seed}, after {kills} kills: {log.read_text()}"
        found = work.result(out)
        assert found.keys() == expected.keys(), f"seed {seed}, after {kills} kills"
        different = [name for name in found if found[name] != expected[name]]
        assert not different, f"seed {seed}, after {kills} kills: {different[:5]}"
        return kills


def undisturbed(work: Work, folder: Path) -> tuple[dict[str, object], float]:
    """What it leaves and how long it takes."""
    began = time.monotonic()
    status = wait(start(work.arguments(folder / "whole"), folder / "log"), 200)
    assert status == 0, (folder / "log").read_text()
    return work.result(folder / "whole"), time.monotonic() - began


@pytest.mark.parametrize("name", ["train", "cache", "glyphs", "sample"])
def test_a_killed_command_goes_on_as_if_nothing_had_been(works, name, tmp_path):
    expected, seconds = undisturbed(works[name], tmp_path)
    kills = kill_until_done(works[name], tmp_path, 1, expected, seconds)
    print(f"{name}: {kills} kills, {len(expected)} results the same")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_kills(works, tmp_path):
    """60 kills and more of each of the four commands; KILLS in the environment is another number."""
    wanted = int(os.environ.get("KILLS", "60"))
    total = 0
    for name, work in works.items():
        folder = tmp_path / name
        folder.mkdir()
        expected, seconds = undisturbed(work, folder)
        kills = rounds = 0
        while kills < wanted:
            kills += kill_until_done(work, folder, rounds, expected, seconds)
            rounds += 1
        total += kills
        print(f"{name}: {kills} kills in {rounds} runs, all with the same {len(expected)} results")
    print(f"{total} kills")
    assert total >= 4 * wanted
