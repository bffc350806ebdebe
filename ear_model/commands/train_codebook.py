"""``ear train-codebook``: the codebook of a categorical model, from a cache or the digits."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.presets import DIGITS
from ear_model.tokenizers.config import CodebookTraining


@dataclass(frozen=True)
class TrainCodebook:
    """Train a codebook for `ear train ... --score categorical --codebook FILE` by k-means with moving averages.

    On a CPU the same seed gives the same file.
    """

    data: tyro.conf.Positional[str]
    """Cache directory of `ear cache`, or the word digits."""
    out: Path
    """The .safetensors file to write."""
    patch_size: int | None = None
    """Side of the patch that makes one token; 2 for the digits and 1 for a cache, as their presets have it."""
    training: Annotated[CodebookTraining, tyro.conf.arg(name="")] = field(default_factory=CodebookTraining)
    """How to train."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parse_command(TrainCodebook, arguments, "ear train-codebook")
    from ear_model.data.batches import TrainingData
    from ear_model.data.cache import load_cache
    from ear_model.data.digits import load_digits
    from ear_model.devices import resolve_device
    from ear_model.files import writing
    from ear_model.training.codebook import check_out, train_codebook

    started = time.perf_counter()
    device = resolve_device(command.device)
    check_out(command.out)
    is_digits = command.data == "digits"
    data: TrainingData = load_digits()[0] if is_digits else load_cache(Path(command.data))
    patch = command.patch_size
    if patch is None:
        patch = DIGITS.patch_size if is_digits else 1
    with writing(command.out):
        codebook, report = train_codebook(data, patch, command.training, source=command.data, device=device)
        codebook.save(command.out)
    seconds, dim = time.perf_counter() - started, codebook.info.token_dim
    print(
        f"{command.out}: {seconds:.0f} s, {report.steps} steps; {command.training.size:,} codes of {dim} numbers; "
        f"squared error a number {report.distortion:.6f}, of the mean token {report.distortion_of_mean:.6f}; "
        f"{report.tested:,} tokens use codes of perplexity {report.perplexity:.1f}, {report.dead:,} codes not at all"
    )
    return 0
