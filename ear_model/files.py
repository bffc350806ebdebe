"""Writing files so that a reader never sees half of one."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ear_model.errors import RunError, WriteError
from ear_model.json_files import read_json

MOST_NAMED = 8
"""Differences that a message names; another program's file differs in everything."""


def write_atomically(path: Path, write: Callable[[Path], object], *, flushed: bool = True) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush it to the disk, and rename it into place.

    Raises:
        WriteError: it can't be written, such as for want of room; what was at ``path`` is as it was.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
    except (RunError, WriteError):
        raise
    except Exception as error:
        # torch and safetensors have errors of their own for a full disk, with its number in the text at best.
        if not (isinstance(error, OSError) or _is_of_writing(error)):
            raise
        raise WriteError(f"can't write {path}: {_reason(error, path)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_of_writing(error: Exception) -> bool:
    text = str(error)
    return type(error).__name__ == "SafetensorError" or "inline_container" in text


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    if found:
        return os.strerror(int(found[1] or found[2]))
    free = shutil.disk_usage(path.parent).free
    return f"the disk takes no more ({free / 1e6:.1f} MB are free)"


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
    """Make sure that the file ``path`` can be written or replaced, before the work that would fill it.

    Raises:
        ValueError: no permission; a directory, a link or a device in its place; a path that is no directory where
            one is needed; less than ``needed_bytes`` free.
    """
    directory = path.parent
    probe = directory / f".tmp-{os.getpid()}-{path.name}"  # as long as that of the file to be renamed
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"can't write in {directory}: {getattr(error, 'strerror', None) or error}") from error
    # A file that is renamed over a link or a device would take its place, not go through it.
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise ValueError(f"{path} is {what}; give the name of a file to write")
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ValueError(f"{directory} has {free / 1e6:.1f} MB free; this needs {needed_bytes / 1e6:.1f} MB")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a dict as JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def in_use(directory: Path) -> bool:
    """Whether something is there other than an empty directory; temporary files of killed processes don't count."""
    if not directory.is_dir():
        return os.path.lexists(directory)
    return any(not entry.name.startswith(".tmp-") for entry in directory.iterdir())


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
    elif in_use(out):
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
            f"{name} is {shown(found, name)} there, {shown(settings, name)} here" for name in changed[:MOST_NAMED]
        )
        if len(changed) > MOST_NAMED:
            differences += f" and {len(changed) - MOST_NAMED} more"
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
            who = _holder(self._descriptor)
            self.release()
            raise ValueError(f"{who} is writing in {self._directory}; wait for it, or end it") from None
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """The lock of a file that this process will write; ``.lock-NAME`` stands beside it meanwhile.

    Raises:
        ValueError: another process has it, or the file can't be written (:func:`require_writable`).
    """
    require_writable(path)
    lock = path.with_name(f".lock-{path.name}")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(f"{who} is writing {path}; wait for it, or end it") from None
        except OSError:
            pass  # such as NFS, where nobody can be kept out
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.lstat()):
                break
        # Whoever had it has removed it since it was opened here.
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who has the lock, as far as the kernel says (Linux)."""
    inode = os.fstat(descriptor).st_ino
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE <process> <device>:<device>:<inode> 0 EOF
            if words[1] == "FLOCK" and words[5].endswith(f":{inode}") and int(words[4]) > 0:
                return f"process {words[4]}"
    return "another process"


def remove_temporaries(directory: Path, pattern: str = "*") -> None:
    """Remove what killed processes left of :func:`write_atomically` for names like ``pattern``.

    Of all names, in a directory of our own: also what safetensors leaves, whose temporary names say nothing.
    """
    left = [*directory.glob(f".tmp-*-{pattern}"), *(directory.glob(".tmp??????") if pattern == "*" else ())]
    for path in left:
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
