"""A data set without end, made offline: characters of matplotlib's fonts in random colours, poses and backgrounds.

Every image is a function of (seed, split, class, index) alone, so with the same Pillow and matplotlib a second
machine draws the same pixels. docs/glyphs.md shows a sheet and says which characters were left out and why.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ear_model.files import (
    DirectoryLock,
    begin_directory,
    is_whole_png,
    remove_temporaries,
    require_writable,
    save_picture,
)
from ear_model.processes import worker_pool
from ear_model.progress import Progress

# Characters that differ only in size, or not at all in some fonts, are there once: 0 and o are O; I and l are 1; c,
# k, p, s, u, v, w, x, y and z are their capitals. Digits, lower case, upper case: also the order of `CLASS_NAMES`.
CHARACTERS = "123456789abdefghijmnqrtABCDEFGHJKLMNOPQRSTUVWXYZ"


# Directory names: a and A differ where a file system ignores case. Sorted, so that class c of a tree is label c.
_KINDS = ("digit" if each.isdigit() else "lower" if each.islower() else "upper" for each in CHARACTERS)
CLASS_NAMES = tuple(f"{kind}_{character}" for kind, character in zip(_KINDS, CHARACTERS, strict=True))

# Not here: cmmi10 (its old-style 1 is a small capital I), cmsy10 and cmex10 (symbols), STIX's size and non-Unicode
# fonts and DejaVu's Display fonts (no letters), LastResort (a box for everything).
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)

MANIFEST = "glyphs.json"
Split = Literal["train", "test"]
_SPLITS = {"train": 0, "test": 1}
_EM = 160  # pixels an em in the stencils, more than any glyph has after its pose
_MIN_LUMA_DIFFERENCE = 80.0  # of 255, between the character and every part of its background
_LUMA = np.array([0.299, 0.587, 0.114])
_NOISE_CELLS = 4  # a side of the grid that the low-frequency background is interpolated from


def check_options(num_classes: int, size: int, split: str, seed: int) -> None:
    """Raise ValueError unless glyphs can be drawn so."""
    if not 1 <= num_classes <= len(CHARACTERS):
        raise ValueError(f"classes is {num_classes}; it must be in 1..{len(CHARACTERS)}")
    if not 8 <= size <= 512:
        raise ValueError(f"size is {size}; it must be in 8..512 pixels")
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")


def font_file(name: str) -> Path:
    """The file of one of ``FONTS``. Raises ValueError if this matplotlib does not ship it, or without a glyph."""
    import matplotlib
    from fontTools.ttLib import TTFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise ValueError(f"matplotlib {matplotlib.__version__} does not ship the font {name} ({path} is not there)")
    with TTFont(path, lazy=True) as font:
        mapped = font.getBestCmap() or {}
    missing = [character for character in CHARACTERS if ord(character) not in mapped]
    if missing:
        raise ValueError(f"{path} has no glyph for {''.join(missing)}")
    return path


@cache
def _font(name: str) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(font_file(name)), _EM)


@cache
def _stencil(character: str, font: str) -> Any:
    """The character alone, as a Pillow image of mode L cut to its ink, with a free edge of one pixel."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = _font(font).getbbox(character)
    stencil = Image.new("L", (math.ceil(right - left) + 8, math.ceil(bottom - top) + 8))
    ImageDraw.Draw(stencil).text((4 - left, 4 - top), character, fill=255, font=_font(font))
    ink = stencil.getbbox()
    if ink is None:
        raise ValueError(f"font {font} draws nothing for {character!r}")
    return stencil.crop((ink[0] - 1, ink[1] - 1, ink[2] + 1, ink[3] + 1))


