"""``ear sample``: a picture of samples, or many images as files."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.config import SamplingConfig
from ear_model.run_dir import load_config


@dataclass(frozen=True)
class Sample:
    """Sample images of chosen classes from a trained model, into one picture or into files."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    classes: tuple[int, ...] = ()
    """Classes to sample; all of them if not given."""
    num: int = 64
    """Number of images, spread evenly over the classes."""
    guidance: float | None = None
    """Guidance scale; 1 is none. The run's own default if not given."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """linear or constant."""
    temperature: float | None = None
    """Below 1 trades diversity for accuracy. The run's own default if not given."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    seed: int = 0
    """The same seed gives the same images."""
    out: Path | None = None
    """Picture to write; RUN/grid.png if not given."""
    images_out: Path | None = None
    """Write a PNG of every image, DIR/<class>/<index>.png, instead of one picture; the same call goes on after an
    interruption."""
    batch_size: int = 64
    """Images sampled at a time with --images-out."""
    tokenizer: str = ""
    """Weights that decode latents, in place of the run's own."""
    raw_weights: bool = False
    """Use the last weights instead of their moving average."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for what can't be sampled."""
    command = parse_command(Sample, arguments, "ear sample")
    from ear_model import plots
    from ear_model.data.cache_format import class_names
    from ear_model.devices import resolve_device
    from ear_model.ear import EAR
    from ear_model.files import require_writable
    from ear_model.sampling.decoder import Decoder
    from ear_model.sampling.images import Sampler, class_labels, sample_images

    if command.out is not None and command.images_out is not None:
        raise ValueError("--out writes one picture and --images-out many files; give one of them")
    device = resolve_device(command.device)
    config = load_config(command.run)
    if command.tokenizer:
        config = dataclasses.replace(config, tokenizer=command.tokenizer)
    chosen = {field.name: getattr(command, field.name) for field in dataclasses.fields(SamplingConfig)}
    given = {name: value for name, value in chosen.items() if value is not None}
    setting = dataclasses.replace(config.sampling, **given)
    num_classes = config.model.num_classes
    labels = class_labels(command.classes or range(num_classes), command.num, num_classes)
    decoder = Decoder(config, device)
    out = command.out or command.run / "grid.png"
    if command.images_out is None:
        require_writable(out)
    model = EAR.from_pretrained(command.run, ema=not command.raw_weights, device=device)
    if command.images_out is not None:
        sampler = Sampler(model, decoder, setting, command.seed, command.batch_size)
        written = sampler.write(labels, command.images_out, class_names(config))
        print(f"{command.num} images, {written} of them new: {command.images_out}")
        return 0
    images = decoder(sample_images(model, labels, seed=command.seed, **dataclasses.asdict(setting)))
    plots.save_grid(images, out, columns=min(command.num, max(8, math.isqrt(command.num))))
    print(f"{command.num} images of classes {list(command.classes) or 'all'}: {out}")
    return 0
