"""Hypothesis strategies for the operations' inputs."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

ALPHAS = st.one_of(
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]),
    st.floats(0.1, 2.0, allow_nan=False).map(lambda value: round(value, 3)),
)


@dataclass
class EnergyLossCase:
    """float64 inputs of one call of the energy loss; samples ``[*rows, n, D]``, target ``[*rows, m, D]``."""

    samples: Tensor
    target: Tensor
    mask: Tensor | None
    weights: Tensor | None
    feature_weights: Tensor | None
    options: dict


@st.composite
def energy_loss_cases(draw, smooth: bool = False) -> EnergyLossCase:
    """Random shapes, options, masks, weights, strides and (unless ``smooth``) coincident points.

    smooth: no coincident points and no masked NaN, so that finite differences exist.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    n, m, features = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    samples = torch.randn(*rows, n, features, generator=generator, dtype=torch.float64)
    target = torch.randn(*rows, m, features, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # every other feature of a wider tensor: strides that are not contiguous
        wide = torch.randn(*rows, n, 2 * features, generator=generator, dtype=torch.float64)
        samples = wide[..., ::2]
    mask = weights = feature_weights = None
    if draw(st.booleans()):
        mask = torch.rand(rows, generator=generator) < 0.7
    if draw(st.booleans()):
        weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        feature_weights = torch.rand(features, generator=generator, dtype=torch.float64) + 0.1
    if not smooth:
        samples = samples.clone()
        if draw(st.booleans()):
            samples[..., 1, :] = samples[..., 0, :]
        if draw(st.booleans()):
            target[..., 0, :] = samples[..., 0, :]
        if mask is not None:
            samples[~mask] = float("nan")
            target[~mask] = float("inf")
    options = {
        "alpha": draw(ALPHAS),
        "tau": draw(st.floats(0.05, 1.0)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "eps": draw(st.sampled_from([0.0, 0.0, 0.1])),
    }
    return EnergyLossCase(samples, target, mask, weights, feature_weights, options)
