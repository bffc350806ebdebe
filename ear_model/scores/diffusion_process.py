"""Gaussian diffusion of tokens: the forward process, its posterior, the loss, and a step back.

Ho et al. 2020 (arXiv:2006.11239) with the cosine schedule and the learned variances of Nichol & Dhariwal 2021
(arXiv:2102.09672), which is what MAR's diffusion loss is (Li et al. 2024, arXiv:2406.11838). Times are 0 .. T - 1, of
which 0 has the least noise. With b_t the variance of step t, a_t = 1 - b_t and A_t = a_0 a_1 .. a_t:

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) e,    e ~ N(0, 1)
    q(x_{t-1} | x_t, x_0) = N((x_t - c_t' e) / sqrt(a_t), v_t),
    c_t' = b_t / sqrt(1 - A_t),    v_t = b_t (1 - A_{t-1}) / (1 - A_t)

A model of the noise e therefore has a posterior mean that is off by c_t (e_model - e), c_t = c_t' / sqrt(a_t),
whatever x_0 is; the public code goes by way of a predicted x_0, to the same numbers.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_BETA = 0.999
# Half the width of the bins that the decoder's likelihood is over: 8-bit values in -1..1, as in the public code.
HALF_BIN = 1 / 255
LEAST_PROBABILITY = 1e-12


def cosine_betas(steps: int) -> NDArray[np.float64]:
    """Variances b_t of all steps in float64, at most 0.999, of A(u) = cos^2((u + 0.008) / 1.008 * pi / 2)."""

    def alpha_bar(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    pairs = ((step / steps, (step + 1) / steps) for step in range(steps))
    return np.array([min(1 - alpha_bar(after) / alpha_bar(before), MAX_BETA) for before, after in pairs])


def respaced_times(num_times: int, steps: int) -> list[int]:
    """Times of a process of ``num_times`` that one of ``steps`` keeps, ascending.

    Time i is ``round(i * (num_times - 1) / (steps - 1))``, a half to the even number, where ``i * ...`` is a running
    float64 sum: the first and the last time and evenly spaced ones between, as the public code takes them. A single
    step keeps time 0 alone.

    Raises:
        ValueError: steps not in 1..num_times.
    """
    if not 1 <= steps <= num_times:
        raise ValueError(f"diffusion_steps is {steps}; it must be in 1..{num_times}, the steps that were trained")
    stride = (num_times - 1) / (steps - 1) if steps > 1 else 1.0
    times, place = [], 0.0
    for _ in range(steps):
        times.append(round(place))
        place += stride
    return times


class DiffusionProcess:
    """Tables of a process, on the host in float64; ``[T]`` each, T times.

    Args:
        betas: variance b_t of every step, in (0, 1).
    """

    def __init__(self, betas: NDArray[np.float64]) -> None:
        alpha_bars = np.cumprod(1 - betas)
        before = np.append(1.0, alpha_bars[:-1])
        self.betas, self.alpha_bars = betas, alpha_bars
        self.signal = np.sqrt(alpha_bars)
        """sqrt(A_t)."""
        self.noise = np.sqrt(1 - alpha_bars)
        """sqrt(1 - A_t)."""
        self.growth = 1 / np.sqrt(1 - betas)
        """1 / sqrt(a_t), what x_t is multiplied by in the posterior's mean."""
        self.error = betas / (self.noise * np.sqrt(1 - betas))
        """c_t, what the noise is multiplied by there."""
        variances = betas * (1 - before) / (1 - alpha_bars)
        # The posterior of time 0 has no variance; it borrows that of time 1, or b_0 where there is only one time.
        variances[0] = variances[1] if len(betas) > 1 else betas[0]
        self.least_log_variance = np.log(variances)
        """log v_t, the lower end of the range of the model's variance."""
        self.most_log_variance = np.log(betas)
        """log b_t, its upper end."""
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def respaced(self, steps: int) -> tuple[list[int], "DiffusionProcess"]:
        """Fewer steps over the same A_t: the times that are kept, ascending, and the process of them.

        Raises:
            ValueError: as :func:`respaced_times`.
        """
        times = respaced_times(len(self.betas), steps)
        kept = self.alpha_bars[times]
        return times, DiffusionProcess(1 - kept / np.append(1.0, kept[:-1]))

    def table(self, temperature: float) -> Tensor:
        """What :func:`ear_kernels.functional.denoise_step` takes of every time, float64 ``[T, 5]``.

        Args:
            temperature: multiplies the noise of the steps.
        """
        ends = self.least_log_variance, self.most_log_variance
        rows = self.growth, self.error, *ends, np.full_like(self.growth, temperature)
        return torch.from_numpy(np.stack(rows, 1))

    def diffuse(self, start: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """x_t ``[..., D]`` of tokens and noise of that shape and times ``[...]``."""
        signal, spread, *_ = self._at(times, start.dtype)
        return signal * start + spread * noise

    def loss(self, output: Tensor, start: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the predicted noise plus the variational bound in bits, means over D: ``[...]``.

        Improved diffusion's hybrid loss with weight 1, as MAR takes it. The bound is the KL divergence from the
        posterior to the model's, at time 0 minus the log likelihood of the token's 8-bit bin
        (:func:`log_likelihood`). It trains the variances alone: the predicted noise is detached in it.

        Args:
            output: ``[..., 2 D]``, the predicted noise and the place r of the variance in its range, -1..1.
            start: tokens ``[..., D]``. times: int64 ``[...]``. noise: ``[..., D]``.
        """
        predicted, place = output.chunk(2, -1)
        *_, error, least, most = self._at(times, start.dtype)
        log_variance = self._log_variance(place, least, most)
        distance = error * (predicted.detach() - noise)
        kl = 0.5 * (
            log_variance - least - 1 + (least - log_variance).exp() + distance.square() * (-log_variance).exp()
        )
        # At time 0 x_1 is the mean's only source, so the token is `distance` above it.
        likelihood = log_likelihood(start, distance, log_variance)
        bound = torch.where(times.unsqueeze(-1) == 0, -likelihood, kl).mean(-1) / math.log(2)
        return (predicted - noise).square().mean(-1) + bound

    @staticmethod
    def _log_variance(place: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """Between the ends in proportion to r in -1..1, and beyond them for an r outside."""
        share = (place + 1) / 2
        return share * most + (1 - share) * least

    def _at(self, times: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """signal, noise, error, least and most log variance of times ``[...]``, each ``[..., 1]``."""
        where = times.device, dtype
        if where not in self._copies:
            rows = (self.signal, self.noise, self.error, self.least_log_variance, self.most_log_variance)
            self._copies[where] = torch.from_numpy(np.stack(rows, 1)).to(times.device, dtype)
        return self._copies[where][times].split(1, -1)


def log_likelihood(value: Tensor, above_mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the probability of a value's 8-bit bin under a Gaussian, as the public code approximates it.

    The bin is the value plus and minus 1/255; below -0.999 it has no lower end, above 0.999 no upper one.
    Probabilities are no less than 1e-12, where the gradient is 0. The normal's cumulative distribution is
    ``(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2``.

    Args:
        value: decides about the open bins. above_mean: the value minus the Gaussian's mean.
    """
    scale = (-0.5 * log_variance).exp()
    below_upper = _normal_cdf(scale * (above_mean + HALF_BIN))
    below_lower = _normal_cdf(scale * (above_mean - HALF_BIN))
    probability = torch.where(
        value < -0.999, below_upper, torch.where(value > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
