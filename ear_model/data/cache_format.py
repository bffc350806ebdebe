"""The files of a latent cache.

    CACHE/manifest.json             what it holds; written last, so a cache with one is whole
    CACHE/shard-00000.safetensors   moments [n, flips, 2 c, h, w] or images uint8 [n, 3, H, W]; labels int64 [n]
    CACHE/build/                    the plan and the finished shards, from which `ear cache` goes on
    CACHE/verified.json             sizes and times of the shards whose checksums were found right

Moments are mean and log variance of the tokenizer's posterior, unscaled, of the image and (flips = 2) of its mirror
image, side by side so that one image is one read. Pixels are kept once: their mirror image costs nothing.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ear_model.config import RunConfig
from ear_model.config_checks import check_types
from ear_model.files import write_json
from ear_model.json_files import read_json
from ear_model.tokenizers.config import check_latent_scale

FORMAT = "ear_model_cache"
VERSION = 1
MANIFEST, BUILD, STAMP = "manifest.json", "build", "verified.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}

Verify = Literal["full", "size"]


@dataclass(frozen=True)
class Shard:
    """One file of a cache."""

    file: str
    count: int
    """Images in it."""
    size: int
    """Bytes."""
    sha256: str

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Manifest:
    """What a cache holds."""

    kind: Literal["moments", "pixels"]
    tokenizer: str
    """kl16, autoencoder or pixels."""
    weights: str
    """Name of the tokenizer's weight file; empty for pixels."""
    weights_sha256: str
    """Its checksum; empty for pixels."""
    latent_scale: float
    """Factor on the latents; 1 for pixels."""
    downsampling: int
    """Height of an image over height of what is cached; 1 for pixels."""
    image_size: int
    """Height and width of the images in pixels."""
    image_shape: tuple[int, int, int]
    """(channels, height, width) of what the model reads."""
    dtype: str
    """fp16, fp32 or uint8."""
    flips: bool
    """Whether training draws mirror images too."""
    classes: tuple[str, ...]
    """Class names; label i is the i-th."""
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    def row_shape(self) -> tuple[int, ...]:
        """Shape of one image in a shard: ``[flips, 2 c, h, w]`` or ``[3, H, W]``."""
        if self.kind == "pixels":
            return self.image_shape
        channels, height, width = self.image_shape
        return (1 + self.flips, 2 * channels, height, width)

    @property
    def key(self) -> str:
        """Name of the shards' tensor."""
        return "images" if self.kind == "pixels" else "moments"


def save_manifest(cache: Path, manifest: Manifest) -> None:
    """Write CACHE/manifest.json."""
    write_json(cache / MANIFEST, {"format": FORMAT, "version": VERSION, **asdict(manifest)})


def load_manifest(cache: Path) -> Manifest:
    """Read CACHE/manifest.json.

    Raises:
        ValueError: no cache there, one that is not finished, another version's, or a damaged manifest.
    """
    if not cache.is_dir():
        raise ValueError(f"{cache} is not a directory; give the --out of an `ear cache`")
    path = cache / MANIFEST
    if not path.is_file():
        if (cache / BUILD).is_dir():
            raise ValueError(f"{cache} is not finished (no {MANIFEST}); run its `ear cache` command again to go on")
        raise ValueError(f"{cache} is no cache (no {MANIFEST}); give the --out of an `ear cache`")
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is no manifest of a cache; give the --out of an `ear cache`")
    version = values.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}; this program reads {VERSION}: write it anew by `ear cache`"
        )
    try:
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        for name in ("image_shape", "classes"):
            # Not of a text, which would be one of letters.
            values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        manifest = Manifest(**values)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.300}); write the cache anew by `ear cache`") from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    def require(name: str, good: bool) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")

    check_types(manifest)
    require("dtype", manifest.dtype in (("uint8",) if manifest.kind == "pixels" else ("fp16", "fp32")))
    check_latent_scale(manifest.latent_scale)
    require("downsampling", manifest.downsampling > 0)
    require("classes", are_class_names(manifest.classes) and len(manifest.classes) > 0)
    require("image_shape", all(side > 0 for side in manifest.image_shape))
    require(
        "image_size", all(side * manifest.downsampling == manifest.image_size for side in manifest.image_shape[1:])
    )
    require("shards", len(manifest.shards) > 0)
    for shard in manifest.shards:
        if shard.count < 1 or not is_file_name(shard.file) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"shard {shard}")
    if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
        raise ValueError("shards has a file twice")


def is_file_name(name: str) -> bool:
    """Whether this is the name of something in a directory, and points nowhere else."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def are_class_names(names: Sequence[Any]) -> bool:
    """Whether these can be different directories."""
    return all(isinstance(name, str) and is_file_name(name) for name in names) and len(set(names)) == len(names)


def class_names(config: RunConfig) -> tuple[str, ...] | None:
    """The names of the run's classes, if its cache is still there: entry "classes" of ``manifest.json``."""
    if config.data != "cache" or not config.data_path:
        return None
    try:
        names = read_json(Path(config.data_path) / MANIFEST).get("classes")
    except (OSError, ValueError):
        return None
    # They become directories: nothing that points elsewhere.
    return tuple(names) if isinstance(names, list) and are_class_names(names) else None


def verify_shards(cache: Path, manifest: Manifest, verify: Verify = "full") -> None:
    """Make sure that the shards are those that were written.

    Args:
        cache: the directory.
        manifest: its manifest.
        verify: "size" looks at presence and size alone. "full" also reads every shard whose checksum was not seen to
            be right at its present size and ctime, and notes those that are in CACHE/verified.json (if the
            directory can be written). So only the first run of a machine pays for it, and a shard that is replaced or
            edited is read again. What it can't notice is a disk that changes bytes under an unchanged file; remove
            verified.json to have all read.

    Raises:
        ValueError: a shard is missing, has another size, or a wrong checksum.
    """
    if verify not in ("full", "size"):
        raise ValueError(f"verify is {verify!r}; it must be 'full' or 'size'")
    missing = [shard.file for shard in manifest.shards if not (cache / shard.file).is_file()]
    if missing:
        raise ValueError(
            f"{cache} lacks {_some(missing)} of its {len(manifest.shards)} shards; copy the cache again, or run its "
            "`ear cache` command again, which writes what is missing"
        )
    for shard in manifest.shards:
        size = (cache / shard.file).stat().st_size
        if size != shard.size:
            raise ValueError(f"{cache / shard.file} has {size} bytes; it must have {shard.size}: {_REMEDY}")
    if verify == "size":
        return
    states = {shard.file: _state(cache / shard.file, shard.sha256) for shard in manifest.shards}
    try:
        known = read_json(cache / STAMP)
    except (OSError, ValueError):
        known = {}
    unknown = [shard for shard in manifest.shards if known.get(shard.file) != states[shard.file]]
    # hashlib lets other threads run, so that a fast disk is used up.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(lambda shard: file_sha256(cache / shard.file), unknown))
    wrong = [shard.file for shard, found in zip(unknown, sums, strict=True) if found != shard.sha256]
    if wrong:
        raise ValueError(f"{cache}: wrong checksum of {_some(wrong)}: {_REMEDY}")
    if unknown:
        with contextlib.suppress(OSError):  # a read-only cache is verified every time
            write_json(cache / STAMP, states)


_REMEDY = "copy the shard again, or remove it and run its `ear cache` command again"


def _state(path: Path, sha256: str) -> list[Any]:
    stat = path.stat()
    # The time of change of the inode: a copy that keeps the times of its files has a new one, and is read anew.
    return [stat.st_size, stat.st_ctime_ns, sha256]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
