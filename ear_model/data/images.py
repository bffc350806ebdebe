"""Trees of images, a folder a class, read as the paper's data are (ADM's centre crop)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


class UnreadableImageError(ValueError):
    """An image that can't be decoded."""


@dataclass(frozen=True)
class ImageTree:
    """The images below a directory: class = first folder, in sorted order; image = any file below it."""

    root: Path
    classes: tuple[str, ...]
    """Folder names, sorted; label i is the i-th."""
    paths: tuple[str, ...]
    """Relative to ``root``, with "/", sorted within a class; classes one after the other."""
    labels: np.ndarray
    """int64 ``[N]``."""

    def __len__(self) -> int:
        return len(self.paths)

    def names_digest(self) -> str:
        """SHA-256 of classes and file names: what is in the tree, in which order."""
        return hashlib.sha256(os.fsencode("\0".join(("/".join(self.classes), *self.paths)))).hexdigest()

    def files_digest(self, first: int, last: int) -> str:
        """SHA-256 of names, sizes and times of change of the images ``first .. last - 1``, to notice an edit."""
        digest = hashlib.sha256()
        for path in self.paths[first:last]:
            state = (self.root / path).stat()
            digest.update(os.fsencode(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0"))
        return digest.hexdigest()


def find_images(root: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> ImageTree:
    """List a tree ``root/<class>/.../<file>``; hidden files and folders, and other suffixes, are left out.

    Args:
        root: the directory.
        suffixes: of the files to take, in lower case.

    Raises:
        ValueError: no directory, no class folders, or a class without images, which would shift nobody's label but
            leave a class that can't be learned.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; give a tree of images, a folder a class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no folders; images must be in {root}/<class>/<file>")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_files_below(root / name, suffixes))
        if not found:
            raise ValueError(f"{root / name} has no files of {', '.join(suffixes)}; fill or remove this class")
        paths.extend(os.path.relpath(path, root).replace(os.sep, "/") for path in found)
        labels.extend([label] * len(found))
    return ImageTree(root, tuple(classes), tuple(paths), np.array(labels, dtype=np.int64))


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    found = []
    for directory, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [
            os.path.join(directory, name)
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return found


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to ``size`` x ``size`` (spec 6).

    Halved with a box filter while the short side is at least twice the target, then resized with a bicubic one until
    the short side is the target, then cut.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as uint8 RGB ``[3, size, size]``, centre-cropped; transparency is dropped.

    Raises:
        UnreadableImageError: no image, cut off, or of more than 8 bits a channel, which RGB would silently clip.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has mode {image.mode}, more than 8 bits a channel")
            cropped = centre_crop(image.convert("RGB"), size)
        return torch.from_numpy(np.asarray(cropped).transpose(2, 0, 1).copy())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path} ({error})") from error


def to_float(images: Tensor) -> Tensor:
    """uint8 images, 0..255, as float32 in -1..1."""
    return images.float().div_(127.5).sub_(1)


class ImageFolderData:
    """A tree of images as training data, decoded when read; flipped left to right at random.

    Args:
        root: the tree.
        size: height and width of the images.
        flips: False leaves every image as it is.

    Raises:
        ValueError: as :func:`find_images`, or a size below 1. Reading raises UnreadableImageError.
    """

    def __init__(self, root: str | Path, size: int, *, flips: bool = True) -> None:
        if size < 1:
            raise ValueError(f"image size is {size}; it must be at least 1")
        self.tree, self.size, self.flips = find_images(root), size, flips
        self._labels = torch.from_numpy(self.tree.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    @property
    def num_classes(self) -> int:
        return len(self.tree.classes)

    def __len__(self) -> int:
        return len(self.tree)

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`ear_model.data.TrainingData`: float32 ``[b, 3, size, size]`` in -1..1 and labels ``[b]``."""
        images = self.read(indices)
        return (random_flips(images, generator) if self.flips else images), self._labels[indices]

    def read(self, indices: Tensor) -> Tensor:
        """The images as they are: float32 ``[b, 3, size, size]`` in -1..1."""
        chosen = [read_image(self.tree.root / self.tree.paths[index], self.size) for index in indices.tolist()]
        return to_float(torch.stack(chosen))


def random_flips(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[b, channels, height, width]``, half of them mirrored left to right."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)
