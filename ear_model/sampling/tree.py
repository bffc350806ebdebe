"""Many images as files: a tree of PNGs that can be interrupted, and an .npz file of it."""

import contextlib
import glob
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from ear_model.errors import RunError
from ear_model.files import (
    DirectoryLock,
    begin_directory,
    is_whole_png,
    remove_temporaries,
    require_same,
    require_writable,
    save_picture,
    write_atomically,
    write_json,
)
from ear_model.json_files import read_json
from ear_model.progress import Progress
from ear_model.sampling.images import Sampler

SAMPLING_FILE = "sampling.json"
KIND = "set of sampled images"
WAITING = 256
"""Images that may wait for a thread that writes them."""


class ImageTree:
    """8-bit PNGs ``OUT/<class>/<index>.png``, and ``OUT/sampling.json``, which says what they are.

    An image is there whole or not at all, so what was interrupted goes on with those that are missing.

    Args:
        out: the tree's directory.
        labels: int64 ``[N]``, the class of every image.
        names: a directory name for each class; numbers if None or if there are fewer than classes.
        num_classes: classes that the model knows.
        image_size: height and width of an image.
    """

    def __init__(
        self, out: Path, labels: Tensor, names: Sequence[str] | None, num_classes: int, image_size: int
    ) -> None:
        if names is None or len(names) < num_classes:
            names = [f"{index:04d}" for index in range(num_classes)]
        self.out, self.labels, self.image_size = out, labels, image_size
        self.paths = [out / names[label] / f"{index:06d}.png" for index, label in enumerate(labels.tolist())]

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of these images that are not there, or not whole."""
        return [index for index in indices if not is_whole_png(self.paths[index], self.image_size)]

    def begin(self, settings: dict[str, Any], notes: dict[str, Any] | None = None) -> DirectoryLock:
        """Make the tree's directories, or go on with those of the same settings without what killed processes left.

        Args:
            settings: all that the images depend on; values that JSON gives back as they are.
            notes: what ``sampling.json`` says besides.

        Returns:
            The lock of the directory, which others may share.

        Raises:
            ValueError: a directory that holds something else, that another process writes in, or that can't be
                written.
        """
        require_writable(self.out / SAMPLING_FILE)
        lock = DirectoryLock(self.out)
        with contextlib.ExitStack() as stack:
            stack.callback(lock.release)
            begin_directory(self.out, SAMPLING_FILE, settings, KIND, notes=notes)
            remove_temporaries(self.out)
            for directory in {path.parent for path in self.paths}:
                directory.mkdir(exist_ok=True)
                remove_temporaries(directory)
            # A PNG of a photograph takes about two thirds of its pixels.
            missing = len(self.missing(range(len(self.paths))))
            require_writable(self.out / SAMPLING_FILE, missing * self.image_size**2 * 2)
            lock.share()
            stack.pop_all()
        return lock

    def write(self, sampler: Sampler, *, rank: int = 0, processes: int = 1) -> int:
        """Draw and write this process's share of the images that are not there; returns how many are new.

        Shares need no agreement on what is there: image i is of process ``i % processes``.

        Args:
            sampler: draws them.
            rank: this process's number, from 0; only the first shows progress.
            processes: their number.

        Raises:
            OSError: what can't be written. RunError: what :meth:`Sampler.batches` raises.
        """
        share = range(rank, len(self.paths), processes)
        missing = self.missing(share)
        done = len(share) - len(missing)
        with _writers() as submit:
            for indices, images in sampler.batches(self.labels, missing, done=done, quiet=rank > 0):
                for index, image in zip(indices, images, strict=True):
                    submit(self._save, index, image)
        return len(missing)

    def _save(self, index: int, image: Tensor) -> None:
        save_picture(self.paths[index], image.permute(1, 2, 0).contiguous().numpy())

    def require_whole(self) -> None:
        """Raise RunError unless every image is there."""
        missing = len(self.missing(range(len(self.paths))))
        if missing:
            raise RunError(
                f"{missing} images are missing in {self.out}, a process ended early; the same call goes on"
            )


@contextlib.contextmanager
def _writers() -> Iterator[Callable[..., None]]:
    """What hands calls to a few threads. Pillow lets other threads run while it compresses. An error of one of them
    is raised by a later call, or at the end."""
    begun: deque[Future] = deque()
    pool = ThreadPoolExecutor(_threads())

    def submit(function: Callable[..., None], *arguments: Any) -> None:
        while begun and (begun[0].done() or len(begun) >= WAITING):
            begun.popleft().result()
        begun.append(pool.submit(function, *arguments))

    try:
        yield submit
        while begun:
            begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def settings_file(npz: Path) -> Path:
    """Where it is written what an .npz file holds."""
    return npz.with_name(f"{npz.name}.json")


def npz_is_there(npz: Path, settings: dict[str, Any], notes: Iterable[str] = ()) -> bool:
    """Whether an .npz file of these settings is there.

    Raises:
        ValueError: one of other settings, something else, or a place that can't be written.
    """
    require_writable(npz)
    if not npz.exists():
        remove_temporaries(npz.parent, glob.escape(npz.name))
        return False
    if not npz.is_file() or not settings_file(npz).is_file():
        raise ValueError(f"{npz} exists and is no {KIND} (there is no {settings_file(npz)}); give another name")
    require_same(npz, read_json(settings_file(npz)), settings, KIND, ignored=list(notes))
    return True


def write_npz(npz: Path, tree: ImageTree, settings: dict[str, Any]) -> None:
    """Write all images of a tree in one file, in the layout of the ADM evaluations.

    ``arr_0`` is uint8 ``[N, H, W, 3]`` and ``arr_1`` int64 ``[N]``, the labels, both in the order of the images'
    indices. A few images at a time are in memory.

    Args:
        npz: the file; ``<npz>.json`` beside it holds ``settings``.
        tree: whole.
        settings: what the images are.

    Raises:
        ValueError: not enough room. OSError: what can't be read or written.
    """
    size, count = tree.image_size, len(tree.paths)
    require_writable(npz, count * size**2 * 3)
    write_json(settings_file(npz), settings)

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            with _member(archive, "arr_0", np.uint8, (count, size, size, 3)) as file:
                for pixels in _pixels(tree):
                    file.write(pixels.tobytes())
            with _member(archive, "arr_1", np.int64, (count,)) as file:
                file.write(tree.labels.numpy().astype(np.int64).tobytes())

    write_atomically(npz, write)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: Any, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An array in an .npz file, written piece by piece in C order."""
    # Without a date the same images make the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        description = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _pixels(tree: ImageTree) -> Iterator[np.ndarray]:
    """The images ``[H, W, 3]`` in order, read by a few threads."""
    from PIL import Image

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        if pixels.dtype != np.uint8 or pixels.shape != (tree.image_size, tree.image_size, 3):
            raise RunError(f"{path} is no image of ours; remove it and run the same call again")
        return pixels

    with ThreadPoolExecutor(_threads()) as pool, Progress(len(tree.paths), 0, "image", stays=False) as shown:
        for first in range(0, len(tree.paths), WAITING):
            for pixels in pool.map(read, tree.paths[first : first + WAITING]):
                yield pixels
                shown.update()
