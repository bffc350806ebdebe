"""The short way through the energy loss: calls whose shapes, strides, dtypes and options were seen before.

A plan holds what depends on those alone, checks included, so that a call is a dictionary look-up, the allocations and
the launches. It covers the calls that training makes: dense CUDA tensors in eager mode, reduction "mean" or "sum", no
mask and no weights. Everything else takes the long way in ``functional`` and ``autograd``.
"""

import os
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import autograd, kernels, kernels_gaussian, launchers
from ear_kernels.ops.energy_loss import configs as launch
from ear_kernels.ops.energy_loss.reference import working_dtype
from ear_kernels.prepared import PreparedLaunch
from ear_kernels.runtime.backend import BACKEND_VARIABLE
from ear_kernels.targets import GaussianTarget

# Bounds what ever-changing shapes may pile up.
MAX_PLANS = 1024
PLANS: dict[Hashable, Any] = {}
_PLAIN_OPTIONS = frozenset({int, float, str})


def _signature(tensor: Tensor) -> tuple:
    return (
        tensor.shape, tensor.stride(), tensor.dtype, tensor.device.index, tensor.requires_grad,
        tensor.data_ptr() % 16,
    )  # fmt: skip


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda


def key_of(samples: Any, target: Any, options: tuple) -> Hashable | None:
    """The key of a call, or None if calls of its kind have no plan."""
    if torch.compiler.is_compiling() or os.environ.get(BACKEND_VARIABLE, "auto") not in ("auto", "triton"):
        return None
    if not _is_plain(samples) or samples.device.index != torch.cuda.current_device():
        return None
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if not all(type(option) in _PLAIN_OPTIONS for option in options):
        return None  # left to the checks; True would be found as 1
    grad = torch.is_grad_enabled()
    if type(target) is GaussianTarget:
        mean, log_std = target.mean, target.log_std
        if not _is_plain(mean) or not _is_plain(log_std):
            return None
        return (_signature(samples), _signature(mean), _signature(log_std), target.num_targets, grad, options)
    if not _is_plain(target):
        return None
    return (_signature(samples), _signature(target), grad, options)


def remember(key: Hashable, plan: Any) -> None:
    """Keep a plan for later calls."""
    if len(PLANS) >= MAX_PLANS:
        PLANS.clear()
    PLANS[key] = plan


