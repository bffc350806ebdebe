"""Trees of images, a folder a class, read as the paper's data are (ADM's centre crop)."""

import copy
import functools
import math
import os
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ear_model.data.image_tree import ImageTree, find_images, named
from ear_model.progress import say

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485
"""Pixels that a file may be decoded to, a third of a GB: where Pillow begins to warn of decompression bombs."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
"""What is read, whatever a file's name: for others Pillow may start programs, such as Ghostscript."""
_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """An image that can't be decoded."""


def centre_crop(image: "Image.Image", size: int) -> "Image.Image":
    """ADM's centre crop to ``size`` x ``size``.

    Halved with a box filter while the short side is at least twice the target, then resized with a bicubic one until
    the short side is the target, then cut. Of a long image only the middle is resized, which takes memory by the crop
    and not by its length, and gives the same to a rounding.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) > 8 * size:
        across, down = _middle(image.width, width, left, size), _middle(image.height, height, top, size)
        image = image.crop((across[0], down[0], across[1], down[1]))
        box = (across[2], down[2], across[3], down[3])
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def _middle(length: int, resized: int, first: int, size: int) -> tuple[int, int, float, float]:
    """Which of ``length`` pixels become ``first .. first + size`` when ``length`` is ``resized``: begin and end of
    those to keep, and the exact bounds within them. The bicubic filter reaches less than 5 pixels beyond."""
    begin, end = first * length / resized, (first + size) * length / resized
    low, high = max(0, math.floor(begin) - 5), min(length, math.ceil(end) + 5)
    return low, high, begin - low, end - low


def open_image(path: str | Path) -> "Image.Image":
    """An image file, decoded, upright by its orientation tag, as RGB; transparency is dropped, and of an animation
    all frames but the first.

    JPEGs of too many pixels are decoded to half their sides.

    Raises:
        UnreadableImageError: no regular file, no image, cut off, of more than ``MAX_PIXELS``, or grey of more than 8
            bits, which RGB would silently clip.
    """
    from PIL import Image

    _silence_pillow()
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no regular file")
        if state.st_size == 0:
            raise ValueError("it is empty")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                image.draft(None, (image.width // 2, image.height // 2))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has mode {image.mode}, more than 8 bits a channel")
            image.load()
            orientation = _orientation(image)
            # Pillow warns of a palette's transparency, which is dropped anyway.
            image.info.pop("transparency", None)
            # A conversion to what it is would be a copy.
            colours: Image.Image = image if image.mode == "RGB" else image.convert("RGB")
        turn = _turns().get(orientation)
        return colours if turn is None else colours.transpose(turn)
    except Exception as error:  # damaged files make Pillow raise errors of a dozen kinds
        raise UnreadableImageError(f"{path} ({_reason(error)})") from error


@functools.cache
def _silence_pillow() -> None:
    """It warns, on lines of their own, of sizes, which are limited here, and of metadata that is not read."""
    warnings.filterwarnings("ignore", module=r"PIL\b")


def _orientation(image: "Image.Image") -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # metadata that nobody can read turn nothing
        return None


def _turns() -> "dict[int | None, Image.Transpose]":
    """What makes an image of that orientation tag upright."""
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as uint8 RGB ``[3, size, size]``, centre-cropped; see :func:`open_image`."""
    image = open_image(path)
    try:
        cut = centre_crop(image, size)
    except (ValueError, MemoryError) as error:
        raise UnreadableImageError(f"{path} ({_reason(error)})") from error
    return torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy())


def unreadable_images(tree: ImageTree, size: int, first: UnreadableImageError) -> UnreadableImageError:
    """The error that names all images of a tree that can't be read, where one can't; each is tried, on all cores."""

    def attempt(path: str) -> str | None:
        try:
            read_image(tree.root / path, size)
        except UnreadableImageError as error:
            return str(error)
        return None

    errors: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(tree), 4096):
            errors += filter(None, pool.map(attempt, tree.paths[begin : begin + 4096]))
    return unreadable_error(errors or [str(first)])


def unreadable_error(errors: list[str]) -> UnreadableImageError:
    """The error that names images which can't be read."""
    return UnreadableImageError(f"{len(errors)} images can't be read: {named(errors)}. Replace or remove them")


def to_float(images: Tensor) -> Tensor:
    """uint8 images, 0..255, as float32 in -1..1."""
    return images.float().div_(127.5).sub_(1)


class ImageFolderData:
    """A tree of images as training data, decoded when read; flipped left to right at random.

    Args:
        root: the tree.
        size: height and width of the images.
        flips: False leaves every image as it is.
        allow_empty: see :func:`ear_model.data.image_tree.find_images`.

    Raises:
        ValueError: as :func:`find_images`, or a size below 1. Reading raises
            UnreadableImageError, which names all images of the tree that can't be read (the first 20).
    """

    def __init__(self, root: str | Path, size: int, *, flips: bool = True, allow_empty: bool = False) -> None:
        if size < 1:
            raise ValueError(f"image size is {size}; it must be at least 1")
        self.size, self.flips = size, flips
        self.tree = find_images(root, allow_empty=allow_empty)
        self.image_shape, self.num_classes = (3, size, size), len(self.tree.classes)
        self._chosen = torch.arange(len(self.tree))
        self._failing, self._failed = threading.Lock(), list[UnreadableImageError]()

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
        try:
            images = [read_image(path, self.size) for path in paths]
        except UnreadableImageError as error:
            raise self._all_unreadable(error) from error
        return to_float(torch.stack(images))

    def _all_unreadable(self, first: UnreadableImageError) -> UnreadableImageError:
        """What to raise when an image can't be read: all such images of the tree, found by one of the threads."""
        with self._failing:
            if not self._failed:
                if len(self.tree) > 10_000:
                    say(f"{first} can't be read; reading all {len(self.tree):,} images to name every such image")
                self._failed.append(unreadable_images(self.tree, self.size, first))
            return self._failed[0]


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


def load_tree(root: str | Path | ImageTree, size: int, max_per_class: int = 0, seed: int = 0) -> "LabelledImages":
    """Read a tree into memory, ``3 * size * size`` bytes an image.

    Args:
        root: the tree.
        size: height and width that images are cropped to; one of that size is read as it is.
        max_per_class: at most so many images of a class, drawn by ``seed``; 0 is all.
        seed: of that draw.

    Raises:
        ValueError: as :func:`find_images`; images that can't be read, all of them (the first 20 by name).
    """
    tree = root if isinstance(root, ImageTree) else find_images(root)
    order = np.random.default_rng(seed).permutation(len(tree)) if max_per_class else np.arange(len(tree))
    chosen = first_of_each(tree.labels, order, max_per_class or len(tree))
    images = torch.empty(len(chosen), 3, size, size, dtype=torch.uint8)
    errors = []
    for position, index in enumerate(chosen):
        try:
            images[position] = read_image(tree.root / tree.paths[index], size)
        except UnreadableImageError as error:
            errors.append(str(error))
    if errors:
        raise unreadable_error(errors)
    return LabelledImages(images, torch.from_numpy(tree.labels[chosen]), tree.classes)


def first_image_size(tree: ImageTree) -> int:
    """The shorter side of a tree's first image. Raises UnreadableImageError, which names all that can't be read."""
    try:
        return min(open_image(tree.root / tree.paths[0]).size)
    except UnreadableImageError as error:
        raise unreadable_images(tree, 8, error) from error


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
