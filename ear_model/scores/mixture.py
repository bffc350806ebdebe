"""The logarithmic score of a mixture of diagonal Gaussians (GIVT, Tschannen et al. 2024; paper section 3.3).

Shapes: R rows, k components, j those of the null class, D numbers of a token, T tries.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.base import Score
from ear_model.scores.linear import FullPrecisionLinear

TRIES = 64
"""Proposals a token at most; the noise of all of them is drawn."""
SMALLEST_SCALE = 1e-6
_WIDEST = 2.0  # guided components are at most so many times as wide as the class's
_COLDEST = 1e-4  # temperature of densities, which have none at 0


class Mixture(NamedTuple):
    """A mixture of diagonal Gaussians for each row."""

    log_weights_Rk: Tensor
    means_RkD: Tensor
    log_scales_RkD: Tensor

    def log_density(self, points_RTD: Tensor) -> Tensor:
        """``[R, T]``."""
        log_scales = self.log_scales_RkD.unsqueeze(1)
        scaled_RTkD = (points_RTD.unsqueeze(2) - self.means_RkD.unsqueeze(1)) * (-log_scales).exp()
        log_RTk = self.log_weights_Rk.unsqueeze(1) - (0.5 * scaled_RTkD.square() + log_scales).sum(-1)
        return log_RTk.logsumexp(-1) - 0.5 * points_RTD.shape[-1] * math.log(2 * math.pi)

    def points(self, uniform_RT: Tensor, normal_RTD: Tensor) -> Tensor:
        """Points ``[R, T, D]`` of components that uniform numbers choose."""
        below = self.log_weights_Rk.softmax(-1).cumsum(-1).unsqueeze(1)
        chosen_RT = (uniform_RT.unsqueeze(-1) >= below).sum(-1).clamp(max=below.shape[-1] - 1)
        index = chosen_RT.unsqueeze(-1).expand_as(normal_RTD)
        return self.means_RkD.gather(1, index) + self.log_scales_RkD.gather(1, index).exp() * normal_RTD


class MixtureScore(Score):
    """The negative log-likelihood of ``components`` diagonal Gaussians, all of them from one linear layer.

    The layer gives k logits, k D means and k D raw scales; a raw scale x is the scale (x + sqrt(x^2 + 4)) / 2, which
    is exp(asinh(x / 2)), but at least 1e-6. It begins at zero, but for the biases of the means: components that begin
    alike have the same gradients and stay one Gaussian.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.components = config.components
        self.linear = FullPrecisionLinear(config.width, config.components * (1 + 2 * config.token_dim))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[self.components : self.components * (1 + config.token_dim)].normal_()
        self._counts: Tensor | None = None

    def mixture(self, hidden_RC: Tensor, temperature: float = 1.0) -> Mixture:
        """What is predicted of each row, in float32 (float64 stays), all scales times the temperature."""
        sizes = [self.components, *2 * [self.components * self.token_size]]
        logits_Rk, means, raw = self.linear(hidden_RC).split(sizes, dim=-1)
        log_scales = torch.asinh(raw / 2).clamp(min=math.log(SMALLEST_SCALE))
        if temperature != 1:
            log_scales = log_scales + math.log(temperature) if temperature else torch.full_like(raw, -math.inf)
        shape = (self.components, self.token_size)
        return Mixture(logits_Rk.log_softmax(-1), means.unflatten(-1, shape), log_scales.unflatten(-1, shape))

    def loss(self, hidden_RC: Tensor, targets_RT: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The mean of ``-log p(target)``, a scalar in float32 (float64 stays); 0 of no rows."""
        mixture = self.mixture(hidden_RC)
        targets = targets_RT.to(mixture.means_RkD.dtype).unsqueeze(1)
        return -mixture.log_density(targets).sum() / max(1, hidden_RC.shape[0])

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """For each try a uniform number that chooses the component, one that accepts or not, and D normal ones:
        ``[*shape, TRIES * (2 + D)]`` in float32."""
        uniform = draws.rand(*shape, 2 * TRIES, device=like.device)
        return torch.cat([uniform, draws.randn(*shape, TRIES * self.token_size, device=like.device)], dim=-1)

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_RE: Tensor,
    ) -> Tensor:
        """Tokens ``[R, D]`` of the class's mixture, or of :func:`guided` densities; temperature scales all scales.

        With guidance a temperature below 1e-4 is that. Tokens whose proposals were all rejected are counted
        (:meth:`sampling_report`).
        """
        choosing_RT, accepting_RT, normal = noise_RE.split([TRIES, TRIES, TRIES * self.token_size], dim=-1)
        normal_RTD = normal.unflatten(-1, (TRIES, self.token_size))
        if null_hidden_RC is None or guidance == 1:
            return self.mixture(hidden_RC, temperature).points(choosing_RT[:, :1], normal_RTD[:, :1])[:, 0].float()
        temperature = max(temperature, _COLDEST)
        given, null = (
            Mixture(*(part.double() for part in self.mixture(hidden, temperature)))
            for hidden in (hidden_RC, null_hidden_RC)
        )
        tokens_RD, accepted_R = guided(
            given, null, guidance - 1, choosing_RT.double(), accepting_RT.double(), normal_RTD.double()
        )
        counts = torch.stack([(~accepted_R).sum(), torch.full_like(accepted_R, True).sum()])
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
        return tokens_RD.float()

    def sampling_report(self) -> str:
        """How many guided tokens had all their proposals rejected, since the last call."""
        if self._counts is None:
            return ""
        fallen_back, drawn = self._counts.tolist()
        self._counts = None
        return f"rejection: {fallen_back:,} of {drawn:,} guided tokens had none of {TRIES} proposals accepted"


def envelope(given: Mixture, null: Mixture, weight: float) -> tuple[Mixture, Tensor]:
    """A mixture that times a factor is at least p_c^(1+w) p_u^(-w), and the factor's logarithm ``[R]``.

    With w > 0: by convexity (sum_k a_k)^(1+w) <= sum_k q_k^(-w) a_k^(1+w) for any q_k > 0 that add up to 1. And p_u
    is at least each of its own terms b_j. So with a_k the terms of p_c and j(k) any choice

        p_c^(1+w) p_u^(-w)  <=  sum_k q_k^(-w) a_k^(1+w) b_j(k)^(-w)

    Each summand is a Gaussian of precision ``(1+w)/s_c^2 - w/s_u^2``, if that is positive, and of some mass Z_k. The
    q of the least total mass is ``Z_k^(1/(1+w))`` over its sum S; then the components' shares of the mass are q too,
    and the factor is ``S^(1+w)``. j(k) is the one of the least Z_k. All components far apart cost a factor of
    k^w at most; one that dominates costs nothing.

    Where no j gives a positive precision, p_c^(1+w) p_u^(-w) may have no finite mass. Then b_j falls off more slowly
    than it does, so that the guided component is twice as wide as the class's: no bound far out, where
    :func:`guided` samples the envelope in place of the density.

    With -1 <= w < 0: a geometric mean is at most the arithmetic one, (1+w) p_c - w p_u.
    """
    if weight < 0:
        logs = (math.log1p(weight) if weight > -1 else -math.inf, math.log(-weight))
        log_weights = torch.cat([given.log_weights_Rk + logs[0], null.log_weights_Rk + logs[1]], dim=1)
        others = (torch.cat(pair, dim=1) for pair in zip(given[1:], null[1:], strict=True))
        return Mixture(log_weights, *others), torch.zeros_like(log_weights[:, 0])
    precision_RkD, null_precision_RjD = ((-2 * each.log_scales_RkD).exp() for each in (given, null))
    own_Rk1D = (1 + weight) * precision_RkD.unsqueeze(2)
    other_RkjD = weight * null_precision_RjD.unsqueeze(1)
    most_Rk1D = (1 + weight - _WIDEST**-2) * precision_RkD.unsqueeze(2)
    is_wide_Rkj = (other_RkjD > own_Rk1D * (1 - 1e-6)).any(-1)
    other_RkjD = torch.where(is_wide_Rkj.unsqueeze(-1), torch.minimum(other_RkjD, most_Rk1D), other_RkjD)
    sum_RkjD = own_Rk1D - other_RkjD
    apart_RkjD = given.means_RkD.unsqueeze(2) - null.means_RkD.unsqueeze(1)
    log_mass_Rkj = 0.5 * (own_Rk1D * other_RkjD / sum_RkjD * apart_RkjD.square() - sum_RkjD.log()).sum(-1)
    log_mass_Rkj = log_mass_Rkj - weight * (null.log_weights_Rk - null.log_scales_RkD.sum(-1)).unsqueeze(1)
    best_Rk1 = torch.where(is_wide_Rkj, torch.inf, log_mass_Rkj).argmin(-1, keepdim=True)
    # With none that bounds: the component of the same number.
    same = torch.arange(best_Rk1.shape[1], device=best_Rk1.device).unsqueeze(-1)
    best_Rk1 = torch.where(is_wide_Rkj.all(-1, keepdim=True), same, best_Rk1)
    log_mass_Rk = log_mass_Rkj.gather(-1, best_Rk1).squeeze(-1)
    log_mass_Rk = log_mass_Rk + (1 + weight) * (given.log_weights_Rk - given.log_scales_RkD.sum(-1))
    index = best_Rk1.unsqueeze(-1).expand(-1, -1, -1, apart_RkjD.shape[-1])
    other_RkD, sum_RkD, apart_RkD = (each.gather(2, index).squeeze(2) for each in (other_RkjD, sum_RkjD, apart_RkjD))
    means_RkD = given.means_RkD + other_RkD / sum_RkD * apart_RkD
    roots_Rk = log_mass_Rk / (1 + weight)
    log_sum_R = roots_Rk.logsumexp(-1)
    return Mixture(roots_Rk - log_sum_R.unsqueeze(-1), means_RkD, -0.5 * sum_RkD.log()), (1 + weight) * log_sum_R


def guided(
    given: Mixture, null: Mixture, weight: float, choosing_RT: Tensor, accepting_RT: Tensor, normal_RTD: Tensor
) -> tuple[Tensor, Tensor]:
    """Points ``[R, D]`` of the density in proportion to p_c^(1+w) p_u^(-w), and whether each was accepted, ``[R]``.

    By rejection, from the mixture of :func:`envelope`: the first of T proposals that is accepted with the probability
    density / envelope. (GIVT's code draws a component by p_c's weights and takes p_u's of the same number for all of
    p_u, each dimension on its own, under a Gaussian whose factor it reads off a grid; this is the density of the
    whole mixtures, under a bound that holds.) If all are rejected, one of the T is chosen with probabilities in
    proportion to density / envelope (importance resampling), which is right in the limit of many tries, where the
    largest ratio would not be. Where the envelope bounds nothing (a density without finite mass), what is sampled is
    the smaller of the two.

    Args:
        given, null: p_c and p_u.
        weight: w, at least -1.
        choosing_RT, accepting_RT, normal_RTD: uniform, uniform and normal numbers of T tries.
    """
    proposal, log_factor_R = envelope(given, null, weight)
    points_RTD = proposal.points(choosing_RT, normal_RTD)
    log_own = given.log_density(points_RTD) * (1 + weight) - weight * null.log_density(points_RTD)
    log_ratio_RT = log_own - proposal.log_density(points_RTD) - log_factor_R.unsqueeze(-1)
    ratio_RT = log_ratio_RT.clamp(max=0).exp()
    accepts_RT = accepting_RT < ratio_RT
    tries = ratio_RT.shape[1]
    numbers = torch.arange(tries, device=ratio_RT.device)
    first_R = torch.where(accepts_RT, numbers, tries).amin(-1)
    # Given that all were rejected, these are uniform and say nothing of the ratios; the largest sum with Gumbel
    # numbers is a choice with probabilities in proportion to the ratios.
    again_RT = ((accepting_RT - ratio_RT) / (1 - ratio_RT)).clamp(1e-12, 1 - 1e-12)
    chosen_R = (log_ratio_RT - (-again_RT.log()).log()).argmax(-1)
    accepted_R = first_R < tries
    index = torch.where(accepted_R, first_R, chosen_R).view(-1, 1, 1).expand(-1, -1, points_RTD.shape[-1])
    return points_RTD.gather(1, index).squeeze(1), accepted_R
