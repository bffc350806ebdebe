"""What a run writes beside its checkpoints: environment.json, metrics.jsonl, TensorBoard, and its progress."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ear_model.config import TrainConfig
from ear_model.errors import WriteError, words_of
from ear_model.files import read_json, write_atomically, write_json
from ear_model.progress import Progress
from ear_model.run_dir import METRICS_FILE, read_metrics
from ear_model.training import distributed, optim

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("ear-kernels", "torch", "triton", "numpy", "timm", "safetensors")


class RunLog:
    """Metrics and progress of a run that has done ``step`` steps.

    Args:
        run_dir: where metrics.jsonl is.
        train: the run.
        step: steps done.
        quiet: show no progress.
        has_tau: whether the score has a tau to write down.
    """

    def __init__(self, run_dir: Path, train: TrainConfig, step: int, *, quiet: bool, has_tau: bool) -> None:
        self.has_tau = has_tau
        self.train, self.first, self.started = train, step, time.perf_counter()
        self.metrics = (run_dir / METRICS_FILE).open("a")
        self.board = _tensorboard(run_dir)
        self.progress = Progress(train.steps, step, "step", quiet=quiet)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)
        with contextlib.suppress(OSError):  # of a line that could not be written before
            self.metrics.close()
        if self.board is not None:
            self.board.close()

    def record(self, step: int, loss: float, norm: float) -> None:
        """Loss and gradient norm of the steps up to ``step``."""
        train = self.train
        line = {
            "step": step,
            "loss": loss,
            "gradient_norm": norm,
            "lr": optim.learning_rate(step - 1, train),
            **({"tau": optim.tau(step - 1, train)} if self.has_tau else {}),
            "images_per_second": train.batch_size * (step - self.first) / (time.perf_counter() - self.started),
        }
        try:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise WriteError(f"can't write {self.metrics.name}: {words_of(error)}") from error
        if self.board is not None:
            for key in ("loss", "gradient_norm", "lr", "images_per_second"):
                self.board.add_scalar(key, line[key], step)
        note = f"loss {loss:.4f}, {line['images_per_second']:.0f} images/s"
        self.progress.update(step - self.progress.done, note)


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint of ``step``."""
    path = run_dir / METRICS_FILE
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if path.exists() else []
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_environment(run_dir: Path, device: torch.device, preset: str = "") -> None:
    """Write RUN/environment.json: command, machine and versions."""
    environment = {
        "preset": preset,
        "command": sys.argv,
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(run_dir / ENVIRONMENT_FILE, environment)


def preset_of(run_dir: Path) -> str:
    """The preset that a run was begun with, "" if that is not known."""
    path = run_dir / ENVIRONMENT_FILE
    return str(read_json(path).get("preset", "")) if path.is_file() else ""


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout that this program runs from, "-dirty" if changed; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
