"""AdamW with clipping, moving average and 16-bit copies in one pass over the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_tensor, takes_tensors
from ear_kernels.runtime.copies import LowCopies


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, and :meth:`update`, which also divides the gradients and keeps a moving average.

    State, state dicts and hyperparameters are torch's, so either goes on where the other stopped.

    Args:
        params: parameters or groups of them, as for any optimiser.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of any ``torch.optim.AdamW``, which goes on in the fused form whatever its own was."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @takes_tensors
    @torch.no_grad()
    def update(
        self,
        divisor: Tensor | None = None,
        averages: Mapping[nn.Parameter, Tensor] | None = None,
        decay: float = 0.999,
        copies: LowCopies | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """One step with the gradients over ``divisor``, then ``average = decay average + (1 - decay) weight``.

        A gradient or divisor that is not finite skips the step, as ``GradScaler.step`` does: weights, moments, counts
        of steps and averages stay as they are.

        On a GPU this is one pass (docs/optimizer.md); elsewhere, and for parameters that are not dense float32, it is
        torch's step and a pass each for averages and copies. Whether the gradients are divided afterwards is not
        said, and hooks of ``step`` are for ``step``.

        Args:
            divisor: float32 scalar on the parameters' device, such as ``max(norm / limit, 1)`` to clip; None is 1.
            averages: the moving average of each parameter that has one, alike in shape and dtype.
            decay: of the averages, in [0, 1].
            copies: 16-bit copies to bring along; the next ``with copies:`` then need not cast.
            finite: bool scalar on the parameters' device, whether all gradients are finite, where that is known, as
                from their norm; None reads them once more.

        Raises:
            ValueError: a decay outside [0, 1], a divisor of several elements, an average of another shape, dtype or
                device than its parameter, a sparse gradient. TypeError: no tensors. Nothing has changed then.
        """
        averages = {} if averages is None else averages
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        updated = [parameter for parameter in parameters if parameter.grad is not None]
        _check_update(updated, divisor, averages, decay)
        finite = _all_finite(updated, divisor, finite)
        if updated and applies("adamw", updated[0], self._refusal(updated, averages)):
            self._make_state(updated)
            self._one_pass(divisor, finite.float(), averages, decay, copies)
            self._opt_called = True  # for learning-rate schedulers
            reached = {id(parameter) for parameter in updated}
            for parameter, average in averages.items():
                if id(parameter) not in reached:
                    average.lerp_(parameter.detach(), ((1 - decay) * finite).to(average.dtype))
            return
        if not finite:
            return
        self._plain_step(divisor)
        if copies is not None:
            copies.refresh(everything=True)
        if averages:
            weights: list[Tensor] = [parameter.detach() for parameter in averages]
            torch._foreach_lerp_(list(averages.values()), weights, 1 - decay)

    def _make_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """What torch's first step would make."""
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def _plain_step(self, divisor: Tensor | None) -> None:
        if divisor is None:
            self.step()
            return
        self.grad_scale = divisor
        try:
            self.step()
        finally:
            del self.grad_scale

    def _refusal(self, parameters: list[nn.Parameter], averages: Mapping[nn.Parameter, Tensor]) -> str | None:
        """Why the kernel does not take these, or None if it does."""
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[option]:
                    return f"the option {option}"
        for parameter in parameters:
            # Not self.state[parameter], which would make an entry.
            state = self.state.get(parameter) or {}
            tensors = [parameter, parameter.grad, *(state[name] for name in ("exp_avg", "exp_avg_sq") if state)]
            if parameter in averages:
                tensors.append(averages[parameter])
            for tensor in tensors:
                # Exactly: a DTensor is one, too, with its memory elsewhere.
                if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != torch.float32:
                    return f"a {type(tensor).__name__} of {tensor.dtype} (the kernel takes float32 tensors)"
                if tensor.device != parameters[0].device or (state and state["step"].device != parameter.device):
                    return "tensors on several devices"
                if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                    return "a tensor that is not contiguous or not aligned to 16 bytes"
        return None

    def _one_pass(
        self,
        divisor: Tensor | None,
        finite: Tensor,
        averages: Mapping[nn.Parameter, Tensor],
        decay: float,
        copies: LowCopies | None,
    ) -> None:
        from ear_kernels.ops.adamw import launch

        # Not made in __init__: a pickled optimiser comes back without.
        cached: dict[int, launch.Tables] = self.__dict__.setdefault("_tables", {})
        for number, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            held = [None] * len(parameters) if copies is None else copies.writable(parameters)
            entries = []
            for parameter, copy in zip(parameters, held, strict=True):
                state = self.state[parameter]
                assert parameter.grad is not None
                entries.append(launch.Entry(
                    weight=parameter, gradient=parameter.grad, first=state["exp_avg"], second=state["exp_avg_sq"],
                    step=state["step"], average=averages.get(parameter), copy=None if copy is None else copy.tensor,
                ))  # fmt: skip
            torch._foreach_add_([entry.step for entry in entries], [finite] * len(entries))
            launch.adamw(
                cached.setdefault(number, launch.Tables()), entries,
                None if divisor is None else divisor.float().reshape(1), finite.reshape(1), lr=float(group["lr"]),
                betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], average_rest=1 - decay,
                low=None if copies is None else copies.dtype,
            )  # fmt: skip
            # Of the copies, too: a backward that needs the old one then says so.
            written = [entry.copy for entry in entries if entry.copy is not None]
            torch.autograd.graph.increment_version([*parameters, *written])
            for parameter, copy in zip(parameters, held, strict=True):
                if copy is not None:
                    copy.vouch(parameter)


def _all_finite(updated: list[nn.Parameter], divisor: Tensor | None, known: Tensor | None) -> Tensor:
    """Bool scalar: whether gradients and divisor are finite, read on their device without waiting for it."""
    if known is None:
        gradients = [parameter.grad for parameter in updated if parameter.grad is not None and parameter.grad.numel()]
        # Of the largest absolute value: a norm of finite numbers may overflow.
        largest = torch._foreach_norm(gradients, torch.inf) if gradients else []
        known = torch.stack([each.float() for each in largest]).isfinite().all() if largest else torch.tensor(True)
    if divisor is not None:
        known = known & divisor.reshape(()).isfinite().to(known.device)
    return known


def _check_update(
    updated: list[nn.Parameter], divisor: Tensor | None, averages: Mapping[nn.Parameter, Tensor], decay: float
) -> None:
    if not isinstance(averages, Mapping):
        raise TypeError(f"averages is a {type(averages).__name__}; it must map parameters to tensors")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1]")
    if divisor is not None and divisor.numel() != 1:
        raise ValueError(f"divisor has shape {tuple(divisor.shape)}; it must be a scalar")
    for parameter in updated:
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise ValueError(f"a gradient has layout {parameter.grad.layout}; it must be dense")
    for parameter, average in averages.items():
        check_tensor("an average", average)
        for what in ("shape", "dtype", "device"):
            if getattr(average, what) != getattr(parameter, what):
                raise ValueError(
                    f"an average has {what} {getattr(average, what)}; its parameter has {getattr(parameter, what)}"
                )
