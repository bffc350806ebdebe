"""Reading files of ``torch.save`` that others may have written or damaged. Nothing in them is ever run."""

import argparse
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAX_DEPTH = 32
MAX_TENSOR_DIMS = 16


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote: dicts, lists, numbers, text, Namespaces and tensors, on the CPU and mapped from the
    file where its format allows.

    Raises:
        ValueError: not there, truncated, with a wrong checksum, a pickle that wants to run code, more than 32 levels,
            or a tensor that is sparse, quantised or larger than what the file holds of it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        unsafe = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        if unsafe:
            raise ValueError(
                f"{path} is damaged or foreign and is refused: it asks to run code on loading ({unsafe[:150]})"
            ) from error
        raise ValueError(f"{path} is damaged or foreign: truncated or no torch file") from error
    except PermissionError:
        raise
    except Exception as error:
        # Whatever the reader trips over, none of it was executed.
        reason = " ".join(str(error).split())[:150]
        raise ValueError(
            f"{path} is damaged or foreign: truncated or no torch file ({type(error).__name__}: {reason})"
        ) from error
    _check_content(path, content)
    return content


def _check_archive(path: Path) -> None:
    """torch looks at no checksum, and unpacks what is compressed, whatever its size."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            with archive.open(member) as file:
                while file.read(1 << 20):
                    pass


def _check_content(path: Path, content: Any) -> None:
    level, seen = [content], {id(content)}
    for _ in range(MAX_DEPTH):
        following = []
        for value in level:
            if isinstance(value, Tensor):
                reason = _unusable(value)
                if reason:
                    raise ValueError(f"{path} holds a tensor {reason}; it is damaged or foreign")
            for inner in _inner(value):
                # What is referred to from many places is looked at once: there may be 2^30 ways to it.
                if id(inner) not in seen:
                    seen.add(id(inner))
                    following.append(inner)
        level = following
        if not level:
            return
    raise ValueError(f"{path} is nested in more than {MAX_DEPTH} levels; it is damaged or foreign")


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value


def _unusable(tensor: Tensor) -> str:
    """Why a tensor is not one that a program saved of its weights; empty if it may be."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"of class {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"of layout {tensor.layout} on {tensor.device}"
    if tensor.ndim > MAX_TENSOR_DIMS:
        return f"of {tensor.ndim} dimensions"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"of shape {tuple(tensor.shape)}, of which it has only a part"
    return ""