def _coverage(random: np.random.Generator, character: str, size: int) -> np.ndarray:
    """How much of each pixel the character covers, float32 ``[size, size]`` in 0..1."""
    from PIL import Image

    stencil = _stencil(character, FONTS[random.integers(len(FONTS))])
    angle = random.uniform(-math.radians(15), math.radians(15))
    shear = random.uniform(-0.2, 0.2)
    stretch = math.exp(random.uniform(-0.18, 0.18))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = turn @ np.array([[stretch, shear], [0.0, 1 / stretch]])
    # The scale makes the posed ink's longer side a share of the image; the shift keeps all of it inside.
    half = np.array(stencil.size) / 2
    extent = np.abs(pose) @ half * 2
    share = random.uniform(0.5, 0.85)
    oversampling = max(2, -(-128 // size))
    side = size * oversampling
    scale = share * side / extent.max()
    room = np.maximum(0.0, 0.47 * side - extent * scale / 2)
    centre = side / 2 + random.uniform(-1, 1, 2) * np.minimum(room, 0.12 * side)
    # Pillow wants the map from the picture to the stencil, for pixel centres at + 0.5.
    inverse = np.linalg.inv(pose * scale)
    offset = half - inverse @ centre
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    drawn = stencil.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(oversampling), dtype=np.float32) / 255


def _colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Character and both ends of the background, float ``[3]`` in 0..255, far enough apart in luma."""
    while True:
        ink, first = random.uniform(0, 255, (2, 3))
        second = np.clip(first + random.uniform(-90, 90, 3), 0, 255)
        differences = _LUMA @ ink - np.array([_LUMA @ first, _LUMA @ second])
        # The same sign, or a mixture of the two ends would be as bright as the ink.
        if np.abs(differences).min() >= _MIN_LUMA_DIFFERENCE and differences[0] * differences[1] > 0:
            return ink, first, second


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """The mixture of the background's two colours, float32 ``[size, size]`` in 0..1: flat, gradient or noise."""
    from PIL import Image

    kind = random.integers(3)
    if kind == 0:
        return np.zeros((size, size), np.float32)
    if kind == 1:
        angle = random.uniform(0, 2 * math.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        reach = abs(math.cos(angle)) + abs(math.sin(angle))
        slope = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
        return np.clip(slope / reach + 0.5, 0, 1).astype(np.float32)
    cells = Image.fromarray(random.random((_NOISE_CELLS, _NOISE_CELLS), dtype=np.float32))
    return np.clip(np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


def render_glyph(label: int, index: int, *, seed: int = 0, size: int = 64, split: Split = "train") -> np.ndarray:
    """Image ``index`` of class ``label``: uint8 ``[size, size, 3]``.

    Args:
        label: 0 .. 47, a position of ``CHARACTERS``.
        index: which image of that class, >= 0; there is no end.
        seed: another seed, other images.
        size: height and width in pixels, 8..512.
        split: "train" or "test": never the same draws.

    Raises:
        ValueError: arguments out of range.
    """
    check_options(len(CHARACTERS), size, split, seed)
    if not 0 <= label < len(CHARACTERS) or index < 0:
        raise ValueError(f"label {label}, index {index}; labels are 0..{len(CHARACTERS) - 1}, indices >= 0")
    random = np.random.default_rng((seed, _SPLITS[split], label, index))
    coverage = _coverage(random, CHARACTERS[label], size)[..., None]
    ink, first, second = (colour.astype(np.float32) for colour in _colours(random))
    background = first + _background(random, size)[..., None] * (second - first)
    return np.rint(background + coverage * (ink - background)).astype(np.uint8)


def write_tree(
    out: Path,
    num_per_class: int,
    *,
    num_classes: int = len(CHARACTERS),
    size: int = 64,
    seed: int = 0,
    split: Split = "train",
    workers: int = 1,
) -> int:
    """Write an ImageFolder tree, ``OUT/<class>/<index>.png``; returns how many images were drawn now.

    Images that are whole already stay, so an interrupted or too small tree is completed by the same call.
    ``OUT/glyphs.json`` says what the tree holds.

    Args:
        out: the tree's directory.
        num_per_class: images of every class.
        num_classes: the first so many of ``CHARACTERS``.
        size: height and width in pixels.
        seed: another seed, other images.
        split: "train" or "test".
        workers: processes to draw with, at most.

    Raises:
        ValueError: options out of range; a directory with something else in it, that another process writes in, or
            that can't be written. RunError: a worker was killed.
    """
    check_options(num_classes, size, split, seed)
    if num_per_class < 1 or workers < 1:
        raise ValueError(f"num_per_class is {num_per_class} and workers {workers}; both must be at least 1")
    settings = {"characters": CHARACTERS[:num_classes], "size": size, "seed": seed, "split": split}
    needed = num_classes * num_per_class * size * size * 3 // 2  # a PNG of a glyph takes under half its pixels
    require_writable(out / MANIFEST, needed)
    chunk = 100
    tasks = [
        (out, label, range(start, min(start + chunk, num_per_class)), seed, size, split)
        for label in range(num_classes)
        for start in range(0, num_per_class, chunk)
    ]
    with DirectoryLock(out):
        begin_directory(out, MANIFEST, settings, "glyph tree")
        for name in CLASS_NAMES[:num_classes]:
            (out / name).mkdir(exist_ok=True)
            remove_temporaries(out / name)
        return sum(_map(_write_part, tasks, workers, min(chunk, num_per_class)))


def _write_part(out: Path, label: int, indices: Sequence[int], seed: int, size: int, split: Split) -> int:
    drawn = 0
    for index in indices:
        path = out / CLASS_NAMES[label] / f"{index:06d}.png"
        if is_whole_png(path, size):
            continue
        # What a power cut leaves is recognised by its end and drawn again.
        pixels = render_glyph(label, index, seed=seed, size=size, split=split)
        save_picture(path, pixels, compress_level=1)
        drawn += 1
    return drawn


def _map(function: Any, tasks: list[tuple], workers: int, images_per_task: int) -> Iterable[Any]:
    """``function(*task)`` of every task in order, on so many processes at most, with progress that counts images."""
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(Progress(len(tasks) * images_per_task, 0, "image", stays=False))
        results: Iterator[Any] = itertools.starmap(function, tasks)
        if min(workers, len(tasks)) > 1:
            pool = stack.enter_context(worker_pool(min(workers, len(tasks))))
            results = pool.map(function, *zip(*tasks, strict=True))
        for result in results:
            yield result
            shown.update(images_per_task)
