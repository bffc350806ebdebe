"""The launch of the AdamW pass over many parameters. Imports Triton."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.adamw import kernels
from ear_kernels.runtime.launching import ceil_div, launch

CHUNK = kernels.CHUNK.value
LOW_TYPES = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Entry(NamedTuple):
    """The tensors of one parameter, in the order of the kernel's table."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    step: Tensor
    average: Tensor | None
    copy: Tensor | None


@dataclass
class Tables:
    """What a launch over a list of parameters reads, on the device; made anew only when an address changes."""

    addresses: list[int] | None = None
    table: Tensor | None = None
    sizes: list[int] | None = None
    chunks: Tensor | None = None

    def update(self, entries: list[Entry]) -> tuple[Tensor, Tensor]:
        """(table, chunks), brought to the device where they differ from those already there."""
        device = entries[0].weight.device
        addresses, sizes = [], [entry.weight.numel() for entry in entries]
        for entry, size in zip(entries, sizes, strict=True):
            addresses += [0 if tensor is None else tensor.data_ptr() for tensor in entry]
            addresses.append(size)
        if self.table is None or addresses != self.addresses:
            self.addresses, self.table = addresses, _to_device(addresses, torch.int64, device)
        if self.chunks is None or sizes != self.sizes:
            pairs = [(index, chunk) for index, size in enumerate(sizes) for chunk in range(ceil_div(size, CHUNK))]
            flat = [value for pair in pairs for value in pair]
            self.sizes, self.chunks = sizes, _to_device(flat, torch.int32, device)
        return self.table, self.chunks


def _to_device(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # Pinned, so that the copy waits for nothing; torch keeps the memory until the copy is over.
    return tensor.pin_memory().to(device, non_blocking=True)


def adamw(
    tables: Tables,
    entries: list[Entry],
    divisor: Tensor | None,
    finite: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    average_rest: float,
    low: torch.dtype | None,
) -> None:
    """One AdamW step of all ``entries``, none where ``finite`` is 0.

    Args:
        tables, entries: what to update.
        divisor: float32 ``[1]``, of the gradients.
        finite: float32 ``[1]``, 1 or 0.
        lr, betas, eps, weight_decay: of the group.
        average_rest: 1 - decay of the averages.
        low: the copies' dtype.
    """
    table, chunks = tables.update(entries)
    programs = chunks.numel() // 2
    if programs == 0:
        return
    beta1, beta2 = betas
    launch(
        kernels.adamw_kernel, (programs,), table, chunks, divisor, finite, lr, lr * weight_decay, 1 - beta1, beta2,
        1 - beta2, _log2(beta1), _log2(beta2), eps, average_rest, on=table, LOW=LOW_TYPES[low], num_warps=8,
    )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e4
