"""Small models and runs for the tests of the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, TrainConfig
from ear_model.ear import EAR
from ear_model.presets import DIGITS, RUNS

TINY = replace(
    DIGITS,
    width=16,
    depth=2,
    num_heads=2,
    class_tokens=2,
    generator_width=16,
    generator_depth=1,
    noise_dim=8,
    num_samples=2,
)


def tiny_run(**train) -> RunConfig:
    """A digits run of a model that trains in seconds."""
    settings = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1, "lr": 1e-3}
    return replace(RUNS["digits"], model=TINY, train=TrainConfig(**{**settings, **train}), sampling=SamplingConfig(4))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh values for every parameter: at initialisation all samples are zero and hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY


@pytest.fixture
def tiny_model() -> EAR:
    return randomise(EAR(TINY))


def write_tree(root: Path, classes: dict[str, int], size: int = 16, seed: int = 0) -> None:
    """A tree of PNG images, a smooth random gradient each: ``root/<class>/<number>.png``."""
    generator = np.random.default_rng(seed)
    down, right = np.mgrid[:size, :size][..., None] / size
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            base, vertical, horizontal = generator.uniform((60, -50, -50), (190, 50, 50), (3, 3)).T
            pixels = base + vertical * (down - 0.5) + horizontal * (right - 0.5)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
