"""Random numbers: seeds of generators, and what a model draws from."""

from collections.abc import Callable

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

    def fraction(self) -> float:
        """A number in [0, 1) of the CPU's generator, the same on all processes of a job."""
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform on [0, 1), the images, or rows of them, first."""
        return self._draw(torch.rand, shape, torch.device(device))

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal, likewise."""
        return self._draw(torch.randn, shape, torch.device(device))

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        return draw(shape, device=device, generator=self.generator)


TORCH_DRAWS = Draws()
