"""The launch of a step back. Imports Triton."""

from torch import Tensor

from ear_kernels.ops.diffusion import kernels
from ear_kernels.runtime.launching import ceil_div, launch

BLOCK = 128
"""Elements of a program: of the few there are, each should wait for its memory on a processor of its own."""


def denoise_step(
    output: Tensor,
    state: Tensor,
    states: Tensor,
    noise: Tensor,
    table: Tensor,
    time: Tensor,
    offset: int,
    guidance: Tensor | None,
) -> None:
    rows, size = state.shape
    launch(
        kernels.denoise_step_kernel, (ceil_div(rows * size, BLOCK),),
        output, state, states, noise, table, time, guidance, rows, noise.shape[1], offset, noise.stride(0), on=state,
        D=size, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
