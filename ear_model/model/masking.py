"""Generation orders, training mask ratios and the unmasking schedule (docs/model.md, "Masking" and "Sampling")."""

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ear_model.draws import TORCH_DRAWS, Draws

MASK_RATIO_STD = 0.25

ORDER_KEY = 0x454152
"""Key of the counter-based generator that the one random order of causal models comes from."""


def random_orders(batch: int, num_tokens: int, device: torch.device, draws: Draws = TORCH_DRAWS) -> Tensor:
    """A uniformly random permutation of the tokens per image, int64 ``[batch, num_tokens]``."""
    return draws.orders(batch, num_tokens, device)


def halton_orders(batch: int, num_tokens: int, device: torch.device, draws: Draws = TORCH_DRAWS) -> Tensor:
    """An order per image in which neighbours in time are apart in space, int64 ``[batch, num_tokens]``.

    The places of a square grid as a Halton sequence of bases 2 and 3 meets them (Besnier et al. 2025,
    arXiv:2503.17076), moved round the grid by a random distance for each image and, in half of the images, with
    rows and columns exchanged. Tokens are predicted from the end, as in a random order.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens are no square grid; a Halton order needs one")
    met: dict[int, None] = {}
    number = 1
    while len(met) < num_tokens:
        row, column = (int(radical_inverse(number, base) * side) for base in (2, 3))
        met[row * side + column] = None
        number += 1
    places = torch.tensor(list(met), device=device).flip(0)
    drawn = draws.rand(batch, 3, device=device)
    rows, columns = (
        ((part + (own * side).long().unsqueeze(1)) % side)
        for part, own in zip((places // side, places % side), drawn[:, :2].unbind(1), strict=True)
    )
    exchanged = (drawn[:, 2:] < 0.5).expand_as(rows)
    return torch.where(exchanged, columns * side + rows, rows * side + columns)


def radical_inverse(number: int, base: int) -> float:
    """The digits of a number in a base, mirrored at the point: in [0, 1)."""
    value, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        value += digit * place
    return value


def draw_orders(order: str, batch: int, num_tokens: int, device: torch.device, draws: Draws) -> Tensor:
    """Orders of a kind: "random" or "halton"."""
    return {"random": random_orders, "halton": halton_orders}[order](batch, num_tokens, device, draws)


def token_order(order: str, num_tokens: int) -> Tensor:
    """The order in which a causal model predicts an image's tokens, int64 ``[num_tokens]`` on the default device.

    Args:
        order: "causal" is row by row. "random" is one permutation, a function of ``num_tokens`` alone: the ranks of
            the first ``num_tokens`` words of Philox 4x64-10 with the key :data:`ORDER_KEY`, from counter 0. Raw
            words, not numpy's ``permutation``, are the same in every version of numpy. It is stored nowhere.
        num_tokens: L.
    """
    if order == "causal":
        places = np.arange(num_tokens)
    else:
        places = np.random.Philox(key=ORDER_KEY).random_raw(num_tokens).argsort(kind="stable")
    return torch.tensor(places, dtype=torch.int64)


def mask_ratio(uniform: float, minimum: float) -> float:
    """The quantile ``uniform`` in [0, 1) of a normal of mean 1, std 0.25 truncated to [minimum, 1]."""
    normal = NormalDist(1.0, MASK_RATIO_STD)
    low = normal.cdf(minimum)
    quantile = low + uniform * (0.5 - low)
    return min(1.0, max(minimum, normal.inv_cdf(quantile)))


def draw_num_masked(
    num_tokens: int, minimum: float, masking: str = "truncated_normal", draws: Draws = TORCH_DRAWS
) -> int:
    """Tokens to mask in this batch, ``ceil(L * ratio)``, drawn on the CPU.

    A count on the host, so the shapes of the step are known without waiting for the device.

    Args:
        num_tokens: L.
        minimum: smallest ratio of "truncated_normal".
        masking: "truncated_normal" is :func:`mask_ratio`. "cosine" is ``cos(pi/2 u)`` of a uniform u, the
            share that :func:`unmasking_schedule` has left at a random moment when there are far fewer steps than
            tokens: 2/pi on average, down to one token.
        draws: where the ratio comes from.
    """
    uniform = draws.fraction()
    if masking == "cosine":
        return max(1, math.ceil(num_tokens * math.cos(math.pi / 2 * uniform)))
    return math.ceil(num_tokens * mask_ratio(uniform, minimum))


def possible_num_masked(num_tokens: int, minimum: float, masking: str = "truncated_normal") -> range:
    """All that :func:`draw_num_masked` can return."""
    fewest = 1 if masking == "cosine" else max(1, math.ceil(num_tokens * minimum))
    return range(fewest, num_tokens + 1)


def unmasking_schedule(num_tokens: int, steps: int) -> list[tuple[int, int]]:
    """How many tokens are masked before and after each decoding step.

    After step s, ``max(1, min(left - 1, floor(L cos(pi/2 (s+1)/N))))`` tokens stay masked; the last step predicts
    all that is left. With more steps than tokens some steps predict nothing.

    Returns:
        N pairs ``(left, keep)``; step s predicts ``left - keep`` tokens.
    """
    schedule = []
    left = num_tokens
    for step in range(steps):
        keep = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        keep = 0 if step == steps - 1 else max(1, min(left - 1, keep))
        schedule.append((left, keep))
        left = keep
    return schedule


def guidance_scale(guidance: float, schedule: str, num_tokens: int, keep: int) -> float:
    """Guidance of the step after which ``keep`` tokens stay masked: constant, or 1 + (g - 1)(L - max(keep, 1))/L.

    The public code's count never falls below 1.
    """
    if schedule == "constant":
        return guidance
    return 1 + (guidance - 1) * (num_tokens - max(keep, 1)) / num_tokens
