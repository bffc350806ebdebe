"""Launching a Triton kernel again with nothing new but its pointers.

``kernel[grid](...)`` binds, specialises and hashes every argument at every call, which for sixty arguments
takes longer than the kernel. Where shapes, strides, dtypes, options and alignment are those of an earlier call, all
of that comes out the same, so the compiled kernel is kept and handed its pointers.
"""

from typing import Any

import torch
from torch import Tensor


class PreparedLaunch:
    """One kernel with everything bound but its leading pointer arguments.

    The first call goes through Triton and compiles; later ones go to the compiled kernel. The caller promises that
    device, dtypes and 16-byte alignment of the tensors are the same in every call: Triton compiles for them.

    Args:
        kernel: the ``@triton.jit`` function, its pointers first.
        grid: up to three numbers of programs.
        scalars: the arguments between the pointers and the constexprs.
        constexprs: value of every constexpr.
        options: launch options, such as ``num_warps``.
    """

    __slots__ = (
        "_constexprs",
        "_function",
        "_grid",
        "_kernel",
        "_options",
        "_packed",
        "_run",
        "_scalars",
        "_tail",
    )

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], scalars: tuple, constexprs: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._kernel, self._scalars, self._constexprs, self._options = (
            kernel,
            scalars,
            constexprs,
            options,
        )
        self._grid = (*grid, 1, 1)[:3]
        self._run: Any = None
        self._tail: tuple = ()

    def __call__(self, device: int, *pointers: Tensor | None) -> None:
        """Launch on the current stream of ``device``, which must be the current device."""
        if self._run is None:
            compiled = self._kernel[self._grid](*pointers, *self._scalars, **self._constexprs, **self._options)
            # Under the interpreter there is nothing to keep.
            if hasattr(compiled, "packed_metadata") and hasattr(compiled, "function"):
                first = len(pointers) + len(self._scalars)
                names = self._kernel.arg_names[first:]
                self._tail = (*self._scalars, *(self._constexprs[name] for name in names))
                self._function, self._packed = compiled.function, compiled.packed_metadata
                self._run = compiled.run
            return
        self._run(
            *self._grid,
            torch._C._cuda_getCurrentRawStream(device),
            self._function,
            self._packed,
            None,  # launch metadata and hooks: none without a Triton profiler
            None,
            None,
            *[None if pointer is None else pointer.data_ptr() for pointer in pointers],
            *self._tail,
        )
