"""Sampling images of chosen classes from a trained model."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.draws import seeded_generator
from ear_model.files import begin_directory
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
    model: SamplingModel, labels: Tensor, *, seed: int = 0, batch_size: int = 256, **options: Any
) -> Tensor:
    """Images ``[N, channels, size, size]`` on the CPU, in batches; ``options`` go to :meth:`EAR.sample`."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = [model.sample(part.to(device), generator=generator, **options).cpu() for part in labels.split(batch_size)]
    return torch.cat(parts)


def sample_batches(
    model: SamplingModel,
    labels: Tensor,
    decoder: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    batch_size: int = 64,
    skip: Callable[[int, int], bool] = lambda first, last: False,
    progress: bool = False,
    **options: Any,
) -> Iterator[tuple[int, Tensor]]:
    """Many 8-bit images, batch after batch: the index of the first one and uint8 ``[b, 3, H, W]``.

    A batch depends on the seed, its place and ``batch_size`` alone, so one that is there already need not be drawn.

    Args:
        model: the model.
        labels: int64 ``[N]``, the classes of all images.
        decoder: see :class:`Decoder`.
        seed: the same seed gives the same images.
        batch_size: images at a time.
        skip: asked ``(first, last)`` whether images first .. last - 1 are not wanted.
        progress: show a bar.
        **options: of :meth:`EAR.sample`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    device = next(model.parameters()).device
    with Progress(len(labels), 0, "image", quiet=not progress, stays=False) as bar:
        for first in range(0, len(labels), batch_size):
            part = labels[first : first + batch_size]
            if not skip(first, first + len(part)):
                generator = seeded_generator(seed, first, device=device)
                output = model.sample(part.to(device), generator=generator, **options)
                yield first, to_bytes(decoder(output))
            bar.update(len(part))


def write_images(
    model: SamplingModel,
    labels: Tensor,
    decoder: Callable[[Tensor], Tensor],
    out: Path,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **options: Any,
) -> int:
    """Write an 8-bit PNG of every label, an image tree ``OUT/<class>/<index>.png``; returns how many are new.

    An interrupted call is completed by the same call; ``OUT/sampling.json`` holds what the images were drawn with.

    Args:
        model: the model.
        labels: int64 ``[N]``.
        decoder: see :class:`Decoder`.
        out: the tree's directory.
        names: a directory name for each class; numbers if None.
        seed: the same seed gives the same images.
        batch_size: images at a time; other sizes give other images.
        **options: of :meth:`EAR.sample`.

    Raises:
        ValueError: a directory that holds something else, or that can't be written.
    """
    from PIL import Image

    if names is None or len(names) < model.config.num_classes:
        names = [f"{index:04d}" for index in range(model.config.num_classes)]
    settings = {"num": len(labels), "seed": seed, "batch_size": batch_size, "classes": labels.unique().tolist()}
    settings.update(options)
    begin_directory(out, SAMPLING_FILE, settings, "tree of sampled images")
    paths = [out / names[label] / f"{index:06d}.png" for index, label in enumerate(labels.tolist())]
    for directory in {path.parent for path in paths}:
        directory.mkdir(exist_ok=True)
    written = 0
    batches = sample_batches(
        model,
        labels,
        decoder,
        seed=seed,
        batch_size=batch_size,
        skip=lambda first, last: all(path.is_file() for path in paths[first:last]),
        progress=True,
        **options,
    )
    for first, images in batches:
        for path, image in zip(paths[first:], images, strict=False):
            temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
            os.replace(temporary, path)
            written += 1
    return written
