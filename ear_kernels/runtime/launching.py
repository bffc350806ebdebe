"""The one way from host code to a kernel, and what launch functions need: devices, sizes, launches of row kernels.

Nothing here imports Triton or asks the hardware at import: a launch depends on sizes and the kind of GPU only,
so there is no tuning at the first call and none again for another number of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processor:
    """The kind of a GPU, as far as launches depend on it.

    Args:
        major: of the compute capability; 0 for a CPU (Triton's interpreter) and for AMD.
        count: multiprocessors.
        is_amd: whether it is an AMD GPU.
    """

    major: int
    count: int
    is_amd: bool = False


@dataclass(frozen=True)
class Recording:
    """A scope in which launches are handed to ``record(kernel, arguments, options)`` and not made."""

    record: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
    processor: Processor


_recording: ContextVar[Recording | None] = ContextVar("ear_kernels_recording", default=None)


@contextmanager
def recording(record: Callable[[Any, tuple[Any, ...], dict[str, Any]], None], processor: Processor) -> Iterator[None]:
    """Inside, every operation goes to Triton, on any device ("meta" too), as if on ``processor``, and nothing runs.

    Outputs stay unwritten. This is how the compile gate sees what is really launched.
    """
    token = _recording.set(Recording(record, processor))
    try:
        yield
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether launches are recorded and not made; a compiler, which cannot trace the question, never does."""
    return not torch.compiler.is_compiling() and _recording.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, on: Tensor, **options: Any) -> None:
    """Launch ``kernel`` on the device and current stream of the tensor ``on``.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: number of programs along up to three axes.
        *arguments: the kernel's arguments before its constexprs.
        on: one of the tensors; Triton itself launches on the current device, whatever the tensors' is.
        **options: constexprs and launch options such as ``num_warps``.
    """
    scope = _recording.get()
    if scope is not None:
        scope.record(kernel, arguments, options)
        return
    index = on.get_device()
    if index < 0 or index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:
        with torch.cuda.device(index):
            kernel[grid](*arguments, **options)


@lru_cache
def _processor_of_gpu(index: int) -> Processor:
    properties = torch.cuda.get_device_properties(index)
    is_amd = torch.version.hip is not None
    return Processor(0 if is_amd else properties.major, properties.multi_processor_count, is_amd)


def processor(tensor: Tensor) -> Processor:
    """The kind of GPU that a tensor is on; of a CPU's tensor four processors, for the interpreter."""
    scope = _recording.get()
    if scope is not None:
        return scope.processor
    return _processor_of_gpu(tensor.device.index) if tensor.is_cuda else Processor(0, 4)


def is_on_hopper(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU of compute capability 9."""
    return processor(tensor).major == 9


def dependent_launch(dependent: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it in the stream still runs.

    It waits for that kernel's end (``gdc_wait``, a constexpr ``DEPENDENT`` in the kernel) before it touches memory:
    only the launch itself overlaps. The kernel before says from when on (``gdc_launch_dependents``), or it is at its
    end. Needs compute capability 9; not in the interpreter, and not for a kernel that waits for an event too.
    """
    return {"launch_pdl": True} if dependent else {}


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value`` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor`` rounded up."""
    return -(-value // divisor)


@dataclass(frozen=True)
class RowConfig:
    """Launch of a kernel that walks over rows. ``programs`` is a constant, not the number of multiprocessors: the
    order of the column sums must not depend on the device."""

    warps: int
    stages: int
    programs: int


def row_warps(width: int) -> int:
    """Warps of a program that holds a row: 8 elements a thread (1,024 -> 4 warps, 1,280 and 1,536 -> 8)."""
    return min(16, max(1, next_power_of_two(width) // 256))


def row_grid(units: int, most: int) -> tuple[int, int]:
    """(programs, units a program) with ``most`` programs at most."""
    units_per_program = ceil_div(units, most)
    return ceil_div(units, units_per_program), units_per_program


def dense_rows(tensor: Tensor) -> Tensor:
    """``tensor [R, W]`` itself if its rows are dense in memory (any row stride, 0 included), else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def is_describable(*tensors: Tensor) -> bool:
    """Whether a TMA descriptor can hold these matrices: dense rows, 16-byte aligned."""
    return all(
        tensor.stride(-1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) > 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )
