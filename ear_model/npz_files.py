"""Reading .npz files that others may have written or damaged: plain numbers, no more than asked for."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def read_npz(path: Path, names: tuple[str, ...]) -> Iterator[np.ndarray]:
    """Floating-point or integer arrays of an .npz file, one after another.

    Args:
        path: the file.
        names: of the arrays that are wanted.

    Raises:
        ValueError: not there, damaged, an array that is missing, no plain numbers, or larger than what the file holds
            of it: a few bytes can be packed that unpack to many gigabytes.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    try:
        with zipfile.ZipFile(path) as archive:
            held = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            for name in names:
                if name not in held:
                    raise ValueError(f"it holds {[key[:40] for key in sorted(held)[:5]]}, no {name!r}")
            for name in names:
                yield _read(archive, held[name])
    except PermissionError:
        raise
    except Exception as error:
        # numpy evaluates the header of an array, where text can make it raise anything.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or foreign ({type(error).__name__}: {reason})") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    # Deflate makes a thousandth of bytes that are all alike.
    if member.file_size > 1100 * max(1, member.compress_size):
        raise ValueError(f"{member.filename} unpacks {member.compress_size} bytes to {member.file_size}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, kind = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran, kind = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{member.filename} has version {version} of numpy's format")
        if kind.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, a pickle")
        count = math.prod(shape)
        if any(side < 0 for side in shape) or count * kind.itemsize > member.file_size:
            raise ValueError(f"{member.filename} has {member.file_size} bytes, too few for {kind} {shape}")
        values = np.frombuffer(file.read(count * kind.itemsize), kind, count)
        if file.read(1):  # to the end, where the checksum is looked at
            raise ValueError(f"{member.filename} has more bytes than {kind} {shape}")
    return values.reshape(shape, order="F" if is_fortran else "C")
