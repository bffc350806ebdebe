"""Sampling images of chosen classes from a trained model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.draws import ImageDraws, check_seed
from ear_model.files import begin_directory, save_picture
from ear_model.plots import to_bytes
from ear_model.progress import Progress
from ear_model.sampling.decoding import SamplingModel

SAMPLING_FILE = "sampling.json"


def class_labels(classes: Sequence[int], num: int, num_classes: int) -> Tensor:
    """``num`` labels spread evenly over ``classes``, in their order.

    Raises:
        ValueError: no or unknown classes, or fewer than one image.
    """
    if num < 1:
        raise ValueError(f"num is {num}; it must be at least 1")
    if not classes:
        raise ValueError("no classes were given; name at least one")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range; this model knows 0..{num_classes - 1}")
    return torch.tensor([classes[index * len(classes) // num] for index in range(num)])


def sample_images(
    model: SamplingModel,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """What the model makes, ``[N, channels, size, size]`` on the CPU: an image of every label.

    Image i is a function of the model, its label, the options, the seed and i alone: the batch size, other images,
    the device and the number of processes change it by rounding only.

    Args:
        model: the model.
        labels: int64 ``[N]``.
        seed: not negative, of any size.
        batch_size: images at a time.
        indices: of the images; 0 .. N - 1 if None.
        **options: of :meth:`ear_model.ear.EAR.sample`: steps, guidance, guidance_schedule, temperature, precision.

    Raises:
        ValueError: a seed, batch size, label or option that makes no sense.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    check_seed(seed)
    device = next(model.parameters()).device
    numbers = range(len(labels)) if indices is None else indices
    if len(numbers) != len(labels):
        raise ValueError(f"{len(numbers)} indices were given for {len(labels)} labels")
    shape = (0, model.config.channels, model.config.image_size, model.config.image_size)
    parts = [torch.empty(shape)]
    for first in range(0, len(labels), batch_size):
        draws = ImageDraws(seed, numbers[first : first + batch_size])
        part = labels[first : first + batch_size].to(device)
        parts.append(model.sample(part, draws=draws, **options).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class Sampler:
    """Many 8-bit images of a model, batch after batch.

    Image i is that of :func:`sample_images`, so one that is there already need not be drawn.
    """

    model: SamplingModel
    decoder: Callable[[Tensor], Tensor]
    """What makes images of the model's output: :class:`ear_model.sampling.decoder.Decoder`."""
    setting: SamplingConfig
    seed: int = 0
    """The same seed gives the same images."""
    batch_size: int = 64
    """Images at a time."""

    def batches(
        self, labels: Tensor, *, skip: Callable[[int, int], bool] = lambda first, last: False, quiet: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """The index of the first image of each batch, and uint8 ``[b, 3, H, W]``.

        Args:
            labels: int64 ``[N]``, the classes of all images.
            skip: asked ``(first, last)`` whether images first .. last - 1 are not wanted.
            quiet: show no progress.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        options = {"seed": self.seed, "batch_size": self.batch_size, **asdict(self.setting)}
        with Progress(len(labels), 0, "image", quiet=quiet, stays=False) as shown:
            for first in range(0, len(labels), self.batch_size):
                part = labels[first : first + self.batch_size]
                if not skip(first, first + len(part)):
                    indices = range(first, first + len(part))
                    output = sample_images(self.model, part, indices=indices, **options)
                    yield first, to_bytes(self.decoder(output))
                shown.update(len(part))

    def write(self, labels: Tensor, out: Path, names: Sequence[str] | None = None) -> int:
        """Write an 8-bit PNG of every label, an image tree ``OUT/<class>/<index>.png``; returns how many are new.

        An interrupted call is completed by the same call; ``OUT/sampling.json`` says what the images are drawn with.

        Args:
            labels: int64 ``[N]``.
            out: the tree's directory.
            names: a directory name for each class; numbers if None.

        Raises:
            ValueError: a directory that holds something else, or that can't be written.
        """
        num_classes = self.model.config.num_classes
        if names is None or len(names) < num_classes:
            names = [f"{index:04d}" for index in range(num_classes)]
        settings = {"num": len(labels), "seed": self.seed, "batch_size": self.batch_size, **asdict(self.setting)}
        settings["classes"] = labels.unique().tolist()
        begin_directory(out, SAMPLING_FILE, settings, "tree of sampled images")
        paths = [out / names[label] / f"{index:06d}.png" for index, label in enumerate(labels.tolist())]
        for directory in {path.parent for path in paths}:
            directory.mkdir(exist_ok=True)
        written = 0
        for first, images in self.batches(labels, skip=lambda a, b: all(path.is_file() for path in paths[a:b])):
            for path, image in zip(paths[first:], images, strict=False):
                save_picture(path, image.permute(1, 2, 0).contiguous().numpy())
                written += 1
        return written
