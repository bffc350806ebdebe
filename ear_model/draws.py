"""Random numbers: seeds of generators, and what a model draws from."""

import numpy as np
import torch
from torch import Tensor


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers; torch's CPU generator reads no more of it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own, seeded by several numbers."""
    return torch.Generator(device).manual_seed(mixed_seed(*numbers))


class Draws:
    """Where a model's random numbers come from: one generator, or torch's own ones where None.

    Args:
        generator: of the device that is drawn for.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def rand(self, *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Uniform on [0, 1). All but a draw of no dimensions have the images, or rows of them, first."""
        return torch.rand(shape, device=device, dtype=dtype, generator=self.generator)

    def randn(self, *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, likewise."""
        return torch.randn(shape, device=device, dtype=dtype, generator=self.generator)


TORCH_DRAWS = Draws()
