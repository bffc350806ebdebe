"""One number of the bits of many tensors: whether any of them has changed since it was last asked for.

Autograd's version counters do not see what fused optimisers or writes through ``parameter.data`` change. Imports
Triton.
"""

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ear_kernels.runtime.launching import launch

WORDS = 32768
"""Words that a program reads; 6,300 programs for the 205 million float32 parameters of EAR-B."""

TYPES = {4: tl.int32, 2: tl.int16, 1: tl.int8}

TILE = 2048


@triton.jit
def fingerprint_kernel(
    table,  # [programs, 3] int64: address of the first word, its number among all, how many words
    out,  # [1] int64, in and out
    WORD: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Adds the sum of ``(word + number) * multiplier of the word's number`` modulo 2^64."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    words = tl.load(row).to(tl.pointer_type(WORD))
    first = tl.load(row + 1)
    count = tl.load(row + 2)
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, WORDS, TILE):
        offsets = start + tl.arange(0, TILE)
        word = tl.load(words + offsets, mask=offsets < count, other=0).to(tl.int64)
        # Odd multipliers, so that every bit counts; different ones, so that two words' exchange is seen.
        total += word * ((first + offsets) * 0x1E3779B97F4A7C15 + 0x2545F4914F6CDD1D | 1)
    tl.atomic_add(out, tl.sum(total, 0), sem="relaxed")


def launch_fingerprint(table: Tensor, out: Tensor, size: int = 4) -> None:
    """Add the fingerprint of the table's words of ``size`` bytes to ``out``, int64 ``[1]``."""
    options = {"WORD": TYPES[size], "TILE": TILE, "WORDS": WORDS, "num_warps": 8}
    launch(fingerprint_kernel, (len(table),), table, out, on=out, **options)


class Fingerprint:
    """The fingerprint of these tensors as long as they lie where they do.

    Args:
        tensors: on one GPU. What lies between elements of one counts, too.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kept: Sequence[Tensor] = [tensor for tensor in tensors if tensor.numel()]
        rows: list[tuple[int, int, int]] = []
        number = 0
        spans = [(tensor, tensor.element_size() * _span(tensor)) for tensor in kept]
        # Words as large as fit into all of them.
        sizes = {span | tensor.data_ptr() for tensor, span in spans}
        self._size = next(size for size in TYPES if all(each % size == 0 for each in sizes))
        for tensor, span in spans:
            count = span // self._size
            for first in range(0, count, WORDS):
                rows.append((tensor.data_ptr() + self._size * first, number + first, min(WORDS, count - first)))
            number += count
        self._tensors = kept
        device = kept[0].device if kept else torch.device("cpu")
        self._table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
        self._out = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self) -> None:
        """Read the tensors as they are at this place of the stream."""
        self._out.zero_()
        if len(self._table):
            launch_fingerprint(self._table, self._out, self._size)

    def number(self) -> int:
        """What was read last; it waits for the device."""
        return int(self._out)

    def __call__(self) -> int:
        """The number of the tensors as they are; it waits for the device."""
        self.start()
        return self.number()


def _span(tensor: Tensor) -> int:
    """Elements from the first of a tensor in memory to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
