"""Codebooks: K vectors that stand for all tokens, nearest-code lookup, and their files.

Shapes: N tokens of D numbers, K codes.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_kernels.runtime.checks import check_floating
from ear_model.config import check_range, check_types
from ear_model.errors import shown
from ear_model.json_files import parse_json
from ear_model.tensor_files import read_tensors, write_tensors

# One entry of the metadata: safetensors writes several in a random order, and a file's checksum would change with it.
METADATA_KEY = "ear_model_codebook"
FORMAT_VERSION = 1
TENSOR = "codebook"

PAIRS_AT_A_TIME = {"cpu": 2**18, "cuda": 2**24}
"""Distances that a lookup holds at once, in float64: what a cache of a CPU holds, 128 MB on a GPU."""
_ROUNDING = 2.0**-51


def nearest_codes(tokens: Tensor, codes_KD: Tensor) -> Tensor:
    """Index of the code at the smallest Euclidean distance of every token; nothing waits for the device.

    Squared distances are ``|x|^2 + |c|^2 - 2 x c`` in float64, some at a time. Of codes whose distances
    differ by no more than their rounding, 2^-50 of ``|x|^2 + |c|^2``, equal codes among them, the lowest index wins.

    Args:
        tokens: ``[..., D]``, floating point.
        codes_KD: ``[K, D]``, floating point, on the same device.

    Returns:
        int64 ``[...]``; 0 for a token that is not finite.

    Raises:
        ValueError: other shapes. TypeError: no floating-point tensors.
    """
    check_floating("tokens", tokens)
    check_floating("codes", codes_KD)
    if codes_KD.ndim != 2 or 0 in codes_KD.shape:
        raise ValueError(f"codes have shape {tuple(codes_KD.shape)}; they must be [K, D], both at least 1")
    if tokens.ndim < 1 or tokens.shape[-1] != codes_KD.shape[1]:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; they must be [..., {codes_KD.shape[1]}]")
    wide_KD = codes_KD.double()
    norms_K = wide_KD.square().sum(dim=1)
    rows = max(1, PAIRS_AT_A_TIME.get(codes_KD.device.type, 2**22) // len(codes_KD))
    parts = tokens.reshape(-1, tokens.shape[-1]).split(rows)
    return torch.cat([_nearest(part.double(), wide_KD, norms_K) for part in parts]).reshape(tokens.shape[:-1])


def _nearest(tokens_ND: Tensor, codes_KD: Tensor, norms_K: Tensor) -> Tensor:
    # The upper bounds of the squared distances less |x|^2, which all codes of a token have alike.
    bounds_NK = torch.addmm(norms_K * (1 + _ROUNDING), tokens_ND, codes_KD.T, alpha=-2)
    least_N1 = bounds_NK.amin(dim=1, keepdim=True)
    # A lower bound that is not above the least upper one.
    least_N1 += 2 * _ROUNDING * tokens_ND.square().sum(dim=1, keepdim=True)
    is_nearest_NK = bounds_NK.sub_(2 * _ROUNDING * norms_K) <= least_N1
    return is_nearest_NK.view(torch.uint8).max(dim=1).indices  # the first of them


def squared_distances(tokens_ND: Tensor, codes_KD: Tensor, indices_N: Tensor) -> Tensor:
    """Squared distance of each token to the code of its index, float64 ``[N]``."""
    return (tokens_ND.double() - codes_KD.double()[indices_N]).square().sum(dim=1)


@dataclass(frozen=True)
class CodebookInfo:
    """What a codebook was made for and of."""

    channels: int
    """Channels of the images or latents."""
    patch_size: int
    """Side of the patch that makes one token; D is channels * patch_size^2."""
    image_size: int
    """Height and width of the images or latents that it was made of."""
    data: str = ""
    """Where they are from, in words."""
    seed: int = 0
    """Of the training."""
    distortion: float | None = None
    """Mean squared error per number of the tokens that it was tested on; None if it was not."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "at least 1", "channels", "patch_size", "image_size")
        check_range(self, "at least 0", "seed")
        if self.distortion is not None and not 0 <= self.distortion < math.inf:
            raise ValueError(f"distortion is {self.distortion}; it must be at least 0 and finite")

    @property
    def token_dim(self) -> int:
        """D."""
        return self.channels * self.patch_size**2


@dataclass(frozen=True)
class Codebook:
    """Vectors ``[K, D]`` in float32, finite, and what they were made for."""

    vectors: Tensor
    info: CodebookInfo

    def __post_init__(self) -> None:
        vectors = self.vectors
        if vectors.dtype != torch.float32:
            raise ValueError(f"{TENSOR} is {vectors.dtype}; it must be float32")
        if vectors.ndim != 2 or vectors.shape[0] < 2 or vectors.shape[1] != self.info.token_dim:
            raise ValueError(
                f"{TENSOR} has shape {tuple(vectors.shape)}; it must be [K, {self.info.token_dim}], K at least 2"
            )
        if not vectors.isfinite().all():
            raise ValueError(f"{TENSOR} holds NaN or infinite values")

    def save(self, path: Path) -> None:
        """Write it as safetensors, what it was made for in the metadata; atomically."""
        description = {"version": FORMAT_VERSION, **asdict(self.info)}
        write_tensors(path, {TENSOR: self.vectors}, {METADATA_KEY: json.dumps(description)})


def load_codebook(path: str | Path) -> Codebook:
    """The codebook that :meth:`Codebook.save` wrote.

    Raises:
        ValueError: not there, damaged, foreign, of another version, not float32 or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"codebook {path} is not there; `ear train-codebook` makes one")
    metadata, tensors = read_tensors(path)
    if METADATA_KEY not in metadata or set(tensors) != {TENSOR}:
        raise ValueError(f"{path} is no codebook of `ear train-codebook` (it holds {sorted(tensors)[:3]})")
    description = parse_json(metadata[METADATA_KEY], f"{path}: {METADATA_KEY} in its metadata")
    try:
        return Codebook(tensors[TENSOR].clone(), _info(description))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no codebook that we know ({error})") from error


def _info(description: Any) -> CodebookInfo:
    if not isinstance(description, dict):
        raise ValueError(f"its metadata are {shown(description)}")
    values = dict(description)
    version = values.pop("version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"version {shown(version)}; this program reads {FORMAT_VERSION}")
    if set(values) != {field.name for field in fields(CodebookInfo)}:
        raise ValueError(f"fields {shown(sorted(values))}")
    return CodebookInfo(**values)
