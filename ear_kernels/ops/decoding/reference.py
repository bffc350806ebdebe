"""The small parts of a decoding step in plain PyTorch: the oracle and the CPU path; shapes in ``functional``."""

import torch
import torch.nn.functional as F
from torch import Tensor


def positions(orders: Tensor, left: Tensor, count: int) -> Tensor:
    """The tokens predicted next, ``[B, k]``: places ``left - k .. left - 1`` of the order."""
    places = left - count + torch.arange(count, device=left.device)
    return orders[:, places]


def predicted_rows(
    stream: Tensor, orders: Tensor, left: Tensor, count: int, prefix: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    sequences, length, width = stream.shape
    chosen = positions(orders, left, count).repeat(sequences // orders.shape[0], 1)
    starts = length * torch.arange(sequences, device=stream.device).unsqueeze(1) + prefix
    rows = (chosen + starts).flatten()
    x = stream.view(-1, width)[rows]
    return rows, x, F.layer_norm(x, (width,), weight, bias, eps)


def guided_norm(
    branch: Tensor, branch_bias: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    hidden = F.layer_norm(rows + branch + branch_bias, rows.shape[-1:], weight, bias, eps)
    if scale is None:
        return hidden
    own, null = hidden.chunk(2)
    return scale * own + (1 - scale) * null


def write_tokens(
    sampled: Tensor,
    tokens: Tensor,
    start: Tensor,
    rows: Tensor,
    prefix: int,
    embed: tuple[Tensor, Tensor],
    position: Tensor,
    norm: tuple[Tensor, Tensor, float],
) -> Tensor:
    batch, length, width = tokens.shape[0], start.shape[1], start.shape[2]
    count = sampled.shape[0]
    places = rows[:count] % length
    sequence = rows[:count] // length
    tokens[sequence, places - prefix] = sampled.to(tokens.dtype)
    weight, bias = embed
    embedded = F.linear(sampled.to(weight.dtype), weight, bias) + position[places]
    start.view(-1, width).index_copy_(0, rows, embedded.repeat(start.shape[0] // batch, 1))
    return F.layer_norm(embedded, (width,), *norm)


def write_rows(values: Tensor, target: Tensor, rows: Tensor, left: Tensor, count: int) -> None:
    flat = target.view(-1, target.shape[-1])
    flat.index_copy_(0, rows, values.repeat(len(rows) // max(1, len(values)), 1))
    left -= count
