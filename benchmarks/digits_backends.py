"""The first 200 steps of `ear train digits` on a GPU, with the eager and with the Triton energy loss.

    python benchmarks/digits_backends.py OUT.json [STEPS]

Both runs have the same seeds, hence the same weights, batches, masks and noise; only rounding differs, and training
amplifies it. How much is measured too: a third run, eager, starts from weights multiplied by 1 + 1e-6. The Triton
curve may differ from the eager one by at most twice as much as that one does (largest difference of the 20-step
means), or by 0.5 % of the loss where that is more.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import environment
from ear_kernels.dispatch import BACKEND_VARIABLE
from ear_model.config import RUNS
from ear_model.train import Trainer

WINDOW = 20


def curve(backend: str, steps: int, perturbation: float = 0.0) -> list[float]:
    os.environ[BACKEND_VARIABLE] = backend
    config = RUNS["digits"]
    config = replace(config, train=replace(config.train, precision="fp32"))
    trainer = Trainer(config, Path(tempfile.mkdtemp()) / "run", device="cuda")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= 1 + perturbation
    losses = [trainer.train_step()[0] for _ in range(steps)]
    return torch.stack(losses).tolist()


def largest_difference(a: list[float], b: list[float]) -> float:
    """Of the means over 20 steps, relative."""
    means = [torch.tensor(losses).unflatten(0, (-1, WINDOW)).mean(dim=1) for losses in (a, b)]
    return ((means[0] - means[1]).abs() / means[0]).max().item()


def main(out: Path, steps: int = 200) -> None:
    eager, triton, perturbed = curve("eager", steps), curve("auto", steps), curve("eager", steps, 1e-6)
    difference, chaos = largest_difference(eager, triton), largest_difference(eager, perturbed)
    tolerance = max(2 * chaos, 0.005)
    result = {
        "environment": environment(),
        "steps": steps,
        "triton_against_eager": difference,
        "eager_perturbed_by_1e-6": chaos,
        "tolerance": tolerance,
        "eager": eager,
        "triton": triton,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if not isinstance(value, list)})
    print("last losses", eager[-1], triton[-1], perturbed[-1])
    if difference > tolerance:
        sys.exit(f"the Triton curve is {difference:.2%} off, more than {tolerance:.2%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
