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
from torch.utils.weak import WeakTensorKeyDictionary

# Not an attribute of the parameter, with which it would be pickled.
_COPIES = WeakTensorKeyDictionary()


class _Copy:
    """A copy, and the state of the parameter that it is of."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        self.version, self.address = -1, 0

    def fits(self, parameter: Tensor) -> bool:
        """Whether an element of the copy lies where that of the parameter does."""
        same = self.tensor.shape == parameter.shape and self.tensor.stride() == parameter.stride()
        return same and self.tensor.device == parameter.device

    def is_of(self, parameter: Tensor) -> bool:
        current = self.version == parameter._version and self.address == parameter.data_ptr()
        return current and self.fits(parameter)

    def now_of(self, parameter: Tensor) -> None:
        self.version, self.address = parameter._version, parameter.data_ptr()


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Tell that an optimiser has changed its parameters: torch's fused ones leave the version counters alone."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copied = [parameter for parameter in parameters if parameter in _COPIES]
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
        self._kept = [
            (parameter, _Copy(parameter, dtype)) for parameter in parameters if parameter.dtype == torch.float32
        ]
        for parameter, copy in self._kept:
            _COPIES[parameter] = copy
        if not LowCopies._hook:
            LowCopies._hook.append(register_optimizer_step_post_hook(_after_any_step))
        self.refresh()

    @torch.no_grad()
    def refresh(self, *, everything: bool = False) -> None:
        """Bring the copies of changed parameters, or all, up to date in one pass, where they lie in memory."""
        changed = []
        for index, (parameter, copy) in enumerate(self._kept):
            if copy.is_of(parameter) and not everything:
                continue
            if not copy.fits(parameter):
                copy = _COPIES[parameter] = _Copy(parameter, copy.tensor.dtype)
                self._kept[index] = (parameter, copy)
            changed.append((parameter, copy))
        if not changed:
            return
        torch._foreach_copy_([copy.tensor for _, copy in changed], [parameter.detach() for parameter, _ in changed])
        for parameter, copy in changed:
            copy.now_of(parameter)

    def drop(self) -> None:
        """Give the copies up."""
        for parameter, _ in self._kept:
            _COPIES.pop(parameter, None)
        self._kept = []

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a model has none: these are of this model's parameters."""
        return None


def low(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter.to(dtype)``, or the copy that is kept of it."""
    if not torch.compiler.is_compiling():
        copy = _COPIES.get(parameter)
        if copy is not None and copy.tensor.dtype == dtype and copy.is_of(parameter):
            return copy.tensor
    return parameter.to(dtype)


def alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter of the same memory and copy, a leaf of its own to autograd."""
    other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    if parameter in _COPIES:
        _COPIES[other] = _COPIES[parameter]
    return other


def copy_dtypes(parameters: Iterable[nn.Parameter]) -> set[torch.dtype]:
    """Dtypes of the copies that are kept of these."""
    copies = (_COPIES.get(parameter) for parameter in parameters)
    return {copy.tensor.dtype for copy in copies if copy is not None}


@contextmanager
def updating(parameters: list[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """The copies of parameters that the caller changes and brings along, None where none is kept that fits.

    Afterwards autograd knows that parameters and copies have changed, and the copies are up to date, even those that
    were not before.
    """
    copies = []
    for parameter in parameters:
        copy = _COPIES.get(parameter)
        copies.append(copy if copy is not None and copy.fits(parameter) else None)
    yield [None if copy is None else copy.tensor for copy in copies]
    # Of the copies, too: a backward that still needs the old one then says so.
    torch.autograd.graph.increment_version([*parameters, *(copy.tensor for copy in copies if copy is not None)])
    for parameter, copy in zip(parameters, copies, strict=True):
        if copy is not None:
            copy.now_of(parameter)
