"""The training loop: a run directory from a configuration, interrupted and resumed at will."""

from __future__ import annotations

import copy
import json
import math
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model import checkpoint, optim
from ear_model.config import RunConfig
from ear_model.data import Batches, TrainingData, load_training_data
from ear_model.ear import EAR
from ear_model.files import require_writable, write_atomically
from ear_model.sample import resolve_device

METRICS_FILE = "metrics.jsonl"


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class Trainer:
    """One training run. ``step`` optimiser steps are done; :meth:`run` does the rest.

    Args:
        config: what to train.
        run_dir: where everything is written; must be new or empty, or a run to resume.
        resume: go on from the last checkpoint of ``run_dir``.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ValueError: a directory in use, not writable or too full; a configuration that differs from the run's.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, resume: bool = False, device: str = "auto") -> None:
        self.config, self.run_dir = config, run_dir
        self.device = resolve_device(device)
        self._check_run_dir(resume)
        data = load_training_data(config)
        self._check_data(data)
        # After the checks: nothing is drawn or written before they pass.
        torch.manual_seed(config.train.seed)
        self.model = EAR(config.model).to(self.device).train()
        self.model.score.rows_per_noise = config.train.rows_per_noise
        self.optimizer = optim.make_optimizer(self.model, config.train)
        self.ema = optim.ExponentialMovingAverage(self.model, config.train.ema)
        self.batches = Batches(data, config.train.batch_size // config.train.accumulate, config.train.seed)
        self.step = 0
        if resume and checkpoint.checkpoint_steps(run_dir):
            self._load()
        else:
            weight_bytes = sum(parameter.numel() * 4 for parameter in self.model.parameters())
            # Weights, average and two moments, of the checkpoint that is written and of the one before.
            require_writable(run_dir / METRICS_FILE, needed_bytes=2 * 4 * weight_bytes)
            checkpoint.save_config(run_dir, config)
            self._write_environment()
        self._truncate_metrics()

    def _check_run_dir(self, resume: bool) -> None:
        exists = self.run_dir.exists() and (not self.run_dir.is_dir() or any(self.run_dir.iterdir()))
        if resume:
            saved = checkpoint.load_config(self.run_dir)
            if saved != self.config:
                raise ValueError(f"{self.run_dir} was trained with another configuration; resume takes its own")
        elif exists:
            raise ValueError(f"{self.run_dir} exists already; give a new --out, or --resume to go on with it")

    def _check_data(self, data: TrainingData) -> None:
        model = self.config.model
        expected = (model.channels, model.image_size, model.image_size)
        if tuple(data.image_shape) != expected:
            raise ValueError(
                f"{self.config.data} has images of shape {tuple(data.image_shape)}; the model reads {expected}"
            )
        if data.num_classes > model.num_classes:
            raise ValueError(
                f"{self.config.data} has {data.num_classes} classes; the model knows {model.num_classes}"
            )

    def _write_environment(self) -> None:
        environment = {
            "command": sys.argv,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "packages": {
                name: _version(name) for name in ("ear-kernels", "torch", "triton", "numpy", "timm", "safetensors")
            },
            "git_revision": _git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        text = json.dumps(environment, indent=2) + "\n"
        write_atomically(self.run_dir / "environment.json", lambda path: path.write_text(text))

    def _truncate_metrics(self) -> None:
        """Drop what an interrupted run logged after the checkpoint that we go on from."""
        path = self.run_dir / METRICS_FILE
        kept = [line for line in read_metrics(self.run_dir) if line["step"] <= self.step] if path.exists() else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def _load(self) -> None:
        path = checkpoint.latest_checkpoint(self.run_dir)
        for name in ("model.safetensors", "ema.safetensors"):
            config, tensors = checkpoint.load_weights(path / name)
            if config != self.config.model:
                raise ValueError(f"{path / name} holds another architecture than {self.run_dir / 'config.json'}")
            if name == "model.safetensors":
                checkpoint.load_into(self.model, tensors, path / name)
            else:
                self.ema.averages = {key: tensors[key].to(self.device) for key in self.ema.averages}
        state = checkpoint.load_trainer_state(path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        return checkpoint.save_checkpoint(self.run_dir, self.step, self.model, self.ema.averages, state)

    def averaged_model(self) -> EAR:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step. Returns loss and gradient norm as tensors on the device, without waiting for it."""
        train = self.config.train
        lr = optim.learning_rate(self.step, train)
        optim.set_learning_rate(self.optimizer, lr)
        self.model.score.tau = train.finetune_tau if optim.is_finetuning(self.step, train) else train.tau
        use_bf16 = train.precision == "bf16" or (train.precision == "auto" and self.device.type == "cuda")
        total = torch.zeros((), device=self.device)
        for part in range(train.accumulate):
            images, labels = self.batches[self.step * train.accumulate + part]
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16):
                loss = self.model(images, labels) / train.accumulate
            loss.backward()
            total += loss.detach()
        norm = optim.clip_gradients(self.model.parameters(), train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        return total, norm.detach()

    def run(self, *, quiet: bool = False) -> None:
        """Train to the last step, with checkpoints, metrics and a progress bar.

        Raises:
            NonFiniteLossError: at the step it names; the last good checkpoint is kept.
        """
        from tqdm import tqdm

        train = self.config.train
        board = _tensorboard(self.run_dir)
        pending: list[tuple[Tensor, Tensor]] = []
        bar = tqdm(
            total=train.steps,
            initial=self.step,
            unit="step",
            disable=True if quiet else None,
            dynamic_ncols=True,
        )
        started, started_step, last_print = time.perf_counter(), self.step, 0.0
        with bar, (self.run_dir / METRICS_FILE).open("a") as metrics:
            while self.step < train.steps:
                pending.append(self.train_step())
                save = self.step % train.checkpoint_every == 0 or self.step == train.steps
                if not (save or self.step % train.log_every == 0):
                    continue
                loss, norm = self._read(pending)
                elapsed = time.perf_counter() - started
                done = self.step - started_step
                line = {
                    "step": self.step,
                    "loss": loss,
                    "gradient_norm": norm,
                    "lr": optim.learning_rate(self.step - 1, train),
                    "tau": self.model.score.tau,
                    "images_per_second": train.batch_size * done / elapsed,
                }
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                if board is not None:
                    for key in ("loss", "gradient_norm", "lr", "images_per_second"):
                        board.add_scalar(key, line[key], self.step)
                bar.update(len(pending))
                bar.set_postfix_str(f"loss {loss:.4f}, {line['images_per_second']:.0f} images/s")
                if bar.disable and not quiet and (elapsed - last_print > 20 or self.step == train.steps):
                    # Not a terminal (a log file, CI): a line now and then instead of a bar.
                    remaining = elapsed / done * (train.steps - self.step)
                    print(
                        f"step {self.step}/{train.steps}  loss {loss:.4f}  "
                        f"{line['images_per_second']:.0f} images/s  {remaining:.0f} s left",
                        flush=True,
                    )
                    last_print = elapsed
                pending.clear()
                if save:
                    self.save()
        if board is not None:
            board.close()

    def _read(self, pending: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss and last gradient norm of the steps since the last look: the only wait for the device."""
        values = torch.stack([torch.stack(pair) for pair in pending]).tolist()
        first = self.step - len(values) + 1
        for offset, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                steps = checkpoint.checkpoint_steps(self.run_dir)
                kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there was no checkpoint yet"
                raise NonFiniteLossError(
                    f"step {first + offset}: loss {loss}, gradient norm {norm}; training stopped, {kept}"
                )
        return sum(loss for loss, _ in values) / len(values), values[-1][1]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    for text in (run_dir / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
