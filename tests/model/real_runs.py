"""Commands in processes of their own, for tests that kill, signal and look at them."""

import os
import sys
import time
from pathlib import Path

import torch

from ear_model import cli
from ear_model.run_dir import latest_checkpoint, read_metrics
from ear_model.tensor_files import read_tensors
from ear_model.training import checkpoint


def options(**values: object) -> list[str]:
    """``--name value`` of each; ``model__width`` is --model.width."""
    return [word for name, value in values.items() for word in ("--" + name.replace("__", "."), str(value))]


SMALL = [
    *options(data="cache", model__image_size=8, model__channels=3, model__patch_size=2, model__num_classes=2),
    *options(model__width=16, model__depth=1, model__num_heads=2, model__class_tokens=2, model__noise_dim=8),
    *options(model__generator_width=16, model__generator_depth=1, train__steps=24, train__batch_size=4),
    *options(train__warmup_steps=2, train__finetune_steps=0, train__checkpoint_every=3, train__log_every=1),
    *options(sampling__steps=2, device="cpu"),
]
PIXELS = options(tokenizer="pixels", image_size=8, shard_size=4, workers=0, device="cpu")


def start(arguments: list[str], log: Path) -> int:
    """The command in a process of its own, forked, so that torch need not be imported every time; its number."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(words, 1)
        os.dup2(words, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        status = cli.main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """The exit status, or None if it takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def trained(out: Path) -> dict[str, object]:
    """Weights, averages, optimiser and the steps of the metrics."""
    assert not list(out.rglob(".tmp-*"))
    found: dict[str, object] = {"metrics": [(line["step"], line["loss"]) for line in read_metrics(out)]}
    path = latest_checkpoint(out)
    for name in ("model.safetensors", "ema.safetensors"):
        found |= {f"{name} {key}": tensor.numpy().tobytes() for key, tensor in read_tensors(path / name)[1].items()}
    state = checkpoint.load_trainer_state(path)
    for index, moments in state["optimizer"]["state"].items():
        found |= {f"{index} {key}": value.numpy().tobytes() for key, value in moments.items()}
    return found


LONG = [*SMALL, *options(train__steps=100_000, train__checkpoint_every=50_000)]
STEPS = options(train__steps=300, train__checkpoint_every=1000)


def training(cache: Path, out: Path, *more: object) -> list[str]:
    return ["train", "imagenet256", "--data-path", str(cache), "--out", str(out), *SMALL, *map(str, more)]


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def has_steps(out: Path) -> bool:
    return (out / "metrics.jsonl").is_file() and len(read_metrics(out)) > 2
