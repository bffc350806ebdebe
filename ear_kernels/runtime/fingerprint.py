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
"""Words of 32 bits that a program reads; 6,300 programs for the 205 million parameters of EAR-B."""

TILE = 2048


@triton.jit
def fingerprint_kernel(
    table,  # [programs, 3] int64: address of the first word, its number among all, how many words
    out,  # [1] int64, in and out
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Adds the sum of ``(word + number) * multiplier of the word's number`` modulo 2^64."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    words = tl.load(row).to(tl.pointer_type(tl.int32))
    first = tl.load(row + 1)
    count = tl.load(row + 2)
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, WORDS, TILE):
        offsets = start + tl.arange(0, TILE)
        word = tl.load(words + offsets, mask=offsets < count, other=0).to(tl.int64)
        # Odd multipliers, so that every bit counts; different ones, so that two words' exchange is seen.
        total += word * ((first + offsets) * 0x1E3779B97F4A7C15 + 0x2545F4914F6CDD1D | 1)
    tl.atomic_add(out, tl.sum(total, 0), sem="relaxed")


def launch_fingerprint(table: Tensor, out: Tensor) -> None:
    """Add the fingerprint of the table's words to ``out``, int64 ``[1]``."""
    launch(fingerprint_kernel, (len(table),), table, out, on=out, TILE=TILE, WORDS=WORDS, num_warps=8)


class Fingerprint:
    """The fingerprint of these tensors as long as they lie where they do.

    Args:
        tensors: on one GPU, each of a multiple of 4 bytes that lie side by side.

    Raises:
        ValueError: tensors that can't be read as words.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kept: Sequence[Tensor] = [tensor for tensor in tensors if tensor.numel()]
        rows: list[tuple[int, int, int]] = []
        number = 0
        for tensor in kept:
            size = tensor.numel() * tensor.element_size()
            if size % 4 or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype} can't be read as words")
            for first in range(0, size // 4, WORDS):
                rows.append((tensor.data_ptr() + 4 * first, number + first, min(WORDS, size // 4 - first)))
            number += size // 4
        self._tensors = kept
        device = kept[0].device if kept else torch.device("cpu")
        self._table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
        self._out = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self) -> None:
        """Read the tensors as they are at this place of the stream."""
        self._out.zero_()
        if len(self._table):
            launch_fingerprint(self._table, self._out)

    def number(self) -> int:
        """What was read last; it waits for the device."""
        return int(self._out)

    def __call__(self) -> int:
        """The number of the tensors as they are; it waits for the device."""
        self.start()
        return self.number()
