"""Safetensors files: tensors by name, and words about them in the metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ear_model.files import write_atomically

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What torch's wrappers put into names, at any depth; "module." is one at the beginning alone.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device, atomically."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(stored, temporary, metadata))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, on the CPU; the tensors are views of a memory map.

    Raises:
        ValueError: not there, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except PermissionError:
        raise
    except Exception as error:
        # Besides its own errors the reader lets through those of torch, of dtypes that one of them does not know.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is truncated or no safetensors file ({reason})") from error


def without_wrappers(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tensors without what DistributedDataParallel, FSDP, torch.compile and checkpointing put into their names.

    Raises:
        ValueError: two that then have one name.
    """
    plain: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = key
        for word in WRAPPERS:
            name = name.replace(word, "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in plain:
            raise ValueError(f"{path}: {key} is there twice, with and without what a wrapper puts into the name")
        plain[name] = tensor
    return plain


def check_shapes(path: Path, expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, saying what does not fit, unless the tensors have these names and shapes."""
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {[name[:80] for name in unknown[:3]]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensors[name].shape)}; it must be {tuple(shape)}")


def check_numbers(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are floating-point tensors that a model can be loaded from."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES:
            kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name} is {kind}; it must be a floating-point tensor")


def usable_weights(
    path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Any], kind: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a file as the weights of a model.

    Args:
        path: the file, for messages.
        expected: the model's own, of which names and shapes count: they may be on the meta device.
        tensors: what the file holds.
        kind: dtype to cast to; those of it are not copied.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, not floating-point or not finite, named.
    """
    check_numbers(path, tensors)
    check_shapes(path, {name: tensor.shape for name, tensor in expected.items()}, tensors)
    weights = {}
    for name, tensor in tensors.items():
        weights[name] = tensor.to(kind)
        if not weights[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged")
    return weights
