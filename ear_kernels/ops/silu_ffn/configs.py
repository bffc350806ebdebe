"""The static table: which GEMMs run as one Triton kernel with an epilogue, and with which tile; all others
are cuBLAS.

No autotuning and no device query at import. A Triton GEMM pays where its rate is above about 81 % of
cuBLAS's; the measurements behind each entry are in docs/performance.md, section "Generator".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

EPILOGUES = ("silu", "gate", "dsilu")
"""GEMM + bias + SiLU; GEMM + bias, times gate, plus residual; GEMM times SiLU'(pre)."""


@dataclass(frozen=True)
class GemmConfig:
    """Tile and launch options of ``linear_kernel``. ``split`` = 2 runs the epilogue on half a tile at a
    time."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    group_m: int = 8
    flatten: bool = True
    per_sm: int = 1

    @property
    def name(self) -> str:
        """Short name for tables."""
        return (
            f"{self.bm}x{self.bn}x{self.bk}/s{self.stages}/w{self.warps}"
            + ("/split" if self.split == 2 else "")
            + ("/flat" if self.flatten else "")
            + (f"/x{self.per_sm}" if self.per_sm > 1 else "")
        )


# Tiles for training sizes that compile without spills, usable by `overriding`; cuBLAS is faster (HOPPER).
CANDIDATES: dict[str, GemmConfig] = {
    "silu": GemmConfig(128, 256, 64, 3, 8, split=2),
    "gate": GemmConfig(128, 128, 64, 4, 8),
    "dsilu": GemmConfig(128, 128, 64, 4, 8),
}

# (epilogue, rows from) -> config on Hopper, for bf16 and fp16; the last entry whose row count is reached applies.
# From 4,096 rows cuBLAS: on an H200 6 x 1024 takes 29.1 ms with it and 30.05 ms with Triton tiles for "silu"
# and "gate" (docs/performance_generator.md).
HOPPER: dict[str, tuple[tuple[int, GemmConfig | None], ...]] = {
    "silu": (
        (0, GemmConfig(64, 64, 64, 4, 4, flatten=False)),
        (512, GemmConfig(128, 64, 64, 4, 4, flatten=False)),
        (4096, None),
    ),
    "gate": (
        (0, GemmConfig(64, 64, 64, 4, 4, flatten=False)),
        (512, GemmConfig(128, 64, 64, 4, 4, flatten=False)),
        (4096, None),
    ),
    "dsilu": ((0, None),),
}

_overrides: dict[str, GemmConfig | None] = {}


@contextmanager
def overriding(**plans: GemmConfig | None) -> Iterator[None]:
    """Use these configs (None: cuBLAS) for the named epilogues inside the block, whatever the table says."""
    unknown = set(plans) - set(EPILOGUES)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no epilogues; use {', '.join(EPILOGUES)}")
    before = dict(_overrides)
    _overrides.update(plans)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter."""
    return _properties(tensor.device.index)[1] if tensor.device.type == "cuda" else 4


def describable(*tensors: Tensor) -> bool:
    """Whether a TMA descriptor can hold these matrices: dense rows, 16-byte aligned."""
    return all(
        tensor.stride(-1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) > 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def plan(epilogue: str, rows: int, *operands: Tensor) -> GemmConfig | None:
    """The Triton config for a GEMM with this epilogue, or None for cuBLAS and a pointwise kernel."""
    first = operands[0]
    if first.dtype == torch.float32 or rows == 0 or not describable(*operands):
        return None
    if epilogue in _overrides:
        return _overrides[epilogue]
    if first.device.type != "cuda" or _properties(first.device.index)[0] != 9:
        return None
    chosen = None
    for least, config in HOPPER[epilogue]:
        if rows >= least:
            chosen = config
    return chosen
