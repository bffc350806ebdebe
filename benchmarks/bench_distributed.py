"""Training on two GPUs against one: the same losses, a resume on another number, and images/s.

    python -m benchmarks.bench_distributed --out FILE.json       # two GPUs, NCCL; about five minutes

Every job is ``torchrun`` with the package's own Trainer on a cache of random latents. Without GPUs the loss curves
are compared on CPU processes with a tiny model (tests/benchmarks).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.bench_train_step import SMALL, make_config
from benchmarks.clocks import DEVICE, HAS_GPU
from benchmarks.harness import Row
from ear_model.presets import MODELS
from ear_model.processes import end_process
from ear_model.training import distributed
from ear_model.training.trainer import Trainer

STEPS, SPEED_STEPS, SECONDS = 30 if HAS_GPU else 4, 20, 200
# Without dropout the draws do not depend on the number of processes, so the curves must agree.
EQUAL = replace(MODELS["ear_base"], width=384, depth=6, num_heads=6, generator_width=256, generator_depth=3)
EQUAL = replace(EQUAL if HAS_GPU else SMALL, dropout=0.0, attention_dropout=0.0)
# The whole rate for the generator: samples soon leave their initial zero, and noise shows in the loss.
FAST = {"lr": 2e-3, "generator_lr_scale": 1.0, "warmup_steps": 5, "images": 64 if HAS_GPU else 8}
LIMITS = {"ddp-fp32": 1e-3, "fsdp-fp32": 1e-3, "ddp-bf16": 2e-2, "fsdp-bf16": 2e-2}  # relative, of a loss
KINDS = LIMITS if HAS_GPU else {"ddp-fp32": 1e-3}


def losses(trainer: Trainer, steps: int) -> list[float]:
    """Of the whole batch."""
    return distributed.mean(torch.stack([trainer.train_step()[0] for _ in range(steps)])).tolist()


def curves(folder: Path, resume: bool = False) -> dict[str, Any]:
    """Losses by kind, with a checkpoint half-way; or from the checkpoint of two processes on."""
    result = {}
    for kind in KINDS:
        parallel, precision = kind.split("-")
        config = make_config(EQUAL, folder, parallel=parallel, precision=precision, **FAST)
        run = folder / f"{kind}-{2 if resume else distributed.world_size()}"
        trainer = Trainer(config, run, resume=resume, device=DEVICE.type)
        result[kind] = losses(trainer, STEPS // 2)
        if not resume:
            trainer.save()
            result[kind] += losses(trainer, STEPS // 2)
    return result


def speed(folder: Path, name: str, images: int, parallel: str) -> dict[str, Any]:
    """Images/s of all processes together."""
    batch = images * distributed.world_size()
    config = make_config(MODELS[name], folder, images=batch, parallel=parallel)
    trainer = Trainer(config, folder / f"{name}-{distributed.world_size()}", device=DEVICE.type)
    losses(trainer, 6)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    last = losses(trainer, SPEED_STEPS)[-1]
    milliseconds = (time.perf_counter() - begun) / SPEED_STEPS * 1e3
    memory = max(distributed.gather_objects(torch.cuda.max_memory_reserved()))
    found = {"wall_ms": {"median": milliseconds}, "images_per_s": 1e3 * batch / milliseconds}
    return found | {"last_loss": last, "peak_bytes": memory}


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "curves": curves,
    "resume": functools.partial(curves, resume=True),
    "ear_base": functools.partial(speed, name="ear_base", images=64, parallel="ddp"),
    "ear_huge": functools.partial(speed, name="ear_huge", images=32, parallel="fsdp"),
}


def work(job: str, folder: Path) -> None:
    """What one process does."""
    distributed.prefer_expandable_segments()
    with distributed.process_group(DEVICE.type):
        result = JOBS[job](folder)
        if distributed.is_main():
            harness.write_json(folder / f"{job}-{distributed.world_size()}.json", result)


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory()
    make_config(EQUAL, Path(made.name))  # the latents, before several processes would write them
    return made


@functools.cache
def launch(job: str, processes: int) -> dict[str, Any]:
    """The result of a job on that many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.bench_distributed", "--worker", job, folder().name]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if answer.returncode:
        own = [line for line in answer.stderr.splitlines() if line.startswith("[rank0]")]
        raise RuntimeError(" ".join(own[-3:]) or answer.stderr[-2000:])
    return json.loads((Path(folder().name) / f"{job}-{processes}.json").read_text())


def compare(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> dict[str, Any]:
    """The largest relative differences, with the curves. AssertionError if one is over its limit."""
    differences = {}
    for kind, curve in wanted.items():
        pairs = zip(found[kind], curve[-len(found[kind]) :], strict=True)
        differences[kind] = max(abs(one - other) / abs(other) for one, other in pairs)
        assert differences[kind] <= LIMITS[kind], f"{kind}: losses differ by {differences[kind]:.1e}"
    note = f"largest difference {max(differences.values()):.1e}"
    return {"differences": differences, "losses": found, "note": note}


def same_curves() -> dict[str, Any]:
    return compare(launch("curves", 2), launch("curves", 1))


def same_resumed() -> dict[str, Any]:
    launch("curves", 2)
    return compare(launch("resume", 1), launch("curves", 1))


REASON = "" if torch.cuda.device_count() > 1 else "needs two GPUs"
LOSSES, BASE = "loss curves", "EAR-B, 64 images a process"
ROWS = [
    Row(LOSSES, "2 processes against 1", reason=REASON, measure=same_curves),
    Row(LOSSES, "saved by 2 processes, resumed on 1", reason=REASON, measure=same_resumed),
    *(Row(BASE, f"{n} processes", reason=REASON, measure=functools.partial(launch, "ear_base", n)) for n in (1, 2)),
    Row("EAR-H by FSDP2, 32 images each", "2 processes", reason=REASON, measure=lambda: launch("ear_huge", 2)),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_distributed(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
        end_process(0)
    sys.exit(harness.main(ROWS, __doc__))
