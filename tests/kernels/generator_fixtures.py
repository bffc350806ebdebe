"""Shared helpers of the generator's kernel tests: devices, dtypes and the error rule."""

import torch
from torch import Tensor

# Without a GPU the kernels run in the interpreter, which conftest.py switches on.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bf16 arithmetic is wrong, so bf16 is for the GPU.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_no_worse_than_eager(
    name: str, kernel: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, terms: int = 1, roundings: int = 4
) -> None:
    """Error rule of the project: the kernel's error is at most ``factor`` times the same-dtype eager error.

    Both the largest and the root-mean-square error against ``exact`` (float64) are held to it. A floor allows for
    eager results that happen to be exact: ``roundings`` of the largest value (half as many of the mean square; a
    chain of operations has more of them), and two of the dtype's smallest steps for numbers too small to be rounded
    relatively. ``terms`` says how many products of size about 1 an element sums, where their cancellation can leave
    the sum itself near 0.
    """
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(kernel).all(), f"{name}: not finite"
    if exact.numel() == 0:
        return
    ours = (kernel.double() - exact.double()).abs()
    theirs = (eager.double() - exact.double()).abs()
    unit = EPSILON[kernel.dtype]
    size = exact.double().abs()
    step = 2 * torch.finfo(kernel.dtype).smallest_normal * torch.finfo(kernel.dtype).eps
    for what, error, reference, floor in (
        (
            "max",
            ours.max(),
            theirs.max(),
            roundings * unit * torch.clamp(size.max(), min=terms**0.5 if terms > 1 else 0.0),
        ),
        (
            "rms",
            ours.square().mean().sqrt(),
            theirs.square().mean().sqrt(),
            roundings / 2 * unit * torch.clamp(size.square().mean().sqrt(), min=terms**0.5 if terms > 1 else 0.0),
        ),
    ):
        bound = factor * reference + floor + step
        assert error <= bound, f"{name}: {what} error {error:.3e}, eager {reference:.3e}, allowed {bound:.3e}"
