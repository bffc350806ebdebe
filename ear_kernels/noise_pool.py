"""Which noise vector each row of the generator uses when rows share them (``noise_pool``; docs/noise_pool.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ear_kernels.runtime.launching import ceil_div


@dataclass(frozen=True)
class PoolArrangement:
    """Rows laid out so that those of one vector are consecutive.

    Vector ``(s, k)``, k < ``per_sample``, serves sample s only; it is row ``k`` of the noise given for sample
    s. It owns rows ``(s * per_sample + k) * group`` to ``+ group - 1``.
    """

    index: Tensor
    """``[samples * per_sample * group]`` int32: the token of each row; padding rows name the last token."""
    inverse: Tensor
    """``[tokens * samples]`` int64: the row of sample s of token t at ``t * samples + s``."""
    group: int
    per_sample: int


def pool_arrangement(tokens: int, samples: int, pool: int, device: torch.device) -> PoolArrangement:
    """Assign the samples of every token to about ``pool`` vectors (at most ``pool`` + ``samples``).

    The assignment is fixed, not drawn: token t = g * per_sample + k0 takes vector ``(s, (k0 - s g) mod
    per_sample)`` for sample s. Samples of one token use different s, so they never share a vector; the turn
    by ``s g`` makes two tokens that share a vector in one sample have different ones in the next.

    Raises:
        TypeError: ``pool`` is no integer. ValueError: fewer vectors than samples.
    """
    if isinstance(pool, bool) or not isinstance(pool, int):
        raise TypeError(f"noise_pool is {pool!r}; it must be an integer or None")
    if pool < samples:
        raise ValueError(f"noise_pool is {pool}; it must be at least the number of samples, {samples}")
    group = max(1, ceil_div(tokens * samples, pool))
    per_sample = ceil_div(tokens, group)
    step = torch.arange(group, device=device)
    vector = torch.arange(per_sample, device=device)
    sample = torch.arange(samples, device=device)
    turned = (vector[None, :, None] + sample[:, None, None] * step) % per_sample
    index = (step * per_sample + turned).clamp(max=tokens - 1).to(torch.int32)  # [samples, per_sample, group]
    token = torch.arange(tokens, device=device)[:, None]
    step, start = token // per_sample, token % per_sample
    inverse = (sample * per_sample + (start - sample * step) % per_sample) * group + step  # [tokens, samples]
    return PoolArrangement(index.flatten(), inverse.flatten(), group, per_sample)
