"""The launcher of the AdamW pass over many parameters. Imports Triton."""

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.adamw import kernels
from ear_kernels.runtime.launching import ceil_div

# The fastest of 8 on an H200: 1.85 ms for 200 M parameters, 7.6 GB.
CHUNK = 1024
WARPS = 8
LOW_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Tables:
    """What a launch over a list of parameters reads, on the device; made anew only when an address changes."""

    addresses: list[int] | None = None
    table: Tensor | None = None
    sizes: list[int] | None = None
    chunks: Tensor | None = None

    def update(self, addresses: list[int], sizes: list[int], device: torch.device) -> None:
        """Bring the tables to the device where they differ from those already there."""
        if addresses != self.addresses:
            self.addresses, self.table = addresses, _to_device(addresses, torch.int64, device)
        if sizes != self.sizes:
            numbers = [(entry, chunk) for entry, size in enumerate(sizes) for chunk in range(ceil_div(size, CHUNK))]
            flat = [value for pair in numbers for value in pair]
            self.sizes, self.chunks = sizes, _to_device(flat, torch.int32, device)


def _to_device(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # Pinned, so that the copy waits for nothing; torch keeps the memory until the copy is over.
    return tensor.pin_memory().to(device, non_blocking=True)


def adamw(
    tables: Tables,
    divisor: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    average_rest: float,
    low: torch.dtype,
) -> None:
    """One AdamW step of all parameters of ``tables``; ``divisor``: float32 ``[1]``, for the gradients."""
    assert tables.chunks is not None
    programs = tables.chunks.numel() // 2
    if programs == 0:
        return
    beta1, beta2 = betas
    kernels.adamw_kernel[(programs,)](
        tables.table,
        tables.chunks,
        divisor,
        lr,
        lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        _log2(beta1),
        _log2(beta2),
        eps,
        average_rest,
        LOW=LOW_TYPES[low],
        CHUNK=CHUNK,
        num_warps=WARPS,
    )


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e4
