"""A step back of a diffusion process over tokens: shapes, checks and errors."""

import torch
from torch import Tensor

from ear_kernels.ops.diffusion import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, kernel_refusal, takes_tensors

COLUMNS = 5
"""Of the table of a process."""


@takes_tensors
@torch.no_grad()
def denoise_step(
    output: Tensor,
    state: Tensor,
    states: Tensor,
    noise: Tensor,
    table: Tensor,
    time: Tensor,
    offset: int,
    guidance: Tensor | None = None,
) -> None:
    """A step of ancestral sampling with a learned variance: x_t becomes x_{t-1}, ``t = time - offset``.

    ``x_{t-1} = growth_t x_t - error_t e + temperature_t exp(v / 2) noise``, where e is the predicted noise and the
    log variance v lies between ``least_t`` and ``most_t`` at (r + 1) / 2, r the network's second output (Ho et al.
    2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672). Time 0 adds no noise, and below it nothing
    changes: t is a number on the device, so that a CUDA graph of some steps serves all of them.

    Args:
        output: ``[R, 2 D]``, contiguous: e and r of each row; with guidance ``[2 R, 2 D]``, those under the null
            class last, whose r is not read.
        state: ``[R, D]``, contiguous, float32, or float64 with ``noise`` and ``table`` of that: x_t, overwritten.
        states: ``[R, D]``, or ``[2 R, D]`` with guidance, contiguous, floating point: gets x_{t-1}, once for each
            half, in its dtype.
        noise: ``[R, S, D]``, dense in the last two dimensions: time t adds ``noise[:, S - t]``.
        table: ``[S, 5]``, contiguous: growth, error, least, most and temperature of each time.
        time: int64 ``[1]``. offset: subtracted from it.
        guidance: ``[1]``: g in ``e_null + g (e_class - e_null)``.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.
    """
    check_floating("output", output)
    check_floating("states", states)
    if state.ndim != 2 or noise.ndim != 3:
        raise ValueError(
            f"state has shape {tuple(state.shape)} and noise {tuple(noise.shape)}; they must be [R, D] and [R, S, D]"
        )
    rows, size = state.shape
    both = rows if guidance is None else 2 * rows
    for name, tensor, shape in (
        ("output", output, (both, 2 * size)),
        ("states", states, (both, size)),
        ("noise", noise, (rows, noise.shape[1], size)),
        ("table", table, (noise.shape[1], COLUMNS)),
        ("time", time, (1,)),
        ("guidance", guidance, (1,)),
    ):
        if tensor is None:
            continue
        check_device(name, tensor, state, "state")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be {list(shape)}, "
                f"{'without' if guidance is None else 'with'} guidance"
            )
    for name, tensor in (("output", output), ("state", state), ("states", states), ("table", table)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if noise.shape[1] < 1 or noise.stride()[1:] != (size, 1):
        raise ValueError(
            f"noise has strides {noise.stride()}; its last two dimensions must be dense, and S at least 1"
        )
    for name, tensor in (("noise", noise), ("table", table), ("guidance", guidance)):
        if tensor is not None and tensor.dtype != state.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} and state {state.dtype}; they must be alike")
    if state.dtype not in (torch.float32, torch.float64) or time.dtype != torch.int64:
        raise TypeError(f"state has dtype {state.dtype} and time {time.dtype}; they must be float32 and int64")
    if not rows:
        return
    if applies("denoise_step", state, kernel_refusal(state, output, states, noise, table)):
        from ear_kernels.ops.diffusion import launch

        launch.denoise_step(output, state, states, noise, table, time, offset, guidance)
        return
    reference.denoise_step(output, state, states, noise, table, time, offset, guidance)
