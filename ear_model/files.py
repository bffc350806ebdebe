"""Writing files so that a reader never sees half of one."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ear_model.json_files import read_json


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


def begin_directory(
    out: Path,
    manifest: str,
    settings: dict[str, Any],
    kind: str,
    needed_bytes: int = 0,
    notes: dict[str, Any] | None = None,
) -> None:
    """Make a directory of files that a later call with the same settings completes, or go on with it.

    Args:
        out: the directory.
        manifest: name of its file that holds ``settings``.
        settings: what all its files are made with; values that JSON gives back as they are.
        kind: what it is, for messages, such as "glyph tree".
        needed_bytes: see :func:`require_writable`.
        notes: what the manifest holds besides, and may differ from call to call.

    Raises:
        ValueError: a directory of other settings, or of something else, or that can't be written.
    """
    path, notes = out / manifest, notes or {}
    if path.is_file():
        require_same(out, read_json(path), settings, kind, ignored=notes)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no {kind} (it has no {manifest}); give a new directory")
    require_writable(path, needed_bytes)
    write_json(path, {**settings, **notes})


def require_same(
    where: Path, found: dict[str, Any], settings: dict[str, Any], kind: str, ignored: Collection[str] = ()
) -> None:
    """Raise ValueError, naming what differs, unless ``found`` of ``where`` are these settings."""

    def shown(values: dict[str, Any], name: str) -> str:
        text = json.dumps(values[name]) if name in values else "not said"
        return text if len(text) <= 40 else f"{text[:37]}..."

    names = [name for name in {**found, **settings} if name not in ignored]
    changed = [name for name in names if name not in found or name not in settings or found[name] != settings[name]]
    if changed:
        differences = ", ".join(
            f"{name} is {shown(found, name)} there, {shown(settings, name)} here" for name in changed
        )
        raise ValueError(f"{where} holds another {kind} ({differences}); give another name, or those options")


class DirectoryLock:
    """The lock of a directory that this process writes in. It ends with the process, however that ends.

    Args:
        directory: an existing one.
        shared: several processes that know of each other may have it at a time.

    Raises:
        ValueError: another process has it, or the file system knows no locks and it is to be shared.
    """

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        self._directory, self._descriptor = directory, os.open(directory, os.O_RDONLY)
        self._take(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)

    def _take(self, kind: int) -> None:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"another process is writing in {self._directory}; wait for it, or end it") from None
        except OSError as error:
            # Such as NFS, where nobody can be kept out; several processes could not wait for each other either.
            if kind == fcntl.LOCK_SH:
                self.release()
                raise ValueError(
                    f"{self._directory} is on a file system that locks no directories ({error.strerror}), which "
                    "several processes need; give another, or start one process"
                ) from error

    def share(self) -> None:
        """Let others have it too that ask for it as ``shared``."""
        self._take(fcntl.LOCK_SH)

    def wait_for_others(self) -> None:
        """Have it alone again, once the others have released it or died."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Give it up."""
        os.close(self._descriptor)

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def remove_temporaries(directory: Path, pattern: str = "*") -> None:
    """Remove what killed processes left of :func:`write_atomically` for names like ``pattern``."""
    for path in directory.glob(f".tmp-*-{pattern}"):
        path.unlink(missing_ok=True)


def is_whole_png(path: Path, size: int) -> bool:
    """Whether a PNG of ``size`` x ``size`` pixels is there to its last chunk: a power cut may leave half of one."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
            file.seek(-12, os.SEEK_END)
            tail = file.read()
    except OSError:
        return False
    side = size.to_bytes(4, "big")
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[16:24] == side + side and tail[4:8] == b"IEND"
