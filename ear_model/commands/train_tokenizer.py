"""``ear train-tokenizer``: a small autoencoder for one's own images."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.config_checks import check_range
from ear_model.tokenizers.config import SMALL, AutoencoderConfig, TokenizerTraining


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a small autoencoder on a tree of images, for `ear cache --tokenizer autoencoder`.

    Mean absolute error and a small KL term; no perceptual or adversarial loss. By default height and width shrink by
    8, to 8 channels. The same command goes on after an interruption.
    """

    images: tyro.conf.Positional[Path]
    """Directory with a folder of images a class."""
    out: Path
    """The .safetensors file to write."""
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")] = field(default_factory=TokenizerTraining)
    """How to train."""
    model: AutoencoderConfig = SMALL
    """Shape of the autoencoder."""
    allow_empty: bool = False
    """Take folders without images too."""
    workers: int = min(8, os.cpu_count() or 1)
    """Threads that decode images."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""

    def __post_init__(self) -> None:
        check_range(self, "from 1 to 1024", "workers")


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parse_command(TrainTokenizer, arguments, "ear train-tokenizer")
    from ear_model.devices import resolve_device
    from ear_model.training.autoencoder import train_autoencoder

    started = time.perf_counter()
    given: Any = {"device": resolve_device(command.device), "threads": command.workers}
    given["allow_empty"] = command.allow_empty
    report = train_autoencoder(command.images, command.out, command.model, command.training, **given)
    what = f"{report.held_out} held-out images" if report.held_out else "training images (too few to hold any out)"
    print(
        f"{command.out}: {time.perf_counter() - started:.0f} s; reconstruction of {what}: squared error "
        f"{report.squared_error:.5f} ({report.psnr:.1f} dB), of the mean image {report.squared_error_of_mean:.5f}; "
        f"latent scale {report.latent_scale:.4f}"
    )
    return 0
