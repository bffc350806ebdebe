"""16-bit copies of float32 parameters that stand in for the casts of mixed-precision training.

Autocast, and our kernels after it, cast every weight once a step: a launch each, and 6 bytes an element of traffic.
:class:`LowCopies` keeps the casts instead; :class:`ear_kernels.FusedAdamW` writes them in the pass that updates the
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_COPY = "_ear_kernels_low_copy"


class _Copy:
    """A copy, and the state of the parameter that it is of."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        self.version, self.address = -1, 0

    def is_of(self, parameter: Tensor) -> bool:
        return self.version == parameter._version and self.address == parameter.data_ptr()

    def now_of(self, parameter: Tensor) -> None:
        self.version, self.address = parameter._version, parameter.data_ptr()


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Tell that an optimiser has changed its parameters: torch's fused ones leave the version counters alone."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copied = [parameter for parameter in parameters if hasattr(parameter, _COPY)]
    if copied:
        torch.autograd.graph.increment_version(copied)


class LowCopies:
    """Copies of float32 parameters, which the operations of this package read in the place of casting.

    An operation takes a copy only if its parameter has not changed since the copy was made (or was changed by
    :class:`ear_kernels.FusedAdamW`, which brings the copy along). A change is seen if autograd's version counter or
    an optimiser's ``step`` tells of it; after a write through ``parameter.data`` call ``refresh(everything=True)``.
    A CUDA graph reads the copy without asking: call :meth:`refresh` before each replay; it does nothing but look
    where nothing has changed.

    Args:
        parameters: those to keep copies of; those that are not float32 are passed over.
        dtype: ``torch.bfloat16`` or ``torch.float16``, the dtype that the operations compute in.

    Raises:
        ValueError: another dtype.
    """

    _hook: ClassVar[list] = []

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}; copies are torch.bfloat16 or torch.float16")
        self._parameters = [parameter for parameter in parameters if parameter.dtype == torch.float32]
        for parameter in self._parameters:
            setattr(parameter, _COPY, _Copy(parameter, dtype))
        if not LowCopies._hook:
            LowCopies._hook.append(register_optimizer_step_post_hook(_after_any_step))
        self.refresh()

    @torch.no_grad()
    def refresh(self, *, everything: bool = False) -> None:
        """Bring the copies of changed parameters, or all, up to date in one pass, where they lie in memory."""
        changed = [
            (parameter, copy)
            for parameter in self._parameters
            if (copy := getattr(parameter, _COPY, None)) is not None and (everything or not copy.is_of(parameter))
        ]
        if not changed:
            return
        torch._foreach_copy_([copy.tensor for _, copy in changed], [parameter.detach() for parameter, _ in changed])
        for parameter, copy in changed:
            copy.now_of(parameter)

    def drop(self) -> None:
        """Give the copies up."""
        for parameter in self._parameters:
            if hasattr(parameter, _COPY):
                delattr(parameter, _COPY)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a model has none: these are of this model's parameters."""
        return None


def low(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter.to(dtype)``, or the copy that is kept of it."""
    if not torch.compiler.is_compiling():
        copy = getattr(parameter, _COPY, None)
        if copy is not None and copy.tensor.dtype == dtype and copy.is_of(parameter):
            return copy.tensor
    return parameter.to(dtype)


def alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter of the same memory and copy, a leaf of its own to autograd."""
    other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    if hasattr(parameter, _COPY):
        setattr(other, _COPY, getattr(parameter, _COPY))
    return other


def copy_dtypes(parameters: Iterable[nn.Parameter]) -> set[torch.dtype]:
    """Dtypes of the copies that are kept of these."""
    copies = (getattr(parameter, _COPY, None) for parameter in parameters)
    return {copy.tensor.dtype for copy in copies if copy is not None}


@contextmanager
def updating(parameters: list[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """The copies of parameters that the caller changes and brings along, None where none is kept.

    Afterwards autograd knows that the parameters have changed, and the copies are theirs again. A copy that was out
    of date before is so no longer.
    """
    copies = [getattr(parameter, _COPY, None) for parameter in parameters]
    yield [None if copy is None else copy.tensor for copy in copies]
    torch.autograd.graph.increment_version(parameters)
    for parameter, copy in zip(parameters, copies, strict=True):
        if copy is not None:
            copy.now_of(parameter)
