"""One run of a study, in a process of its own: ``python -m ear_model.studies.job FOLDER DEVICE THREADS``.

FOLDER/job.json says what to do. It trains FOLDER/run, going on from its last checkpoint, scores samples, and writes
FOLDER/result.json. A signal ends it after a step and a checkpoint.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ear_model import signals
from ear_model.config import RunConfig, SamplingConfig, from_dict, to_dict
from ear_model.errors import RunError
from ear_model.files import write_json
from ear_model.json_files import read_json
from ear_model.processes import end_with_parent
from ear_model.run_dir import CONFIG_FILE, checkpoint_steps, read_metrics
from ear_model.training.run_log import ENVIRONMENT_FILE

JOB_FILE, RESULT_FILE, RUN_DIR, CODEBOOK_FILE = "job.json", "result.json", "run", "codebook.safetensors"
LAST_STEPS = 0.05
"""Share of a run's steps, the last ones, whose mean loss is its final loss."""


def description(run: RunConfig, settings: Sequence[SamplingConfig], num: int) -> dict[str, Any]:
    """What job.json holds; ``num`` is how many samples are scored at each setting."""
    return {"run": to_dict(run), "settings": [to_dict(each) for each in settings], "num": num}


def do(folder: Path, device: str) -> None:
    """Do the job of a folder. Raises Interrupted for a signal, RunError and ValueError for what went wrong."""
    job = read_json(folder / JOB_FILE)
    where = str(folder / JOB_FILE)
    run = from_dict(RunConfig, job["run"], where)
    settings = [from_dict(SamplingConfig, each, where) for each in job["settings"]]
    model, diverged = _train(with_codebook(run, folder), folder / RUN_DIR, device)
    scores = [] if diverged else [_score(model, setting, int(job["num"]), run.train.seed) for setting in settings]
    metrics = read_metrics(folder / RUN_DIR)
    last = [line["loss"] for line in metrics if line["step"] > (1 - LAST_STEPS) * run.train.steps]
    result = {
        "diverged": diverged,
        "scores": scores,
        "loss": statistics.fmean(last) if last else None,
        "images_per_second": statistics.median(line["images_per_second"] for line in metrics) if metrics else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "environment": read_json(folder / RUN_DIR / ENVIRONMENT_FILE),
    }
    write_json(folder / RESULT_FILE, result)


def with_codebook(run: RunConfig, folder: Path) -> RunConfig:
    """The run, with a codebook of its data in FOLDER/codebook.safetensors if its score has one."""
    from ear_model.data.digits import load_digits
    from ear_model.score_names import score_entry
    from ear_model.tokenizers.config import CodebookTraining
    from ear_model.training.codebook import train_codebook

    if not score_entry(run.model.score).vocabulary:
        return run
    path = folder / CODEBOOK_FILE
    if not path.is_file():
        training = CodebookTraining(size=run.model.codebook_size, seed=run.train.seed)
        codebook, _ = train_codebook(load_digits()[0], run.model.patch_size, training, source="digits", quiet=True)
        codebook.save(path)
    return replace(run, codebook=str(path))


def _train(run: RunConfig, run_dir: Path, device: str) -> tuple[Any, str]:
    """The averaged model, and in words how the run diverged, "" if it did not."""
    from ear_model.training.trainer import NonFiniteLossError, Trainer

    resume = bool(checkpoint_steps(run_dir)) and (run_dir / CONFIG_FILE).is_file()
    if not resume and run_dir.exists():
        shutil.rmtree(run_dir)  # of a kill before the first checkpoint
    trainer = Trainer(run, run_dir, resume=resume, device=device)
    try:
        trainer.run(quiet=True)
    except NonFiniteLossError as error:
        return trainer.model, str(error)
    return trainer.averaged_model(), ""


def _score(model: Any, setting: SamplingConfig, num: int, seed: int) -> dict[str, Any]:
    """Scores of digits made with a setting, and what an image took."""
    from ear_model.data.digits import load_digits
    from ear_model.evaluation.digits import evaluate_samples
    from ear_model.sampling.images import sample_images

    train, held_out = load_digits()
    labels, options = torch.arange(num) % model.config.num_classes, asdict(setting)
    sample_images(model, labels[:64], seed=seed, **options)  # what is made once
    begun = time.perf_counter()
    images = sample_images(model, labels, seed=seed, **options)
    took = 1e3 * (time.perf_counter() - begun) / num
    return asdict(evaluate_samples(images, labels, train, held_out, setting)) | {"ms_per_image": took}


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 for an error, told in one line; 128 and the signal's number if one ended it."""
    folder, device, threads = Path(arguments[0]), arguments[1], int(arguments[2])
    end_with_parent(os.getppid(), int(signals.SIGNALS[0]))
    torch.set_num_threads(threads)
    try:
        with signals.caught():
            do(folder, device)
    except signals.Interrupted as stop:
        return 128 + stop.number
    except (RunError, ValueError, TypeError, OSError) as error:
        print(f"ear: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
