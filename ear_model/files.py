"""Writing files so that a reader never sees half of one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object], *, flushed: bool = True) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush it to the disk, and rename it into place."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(path: Path, pixels: Any, **options: Any) -> None:
    """Write a uint8 array ``[H, W, 3]`` as a PNG. It is not flushed, which for thousands would take longer than all
    the rest: a power cut may leave half of one."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", **options), flushed=False)


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path, needed_bytes: int = 0) -> None:
    """Make sure that a file can be written in ``path``'s directory, before the work that would fill it.

    Raises:
        ValueError: no permission, a path that is no directory, or less than ``needed_bytes`` free.
    """
    directory = path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".tmp-{os.getpid()}-probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"can't write in {directory}: {error.strerror or error}") from error
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ValueError(f"{directory} has {free / 1e6:.1f} MB free; this needs {needed_bytes / 1e6:.1f} MB")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a dict as JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a dict from JSON. Raises ValueError if it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (no object)")
    return values


def begin_directory(out: Path, manifest: str, settings: dict[str, Any], kind: str, needed_bytes: int = 0) -> None:
    """Make a directory of files that a later call with the same settings completes, or go on with it.

    Args:
        out: the directory.
        manifest: name of its file that holds ``settings``.
        settings: what all its files are made with; values that JSON gives back as they are.
        kind: what it is, for messages, such as "glyph tree".
        needed_bytes: see :func:`require_writable`.

    Raises:
        ValueError: a directory of other settings, or of something else, or that can't be written.
    """
    path = out / manifest
    if path.is_file():
        found = read_json(path)
        if found != settings:
            raise ValueError(f"{out} holds another {kind} ({found}); give a new directory, or those options")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no {kind} (it has no {manifest}); give a new directory")
    require_writable(path, needed_bytes)
    write_json(path, settings)
