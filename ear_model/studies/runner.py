"""Runs of a study: what is to be done, how long it takes, several side by side."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ear_model.config import RunConfig
from ear_model.errors import RunError
from ear_model.files import require_same, write_json
from ear_model.json_files import read_json
from ear_model.progress import Progress
from ear_model.run_dir import checkpoint_steps
from ear_model.studies.job import JOB_FILE, RESULT_FILE, RUN_DIR, description, with_codebook
from ear_model.studies.study import Arm, Study

LOG_FILE = "log.txt"
QUICK_STEPS, QUICK_NUM = 100, 100
"""Steps of a run and samples of a setting in a quick study, which shows that all works and tells nothing."""
PROBED_STEPS = 10
SECONDS_TO_END = 60


@dataclass(frozen=True)
class Job:
    """A run: an arm with a seed, and its folder."""

    arm: Arm
    seed: int
    folder: Path
    num: int

    @property
    def run(self) -> RunConfig:
        """How it is trained."""
        return replace(self.arm.run, train=replace(self.arm.run.train, seed=self.seed))

    def result(self) -> dict[str, Any] | None:
        """What it has found; None if it is not done."""
        path = self.folder / RESULT_FILE
        return {"arm": self.arm.name, "seed": self.seed, **read_json(path)} if path.is_file() else None


def jobs_of(study: Study, out: Path, seeds: int, num: int, *, quick: bool = False) -> list[Job]:
    """The runs of a study: every arm with the seeds 0 .. ``seeds`` - 1, in folders OUT/<arm>/<seed>.

    Seeds come first, so that an interrupted study has all arms.
    """
    arms = [_quickly(arm) for arm in study.arms] if quick else study.arms
    return [
        Job(arm, seed, out / arm.name / str(seed), min(num, QUICK_NUM) if quick else num)
        for seed in range(seeds)
        for arm in arms
    ]


def _quickly(arm: Arm) -> Arm:
    train = arm.run.train
    steps = min(train.steps, QUICK_STEPS)
    finetuned = train.finetune_steps * steps // train.steps
    train = replace(train, steps=steps, warmup_steps=min(train.warmup_steps, steps // 5), finetune_steps=finetuned)
    return replace(arm, run=replace(arm.run, train=train))


def prepare(jobs: Sequence[Job]) -> None:
    """Write what each job is. Raises ValueError for a folder of another job."""
    for job in jobs:
        wanted = description(job.run, job.arm.settings, job.num)
        path = job.folder / JOB_FILE
        if path.is_file():
            require_same(job.folder, read_json(path), wanted, "run of this study")
        else:
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted)


def seconds(jobs: Sequence[Job], device: str) -> float:
    """An estimate of what the jobs take one after another: the training that is left, by some steps of each model."""
    probed = dict[RunConfig, float]()
    total = 0.0
    for job in jobs:
        run = replace(job.run, train=replace(job.run.train, seed=0))
        if run not in probed:
            probed[run] = _step_seconds(run, device)
        done = checkpoint_steps(job.folder / RUN_DIR)
        total += probed[run] * (run.train.steps - (done[-1] if done else 0))
    return total


def _step_seconds(run: RunConfig, device: str) -> float:
    from ear_model.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(with_codebook(run, Path(folder)), Path(folder) / "run", device=device)
        for _ in range(2):
            float(trainer.train_step()[0])
        begun = time.perf_counter()
        for _ in range(PROBED_STEPS):
            loss = trainer.train_step()[0]
        float(loss)
        took = (time.perf_counter() - begun) / PROBED_STEPS
        trainer.stop_reading()
        return took


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], at_once: int) -> None:
    """Do the jobs that are not done, ``at_once`` on each device.

    A signal ends them after a step and a checkpoint; the same call goes on.

    Raises:
        RunError: a run failed; those that ran beside it are finished.
    """
    waiting = [job for job in jobs if job.result() is None]
    free = [device for _ in range(at_once) for device in devices]
    threads = max(1, (os.cpu_count() or 1) // len(free)) if "cpu" in devices else 1
    running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
    failed = ""
    with Progress(len(jobs), len(jobs) - len(waiting), "run") as progress, _ended(running):
        while running or (waiting and not failed):
            while waiting and free and not failed:
                job, device = waiting.pop(0), free.pop(0)
                running[_start(job, device, threads)] = job, device
            time.sleep(0.2)
            for process in [each for each in running if each.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                if process.returncode == 0:
                    progress.update(1, f"{job.arm.name}, seed {job.seed}")
                else:
                    failed = failed or _failure(job, process.returncode)
    if failed:
        raise RunError(failed)


def _start(job: Job, device: str, threads: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ear_model.studies.job", str(job.folder), device, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (job.folder / LOG_FILE).open("ab") as log:
        # Of a group of its own: Ctrl-C is told by this process, once.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _failure(job: Job, status: int) -> str:
    path = job.folder / LOG_FILE
    lines = path.read_text(errors="replace").splitlines()
    said = lines[-1].removeprefix("ear: error: ")[:300] if lines else "it said nothing"
    what = f"the run {job.arm.name} of seed {job.seed} ended with status {status}"
    return f"{what}: {said} ({path}); the same call goes on"


@contextlib.contextmanager
def _ended(running: dict[subprocess.Popen[bytes], tuple[Job, str]]) -> Iterator[None]:
    """Whatever happens, no process is left: each has a minute for its checkpoint."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        until = time.monotonic() + SECONDS_TO_END
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
