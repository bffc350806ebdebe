"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush it to the disk, and rename it into place."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
