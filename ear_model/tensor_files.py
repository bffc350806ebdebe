"""Safetensors files: tensors by name, and words about them in the metadata."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ear_model.files import write_atomically


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
        raise ValueError(f"{path} is not there")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error


def check_shapes(path: Path, expected: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, saying what does not fit, unless the tensors have these names and shapes."""
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensors[name].shape)}; it must be {tuple(shape)}")
