"""A step back in plain PyTorch: the oracle and the CPU path; shapes in ``functional``."""

import torch
from torch import Tensor


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
    output = output.to(state.dtype)
    predicted, place = output[:rows].chunk(2, -1)
    if guidance is not None:
        null = output[rows:, :size]
        predicted = null + guidance.to(state.dtype) * (predicted - null)
    at = time - offset
    growth, error, least, most, temperature = table[at.clamp(min=0)].to(state.dtype).unbind(-1)
    share = (place + 1) / 2
    spread = (0.5 * (share * most + (1 - share) * least)).exp() * temperature
    steps = noise.shape[1]
    drawn = noise[:, (steps - at).clamp(max=steps - 1)].squeeze(1).to(state.dtype)
    after = growth * state - error * predicted + torch.where(at > 0, spread * drawn, 0.0)
    state.copy_(torch.where(at < 0, state, after))
    states.copy_(state.repeat(len(states) // max(1, rows), 1))
