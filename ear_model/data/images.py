"""Trees of images, a folder a class, read as the paper's data are (ADM's centre crop)."""

import copy
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
        raise ValueError(f"{root} is not a directory: it is no image tree, with a folder a class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no folders: it is no image tree, {root}/<class>/<file>")
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


def centre_crop(image: "Image.Image", size: int) -> "Image.Image":
    """ADM's centre crop to ``size`` x ``size``.

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


def open_image(path: str | Path) -> "Image.Image":
    """An image file, decoded, as RGB; transparency is dropped.

    Raises:
        UnreadableImageError: no image, cut off, or of more than 8 bits a channel, which RGB would silently clip.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has mode {image.mode}, more than 8 bits a channel")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path} ({error})") from error


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as uint8 RGB ``[3, size, size]``, centre-cropped; see :func:`open_image`."""
    return torch.from_numpy(np.asarray(centre_crop(open_image(path), size)).transpose(2, 0, 1).copy())


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
        self.image_shape, self.num_classes = (3, size, size), len(self.tree.classes)
        self._chosen = torch.arange(len(self.tree))

    def select(self, indices: Tensor) -> "ImageFolderData":
        """Some of the images, as data of their own."""
        selected = copy.copy(self)
        selected._chosen = self._chosen[indices]
        return selected

    def __len__(self) -> int:
        return len(self._chosen)

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`ear_model.data.batches.TrainingData`: float32 ``[b, 3, size, size]``, labels ``[b]``."""
        images = self.read(indices)
        labels = torch.from_numpy(self.tree.labels)[self._chosen[indices]]
        return (random_flips(images, generator) if self.flips else images), labels

    def read(self, indices: Tensor) -> Tensor:
        """The images as they are: float32 ``[b, 3, size, size]`` in -1..1."""
        paths = (self.tree.root / self.tree.paths[index] for index in self._chosen[indices].tolist())
        return to_float(torch.stack([read_image(path, self.size) for path in paths]))


def random_flips(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[b, channels, height, width]``, half of them mirrored left to right."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory."""

    images: Tensor
    """uint8 ``[N, 3, S, S]``."""
    labels: Tensor
    """int64 ``[N]``."""
    class_names: tuple[str, ...]
    """The name of each label."""

    def select(self, indices: Tensor) -> "LabelledImages":
        """The images of those indices."""
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)


def load_tree(root: str | Path, size: int, max_per_class: int = 0, seed: int = 0) -> "LabelledImages":
    """Read a tree into memory, ``3 * size * size`` bytes an image.

    Args:
        root: the tree.
        size: height and width that images are cropped to; one of that size is read as it is.
        max_per_class: at most so many images of a class, drawn by ``seed``; 0 is all.
        seed: of that draw.

    Raises:
        ValueError: as :func:`find_images` and :func:`read_image`.
    """
    tree = find_images(root)
    order = np.random.default_rng(seed).permutation(len(tree)) if max_per_class else np.arange(len(tree))
    chosen = first_of_each(tree.labels, order, max_per_class or len(tree))
    images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    for position, index in enumerate(chosen):
        images[position] = read_image(tree.root / tree.paths[index], size)
    return LabelledImages(images, torch.from_numpy(tree.labels[chosen]), tree.classes)


def first_image_size(root: str | Path) -> int:
    """The shorter side of a tree's first image. Raises ValueError as :func:`load_tree`."""
    tree = find_images(root)
    return min(open_image(tree.root / tree.paths[0]).size)


def first_of_each(labels: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` indices of every label in ``order``, ascending."""
    grouped = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[grouped], return_index=True, return_counts=True)
    ranks = np.arange(len(grouped)) - np.repeat(starts, counts)
    return np.sort(grouped[ranks < count])


def split_classes(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of ``count`` images of every class, drawn by ``seed``, and of all the others."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first = torch.from_numpy(first_of_each(labels.numpy(), order.numpy(), count))
    others = torch.ones(len(labels), dtype=torch.bool)
    others[first] = False
    return first, others.nonzero().flatten()