class _Plan:
    """What both kinds of plan share: the sum of the partial losses and the scaling of the gradients."""

    def __init__(self, device: torch.device, dtype: torch.dtype, programs: int) -> None:
        self.device, self.dtype, self.programs = device, dtype, programs
        self.index = device.index
        block = min(16384, launch.next_power_of_two(programs))
        self._sum = PreparedLaunch(
            kernels.sum_partials_kernel,
            (1,),
            (programs,),
            {"BLOCK": block},
            {"num_warps": max(1, min(16, block // 256))},
        )
        self._scales: dict[int, PreparedLaunch] = {}

    def new_loss(self) -> tuple[Tensor, Tensor]:
        """(loss, room for the partial losses), the same where there is one program only."""
        loss = torch.empty((), dtype=self.dtype, device=self.device)
        if self.programs == 1:
            return loss, loss
        return loss, torch.empty(self.programs, dtype=self.dtype, device=self.device)

    def finish(self, loss: Tensor, partial: Tensor) -> None:
        if partial is not loss:
            self._sum(self.index, partial, loss)

    def scaled(self, slot: int, gradient: Tensor, incoming: Tensor, dtype: torch.dtype) -> Tensor:
        """``gradient * incoming`` in ``dtype``; in place if the graph is not kept."""
        if (
            gradient.dtype != dtype
            or incoming.dtype != self.dtype
            or incoming.data_ptr() % 16
            or autograd.graph_is_kept()
            or torch.compiler.is_compiling()
        ):
            return autograd.scaled(gradient, incoming, dtype, 0, torch.compiler.is_compiling())
        scale = self._scales.get(slot)
        if scale is None:
            elements = gradient.numel()
            grid = (min(launch.ceil_div(elements, 4096), 2112),)
            constexprs = {"DOUBLE": dtype == torch.float64, "BLOCK": 1024}
            scale = PreparedLaunch(kernels.scale_gradient_kernel, grid, (elements,), constexprs, {"num_warps": 4})
            self._scales[slot] = scale
        scale(self.index, gradient, incoming)
        return gradient


def _like(tensor: Tensor, reduction: str) -> tuple[Any, Any, torch.dtype]:
    """Shape, strides and dtype of the gradient of ``tensor``."""
    gradient = launchers.gradient_like(tensor, True, reduction)
    return gradient.shape, gradient.stride(), gradient.dtype


class RowsPlan(_Plan):
    """A call with a target tensor whose rows fit into one program each."""

    def __init__(self, samples: Tensor, target: Tensor, dims: tuple[int, int], options: dict[str, Any]) -> None:
        grad = torch.is_grad_enabled()
        self.needs = (grad and samples.requires_grad, grad and target.requires_grad)
        reduction = options["reduction"]
        self.formats = tuple(_like(tensor, reduction) for tensor in (samples, target))
        self.dtypes = (samples.dtype, target.dtype)
        placeholders = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in self.formats
        ]
        views = [
            tensor.movedim(dim, -2) if tensor.ndim == samples.ndim else tensor.unsqueeze(-2)
            for tensor, dim in zip((samples, target, *placeholders), (*dims, *dims), strict=True)
        ]
        prepared = launchers.rows_launch(views, self.needs, options)
        if prepared is None:
            raise LookupError("no plan: this call needs a copy or more than one program a row")
        grid, scalars, constexprs, launching = prepared
        super().__init__(samples.device, working_dtype(samples, target), grid[0])
        self._rows = PreparedLaunch(kernels.energy_rows_kernel, grid, scalars, constexprs, launching)

    def run(self, samples: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        if self.needs[0] or self.needs[1]:
            return _PlannedLoss.apply(samples, target, self)
        return self.launch(samples, target)[0]

    def launch(self, samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and gradients (None where not wanted)."""
        gradients = [
            torch.empty_strided(shape, stride, dtype=dtype, device=self.device) if needed else None
            for (shape, stride, dtype), needed in zip(self.formats, self.needs, strict=True)
        ]
        loss, partial = self.new_loss()
        gx, gy = gradients
        # An absent gradient is passed as the tensor itself; the kernel does not touch it.
        self._rows(
            self.index, samples, target, None, None, None, None, partial, samples if gx is None else gx,
            target if gy is None else gy,
        )  # fmt: skip
        self.finish(loss, partial)
        return loss, gx, gy


class _PlannedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, samples, target, plan):
        loss, gx, gy = plan.launch(samples, target)
        ctx.save_for_backward(gx, gy)
        ctx.plan = plan
        return loss

    @staticmethod
    def backward(ctx, incoming):
        autograd.refuse_second_order()
        plan = ctx.plan
        gx, gy = ctx.saved_tensors
        gx = None if gx is None else plan.scaled(0, gx, incoming, plan.dtypes[0])
        gy = None if gy is None else plan.scaled(1, gy, incoming, plan.dtypes[1])
        return gx, gy, None


class GaussianPlan(_Plan):
    """A call whose targets are drawn in the kernel; mean and log_std have one shape."""

    def __init__(self, samples: Tensor, target: GaussianTarget, sample_dim: int, options: dict[str, Any]) -> None:
        mean, log_std = target.mean, target.log_std
        grad = torch.is_grad_enabled()
        self.needs = (
            grad and samples.requires_grad, grad and mean.requires_grad, grad and log_std.requires_grad,
        )  # fmt: skip
        self.dtypes = (samples.dtype, mean.dtype, log_std.dtype)
        self.format = _like(samples, options["reduction"])
        self.parameter_dtypes = tuple(
            launchers.gradient_dtype(tensor.dtype, options["reduction"]) for tensor in (mean, log_std)
        )
        placeholder = torch.empty_strided(self.format[0], self.format[1], dtype=self.format[2], device="meta")
        views = [tensor.movedim(sample_dim, -2) for tensor in (samples, placeholder)]
        prepared = None
        if mean.shape == log_std.shape:
            prepared = launchers.gaussian_launch(views, mean, log_std, target.num_targets, self.needs, options)
        if prepared is None:
            raise LookupError("no plan: this call needs a copy or more than one program a row")
        grid, scalars, constexprs, launching = prepared
        super().__init__(samples.device, working_dtype(samples, mean, log_std), grid[0])
        self._kernel = PreparedLaunch(kernels_gaussian.energy_gaussian_kernel, grid, scalars, constexprs, launching)

    def run(self, samples: Tensor, target: GaussianTarget) -> Tensor:
        """The loss."""
        if any(self.needs):
            return _PlannedGaussianLoss.apply(samples, target.mean, target.log_std, self)
        return self.launch(samples, target.mean, target.log_std)[0]

    def launch(self, samples: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """Loss and gradients (None where not wanted)."""
        shape, stride, dtype = self.format
        gx = torch.empty_strided(shape, stride, dtype=dtype, device=self.device) if self.needs[0] else None
        gmean = glog_std = None
        if self.needs[1] or self.needs[2]:
            gmean, glog_std = (
                torch.empty(mean.shape, dtype=dtype, device=self.device) for dtype in self.parameter_dtypes
            )
        loss, partial = self.new_loss()
        seed = autograd.draw_seed(self.device)
        self._kernel(
            self.index, samples, mean, log_std, seed, None, None, None, None, partial, samples if gx is None else gx,
            mean if gmean is None else gmean, log_std if glog_std is None else glog_std,
        )  # fmt: skip
        self.finish(loss, partial)
        return loss, gx, gmean, glog_std


class _PlannedGaussianLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, samples, mean, log_std, plan):
        loss, *gradients = plan.launch(samples, mean, log_std)
        ctx.save_for_backward(*gradients)
        ctx.plan = plan
        return loss

    @staticmethod
    def backward(ctx, incoming):
        autograd.refuse_second_order()
        plan = ctx.plan
        gradients = [
            plan.scaled(slot, gradient, incoming, plan.dtypes[slot]) if plan.needs[slot] else None
            for slot, gradient in enumerate(ctx.saved_tensors)
        ]
        return (*gradients, None)


def make(samples: Tensor, target: Any, dims: tuple[int, int], options: dict[str, Any]) -> Any:
    """The plan of a checked call, or None if it has to take the long way."""
    if options["reduction"] == "none" or samples.numel() == 0:
        return None
    try:
        if isinstance(target, GaussianTarget):
            return GaussianPlan(samples, target, dims[0], options)
        return RowsPlan(samples, target, dims, options)
    except LookupError:
        return None
