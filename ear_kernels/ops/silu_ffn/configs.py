"""The static table: which GEMMs run as one Triton kernel with an epilogue, and with which tile; all others
are cuBLAS.

No autotuning and no device query at import. A Triton GEMM pays where its rate is above about 81 % of
cuBLAS's; the measurements behind each entry are in docs/performance_generator.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ear_kernels.runtime.launching import is_describable, is_on_hopper

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


@dataclass(frozen=True)
class Entry:
    """From ``rows`` rows and ``width`` output columns on: the config, and that of a call that saves; None: cuBLAS."""

    rows: int
    width: int
    config: GemmConfig | None
    saving: GemmConfig | None = None


_64 = GemmConfig(64, 64, 64, 4, 4, flatten=False)
_64_DEEP = GemmConfig(64, 64, 64, 6, 4, flatten=False)
_128_64 = GemmConfig(128, 64, 64, 4, 4, flatten=False)
_128_128 = GemmConfig(128, 128, 64, 4, 8, flatten=False)

# Hopper, bf16 and fp16; the last entry whose rows and width are both reached applies. Below 4,096 rows, where nothing
# is saved, the fastest of benchmarks/sweep_rows.py on an H100 (benchmarks/results/sweep_rows_h100_2026-11-24.json).
# From there on cuBLAS where something is saved (on an H200 6 x 1024 takes 29.1 ms with it, 30.05 ms with Triton for
# "silu" and "gate") and for the gate; SiLU alone is faster in the GEMM at 8 x 1280 and 12 x 1536 (H200: 18.0 against
# 18.3 ms, 35.2 against 36.0), not at 6 x 1024 (9.3 against 9.2).
HOPPER: dict[str, tuple[Entry, ...]] = {
    "silu": (
        Entry(0, 0, _64_DEEP, _64),
        Entry(0, 1408, None, _64),
        Entry(512, 0, None, _128_64),
        Entry(768, 1408, _128_128, _128_128),
        Entry(1536, 0, None, _128_128),
        Entry(4096, 0, None, None),
        Entry(4096, 1152, CANDIDATES["silu"], None),
    ),
    "gate": (
        Entry(0, 0, None, _64),
        Entry(512, 0, None, _128_64),
        Entry(768, 1408, _128_128, _128_128),
        Entry(1536, 0, None, _128_128),
        Entry(4096, 0, None, None),
    ),
    "dsilu": (Entry(0, 0, None, None),),
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


def plan(epilogue: str, rows: int, width: int, *operands: Tensor, save: bool = False) -> GemmConfig | None:
    """The Triton config for a GEMM ``[rows, width]`` with this epilogue, or None for cuBLAS and a pointwise kernel.

    ``save``: it also stores what backward needs.
    """
    first = operands[0]
    if first.dtype == torch.float32 or rows == 0 or not is_describable(*operands):
        return None
    if epilogue in _overrides:
        return _overrides[epilogue]
    if not is_on_hopper(first):
        return None
    entry = [entry for entry in HOPPER[epilogue] if rows >= entry.rows and width >= entry.width][-1]
    return entry.saving if save else entry.config
