"""Arguments without sense, drawn from the commands' own dataclasses: one plain line, never a traceback or a hang.

A few dozen in every run; `pytest -m soak tests/model/test_hostile_arguments.py -s` tries 1,000 and more.
"""

import collections
import dataclasses
import os
import random
import resource
import signal
import stat
import typing
from pathlib import Path

import pytest
import tyro

from ear_model.commands import (
    cache,
    convert,
    evaluate,
    glyphs,
    mnist,
    sample,
    study,
    train,
    train_judge,
    train_tokenizer,
)
from ear_model.training.trainer import Trainer
from tests.model.conftest import tiny_run, write_tree
from tests.model.real_runs import PIXELS, options, start, wait

SECONDS = 20
WORDS = ["", " ", "five", "-", "--", "-x", "é", "\udcff", "a" * 5000, "line\nbreak", "\x1b[31mred", "None", "[]"]
NUMBERS = ["0", "-1", "-0.0", "1.5", "1e400", "nan", "inf", "-inf", "1e-400", "9" * 20, "4294967296", "0x8", "8"]
PATHS = ["", ".", "..", "/", "null", "zero", "pipe", "loop", "dangling", "file", "file/x", "folder", "/proc/none/x"]
TINY = [
    *options(model__width=16, model__depth=1, model__num_heads=2, model__class_tokens=2, model__noise_dim=8),
    *options(model__generator_width=16, model__generator_depth=1, train__steps=1, train__batch_size=4),
    *options(train__finetune_steps=0, sampling__steps=1, device="cpu"),
]


def fields_of(kind: type, prefix: str = "") -> dict[str, str]:
    """Options of a command, --NAME, and whether they take words, numbers or paths; "" is what has no name."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(plain):
            inline = any(getattr(mark, "name", None) == "" for mark in marks)
            found |= fields_of(plain, prefix if inline else f"{prefix}{name}.")
        elif any("Positional" in str(mark) or "POSITIONAL" in str(mark).upper() for mark in marks):
            found[""] = "path"
        elif plain is not bool:
            text = str(plain)
            kind_of = "path" if "Path" in text or name in ("tokenizer", "data_path") else "number"
            found["--" + f"{prefix}{name}".replace("_", "-")] = "word" if "Literal" in text else kind_of
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that works, with some of its arguments replaced."""

    command: str
    arguments: list[str]


COMMANDS = {
    "train": train.Train,
    "cache": cache.Cache,
    "glyphs": glyphs.Glyphs,
    "mnist": mnist.Mnist,
    "sample": sample.Sample,
    "evaluate": evaluate.Evaluate,
    "convert": convert.Convert,
    "train-judge": train_judge.TrainJudge,
    "train-tokenizer": train_tokenizer.TrainTokenizer,
    "study": study.StudyCommand,
}


def sound(inputs: Path, command: str) -> tuple[str | None, list[str]]:
    """Positional argument and options of a call that works and is over soon."""
    tree, run = str(inputs / "tree"), str(inputs / "run")
    return {
        "train": ("digits", ["--out", "out", *TINY]),
        "cache": (tree, ["--out", "out", *PIXELS]),
        "glyphs": (None, ["--out", "out", *options(num_per_class=1, classes=2, size=16, workers=1)]),
        "mnist": (None, ["--out", "out", "--split", "test"]),
        "sample": (run, ["--out", "out.png", *options(num=4, steps=1, device="cpu")]),
        "evaluate": (run, options(num=20, steps=1, device="cpu")),
        "convert": (run, ["--out", "out.pth"]),
        "train-judge": (tree, ["--out", "out", *options(epochs=1, image_size=8, device="cpu")]),
        "train-tokenizer": (tree, ["--out", "out.safetensors", *options(steps=1, batch_size=2, image_size=8)]),
        "study": ("guidance", ["--out", "out", "--report", "report", "--quick", "--estimate", "--devices", "cpu"]),
    }[command]


