"""`ear train digits` on a GPU, many runs side by side: quality by seed for backends and shared noise.

    python benchmarks/digits_quality.py OUT.json    # 18 runs of 2,600 steps, six at once: 4 minutes on an H200

Runs: the Triton kernels (backend "auto") with R/K = 1, 4, 16 rows a noise vector, seeds 0 to 4, and the eager
backend, seeds 0 to 2. Then the variance that the noise alone gives the head's gradient: one batch and one mask, 64
draws of noise, on the trained model of seed 0, as a ratio to independent noise.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SHARES = (1, 4, 16)
AT_ONCE = 6
DRAWS = 64
ROWS = 16_384


def one(backend: str, seed: int, share: int, out: str) -> None:
    """Train, score and write one run."""
    os.environ["EAR_KERNELS_BACKEND"] = backend
    import torch

    from ear_model.config import RUNS
    from ear_model.evaluate import evaluate_digits
    from ear_model.train import Trainer

    torch.set_num_threads(1)
    config = RUNS["digits"]
    config = replace(config, train=replace(config.train, seed=seed, rows_per_noise=share))
    trainer = Trainer(config, Path(tempfile.mkdtemp()) / "run", device="auto")
    for _ in range(config.train.steps):
        trainer.train_step()
    model = trainer.averaged_model()
    scores = evaluate_digits(model, [(1.0, 1.0), (2.0, 0.7)], steps=config.sampling.steps, seed=seed)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "device": where,
        "backend": backend,
        "seed": seed,
        "rows_per_noise": share,
        "scores": [asdict(each) for each in scores],
    }
    if backend == "auto" and seed == 0 and share == 1:
        result["gradient_variance"] = variance(model.train())
    Path(out).write_text(json.dumps(result))


def variance(model) -> dict[str, float]:
    """Variance of the head's gradient over draws of noise, relative to independent noise."""
    import torch

    from ear_model.data import load_digits

    data = load_digits()[0]
    count = ROWS // (model.score.num_samples * model.config.num_tokens)
    device = next(model.parameters()).device
    images, labels = data.images[:count].to(device), data.labels[:count].to(device)
    parameters = list(model.score.generator.parameters())
    found = {}
    for share in SHARES:
        model.score.rows_per_noise = share
        total = square = 0.0
        for draw in range(DRAWS):
            torch.manual_seed(0)
            tokens = model.tokenizer.encode(images)
            masked = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
            with torch.no_grad():
                hidden = model.backbone(tokens, masked, model.backbone.embed_classes(labels)).flatten(0, 1)
            torch.manual_seed(1000 + draw)
            gradient = torch.autograd.grad(model.score.loss(hidden, tokens.flatten(0, 1)), parameters)
            flat = torch.cat([each.flatten() for each in gradient]).double()
            total, square = total + flat, square + flat.square()
        found[str(share)] = float(((square - total.square() / DRAWS) / (DRAWS - 1)).sum())
    return {share: value / found["1"] for share, value in found.items()}


def main(out: Path) -> None:
    from benchmarks.timing import environment
    from ear_model.files import write_atomically

    folder = Path(tempfile.mkdtemp())
    jobs = [("auto", seed, share) for share in SHARES for seed in range(5)]
    jobs += [("eager", seed, 1) for seed in range(3)]
    runs: list[dict] = []
    failed: list[tuple[str, int, int]] = []

    def start(job: tuple[str, int, int]) -> None:
        backend, seed, share = job
        path = folder / f"{backend}_{seed}_{share}.json"
        command = [sys.executable, __file__, "one", backend, str(seed), str(share), str(path)]
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode:
            failed.append(job)
        else:
            runs.append(json.loads(path.read_text()))
        # After every run, so that an interruption loses the running ones only.
        text = json.dumps({"environment": environment(), "failed": failed, "runs": runs}, indent=1) + "\n"
        write_atomically(out, lambda temporary: temporary.write_text(text))

    # More at once take turns on the GPU and gain nothing.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(start, jobs))
    for backend, share in [("eager", 1)] + [("auto", share) for share in SHARES]:
        chosen = [run for run in runs if (run["backend"], run["rows_per_noise"]) == (backend, share)]
        for place, name in ((0, "guidance 1"), (1, "guidance 2, temperature 0.7")):
            right = [run["scores"][place]["class_consistency"] for run in chosen]
            distance = [run["scores"][place]["energy_distance"] for run in chosen]
            print(
                f"{backend:5s} R/K={share:2d} {name:28s} consistency {' '.join(f'{x:.3f}' for x in right)}  energy "
                f"distance {' '.join(f'{x:.3f}' for x in distance)}  mean {statistics.fmean(distance or [0]):.3f}"
            )
    print([run["gradient_variance"] for run in runs if "gradient_variance" in run], "failed:", failed)


if __name__ == "__main__":
    if sys.argv[1] == "one":
        one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main(Path(sys.argv[1]))
