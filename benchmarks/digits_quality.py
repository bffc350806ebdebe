"""What sharing noise vectors costs: scores of `ear train digits` by seed and R/K, and the variance of its gradients.

    python -m benchmarks.digits_quality --out FILE.json       # 18 runs, six at once: 4 minutes on an H200

R/K of 1, 4 and 16 rows a noise vector, seeds 0 to 4; the eager backend, seeds 0 to 2. Then the variance that the
noise alone gives the head's gradient: one batch, everything masked, 64 draws of noise, on the model of seed 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.clocks import DEVICE
from ear_model.config import RunConfig, SamplingConfig
from ear_model.data.digits import load_digits
from ear_model.ear import EAR
from ear_model.evaluation.digits import evaluate_digits
from ear_model.presets import RUNS
from ear_model.training.loss import TrainingLoss
from ear_model.training.trainer import Trainer

SHARES, AT_ONCE, DRAWS, ROWS = (1, 4, 16), 6, 64, 16_384
JOBS = [("auto", share, seed) for share in SHARES for seed in range(5)] + [("eager", 1, seed) for seed in range(3)]
SETTINGS = [(1.0, 1.0), (2.0, 0.7)]


def train(config: RunConfig, backend: str, share: int, seed: int, num: int = 1000) -> dict[str, Any]:
    """Train and score one run; for a process of its own."""
    os.environ["EAR_KERNELS_BACKEND"] = backend
    torch.set_num_threads(1)
    config = replace(config, train=replace(config.train, seed=seed, rows_per_noise=share))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run", device=DEVICE.type)
        for _ in range(config.train.steps):
            trainer.train_step()
        model = trainer.averaged_model()
    settings = [SamplingConfig(config.sampling.steps, guidance, "linear", heat) for guidance, heat in SETTINGS]
    scores = evaluate_digits(model, settings, num=num, seed=seed)
    result = {"backend": backend, "rows_per_noise": share, "seed": seed, "scores": [asdict(each) for each in scores]}
    return result | ({"gradient_variance": variance(model)} if (backend, share, seed) == JOBS[0] else {})


def variance(model: EAR) -> dict[int, float]:
    """Of the head's gradient over draws of noise, relative to independent noise."""
    data, device = load_digits()[0], next(model.parameters()).device
    count = ROWS // (model.score.num_samples * model.config.num_tokens)
    tokens = model.tokenizer.encode(data.images[:count].to(device))
    with torch.no_grad():
        masked = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
        classes = model.backbone.embed_classes(data.labels[:count].to(device))
        hidden = model.backbone(tokens, masked, classes).flatten(0, 1)
    parameters, found = list(model.train().score.generator.parameters()), {}
    for share in SHARES:
        loss_of, gradients = TrainingLoss(model.score, rows_per_noise=share), []
        for draw in range(DRAWS):
            torch.manual_seed(1000 + draw)
            gradient = torch.autograd.grad(loss_of(hidden, tokens.flatten(0, 1)), parameters)
            gradients.append(torch.cat([each.flatten() for each in gradient]).double())
        found[share] = float(torch.stack(gradients).var(dim=0).sum())
    return {share: value / found[SHARES[0]] for share, value in found.items()}


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """A line a backend, R/K and setting: by seed, then the mean distance."""
    lines = []
    for backend, share in dict.fromkeys((backend, share) for backend, share, _ in JOBS):
        chosen = [run for run in runs if (run["backend"], run["rows_per_noise"]) == (backend, share)]
        for number, (guidance, temperature) in enumerate(SETTINGS if chosen else ()):
            scores = [run["scores"][number] for run in sorted(chosen, key=lambda run: run["seed"])]
            right, far = ([score[name] for score in scores] for name in ("class_consistency", "energy_distance"))
            lines.append(
                f"{backend:5s} R/K={share:2d} guidance {guidance:g}, temperature {temperature:g}: consistency "
                f"{' '.join(f'{x:.3f}' for x in right)}  energy distance {' '.join(f'{x:.3f}' for x in far)}  "
                f"mean {statistics.fmean(far):.3f}"
            )
    return "\n".join([*lines, *(str(run["gradient_variance"]) for run in runs if "gradient_variance" in run)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    # More at once take turns on the GPU and gain nothing.
    with ProcessPoolExecutor(AT_ONCE, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in as_completed([pool.submit(train, RUNS["digits"], *job) for job in JOBS]):
            runs.append(job.result())
            harness.write_json(options.out, {"environment": harness.environment(), "runs": runs})
    print(summary(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
