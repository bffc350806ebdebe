"""16-bit copies of float32 parameters that stand in for the casts of mixed-precision training.

Autocast, and our kernels after it, cast every weight once a step: a launch each, and 6 bytes an element of traffic.
Inside the scope of a :class:`LowCopies` they read copies instead; :class:`ear_kernels.FusedAdamW` writes these in the
pass that updates the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ear_kernels.runtime.checks import check_tensor


class Copy:
    """A copy, and the state of the parameter that it is of: ``version`` is -1 where nobody vouches for it."""

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

    def vouch(self, parameter: Tensor) -> None:
        """Say that the copy is of the parameter as it is."""
        self.version, self.address = parameter._version, parameter.data_ptr()


_scopes: ContextVar[tuple[LowCopies, ...]] = ContextVar("ear_kernels_low_copies", default=())


class LowCopies:
    """Copies of float32 parameters, which the operations of this package read inside ``with copies:``.

    >>> copies = LowCopies(model.parameters())
    >>> for batch in batches:
    ...     with copies, torch.autocast("cuda", torch.bfloat16):
    ...         loss = model(batch)
    ...     loss.backward()
    ...     optimizer.update(copies=copies)       # FusedAdamW

    Entering casts all parameters anew in one pass, save those whose copies :meth:`ear_kernels.FusedAdamW.update` has
    written since the scope was left and that have not changed afterwards. Inside, a copy is read only if autograd's
    version counter says that its parameter is unchanged. torch's fused optimisers and writes through
    ``parameter.data`` leave that counter alone: make them outside, or call ``refresh(everything=True)`` after them.
    A scope holds in its own thread; elsewhere parameters are cast. Scopes may be nested: the innermost that has a
    copy serves. Copies stay where they lie in memory, so that a CUDA graph can read them.

    Args:
        parameters: those to keep copies of; those that are not float32 are passed over.
        dtype: ``torch.bfloat16`` or ``torch.float16``, the dtype that the operations compute in.

    Raises:
        ValueError: another dtype. TypeError: no tensors.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype}; copies are torch.bfloat16 or torch.float16")
        self.dtype = dtype
        parameters = list(parameters)
        for parameter in parameters:
            check_tensor("a parameter", parameter)
        floats = [parameter for parameter in dict.fromkeys(parameters) if parameter.dtype == torch.float32]
        self._kept = [(parameter, Copy(parameter, dtype)) for parameter in floats]
        # Aliases are found here too, and not kept alive.
        self._copies = WeakTensorKeyDictionary(dict(self._kept))

    def __enter__(self) -> LowCopies:
        self._cast(everything=False)
        _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        scopes = _scopes.get()
        last = len(scopes) - 1 - scopes[::-1].index(self)
        _scopes.set(scopes[:last] + scopes[last + 1 :])
        self._forget_outside()

    def refresh(self, *, everything: bool = False) -> None:
        """Bring the copies of changed parameters, or all, up to date in one pass, where they lie in memory."""
        self._cast(everything)
        self._forget_outside()

    def vouch(self) -> None:
        """Say that no parameter has changed since the copies were made: the next scope casts none of them anew."""
        for parameter, copy in self._kept:
            copy.vouch(parameter)

    @torch.no_grad()
    def _cast(self, everything: bool) -> None:
        changed = [(parameter, copy) for parameter, copy in self._kept if everything or not copy.is_of(parameter)]
        if not changed:
            return
        for parameter, copy in changed:
            if not copy.fits(parameter):
                copy.tensor = Copy(parameter, self.dtype).tensor
        torch._foreach_copy_([copy.tensor for _, copy in changed], [parameter.detach() for parameter, _ in changed])
        for parameter, copy in changed:
            copy.vouch(parameter)

    def _forget_outside(self) -> None:
        """Vouch for no copy where no scope holds: what follows may change parameters past the version counters."""
        if self not in _scopes.get():
            for _, copy in self._kept:
                copy.version = -1

    def alias(self, parameter: nn.Parameter) -> nn.Parameter:
        """Another parameter of the same memory and copy, a leaf of its own to autograd."""
        other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        copy = self._copies.get(parameter)
        if copy is not None:
            self._copies[other] = copy
        return other

    def current(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy of a parameter in ``dtype``, if there is one and it is up to date."""
        copy = self._copies.get(parameter) if dtype == self.dtype else None
        return copy.tensor if copy is not None and copy.is_of(parameter) else None

    def writable(self, parameters: Iterable[nn.Parameter]) -> list[Copy | None]:
        """The copies, for a caller that changes the parameters and writes these along; None where none fits."""
        copies = [(parameter, self._copies.get(parameter)) for parameter in parameters]
        return [copy if copy is not None and copy.fits(parameter) else None for parameter, copy in copies]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of a model has none: these are of this model's parameters."""
        return _none, ()


def _none() -> None:
    return None


def _kept(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy of a parameter in the innermost scope that has one, or itself if it is of that dtype."""
    if parameter.dtype == dtype:
        return parameter
    for copies in reversed(_scopes.get()):
        copy = copies.current(parameter, dtype)
        if copy is not None:
            return copy
    return None


def held(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy of ``parameter`` in a scope that has one, else itself."""
    kept = None if torch.compiler.is_compiling() else _kept(parameter, dtype)
    return parameter if kept is None else kept


def low(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter.to(dtype)``, or the copy of it in a scope that has one."""
    kept = None if torch.compiler.is_compiling() else _kept(parameter, dtype)
    return parameter.to(dtype) if kept is None else kept


def low_all(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """:func:`low` of each, without gradients and None for None; those that have no copy are cast in one launch."""
    if torch.compiler.is_compiling():
        return [None if parameter is None else parameter.to(dtype) for parameter in parameters]
    found: list[Any] = [None if parameter is None else _kept(parameter, dtype) for parameter in parameters]
    missing = {
        number: parameter.detach()
        for number, parameter in enumerate(parameters)
        if parameter is not None and found[number] is None
    }
    for number, parameter in missing.items():
        found[number] = torch.empty_like(parameter, dtype=dtype)
    if missing:
        torch._foreach_copy_([found[number] for number in missing], list(missing.values()))
    return found