def draw(inputs: Path, draws: random.Random, command: str) -> list[str]:
    """A hostile call of a command: one to three of its arguments make no sense, or are odd but allowed."""
    positional, rest = sound(inputs, command)
    fields = fields_of(COMMANDS[command])
    for name in draws.sample(sorted(fields), min(len(fields), draws.choice((1, 1, 1, 2, 3)))):
        likely = {"path": PATHS, "number": NUMBERS, "word": WORDS}[fields[name]]
        value = draws.choice(likely if draws.random() < 0.7 else [*WORDS, *NUMBERS, *PATHS])
        if name:
            rest = [*rest, f"{name}={value}"] if draws.random() < 0.5 else [*rest, name, value]
        elif command != "train":
            positional = value
    return [command, *([] if positional is None else [positional]), *rest]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tree(folder / "tree", {"cat": 12, "dog": 12}, size=16)
    trainer = Trainer(tiny_run(), folder / "run", device="cpu")
    trainer.train_step()
    trainer.save()
    return folder


def make_odd_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_text("no picture")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    for name, number in (("null", 3), ("zero", 5)):
        try:  # devices of its own: what replaced /dev/null would harm the machine
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(1, number))
        except PermissionError:
            (folder / name).symlink_to("file")


def outcome(arguments: list[str], folder: Path) -> str:
    """How it ended; raises AssertionError for anything but an exit of 0, 1 or 2 and one plain line."""
    make_odd_files(folder)
    log, before = folder.with_suffix(".log"), Path.cwd()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, limits[1]))  # so that huge sizes are refused, not swapped
    os.chdir(folder)
    try:
        process = start(arguments, log)
    finally:
        os.chdir(before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    status, long = wait(process, SECONDS), False
    if status is None:  # allowed and long, such as an image of every class of 10^9: it must still listen
        long = True
        os.kill(process, signal.SIGTERM)
        status = wait(process, SECONDS)
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    words = log.read_text(errors="replace")
    lines = [line for line in words.splitlines() if line.startswith("ear: ")]
    for fault in ("Traceback", "fault of this program", "\x1b["):
        assert fault not in words, f"{arguments}: {words}"
    assert status in ((143,) if long else (0, 1, 2)), f"{arguments}: status {status}, long: {long}: {words}"
    assert len(lines) == (status != 0), f"{arguments}: {words}"
    return "long, and ended by SIGTERM" if long else f"exit {status}"


def try_many(inputs: Path, folder: Path, count: int, seed: int) -> list[str]:
    """Faults of ``count`` calls."""
    draws, found, faults = random.Random(seed), collections.Counter(), []
    for number in range(count):
        command = sorted(COMMANDS)[number % len(COMMANDS)]
        arguments = draw(inputs, draws, command)
        try:
            found[outcome(arguments, folder / str(number))] += 1
        except AssertionError as error:
            faults.append(str(error))
            found["fault"] += 1
    print(f"{count} hostile calls, seed {seed}: {dict(found)}")
    return faults


def test_every_field_is_known():
    """The generator sees what the commands have."""
    assert "--train.lr" in fields_of(train.Train)
    assert fields_of(sample.Sample)["--out"] == "path"
    assert "" in fields_of(sample.Sample)
    assert "--shard-size" in fields_of(cache.Cache)
    assert tyro.conf.Positional is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_the_calls_work_without_what_is_hostile(inputs, tmp_path, command):
    positional, rest = sound(inputs, command)
    ended = outcome([command, *([] if positional is None else [positional]), *rest], tmp_path / "work")
    assert ended == "exit 0", (tmp_path / "work.log").read_text()


def test_hostile_arguments_are_one_line(inputs, tmp_path):
    faults = try_many(inputs, tmp_path, 40, 0)
    assert not faults, "\n\n".join(faults)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_hostile_arguments(inputs, tmp_path):
    """1,000 calls; HOSTILE_CALLS in the environment is another number."""
    faults = try_many(inputs, tmp_path, int(os.environ.get("HOSTILE_CALLS", "1000")), 1)
    assert not faults, "\n\n".join(faults)
