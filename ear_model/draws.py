"""Random numbers: seeds of generators, and what a model draws from."""

import functools
from collections.abc import Callable, Iterable

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

    def orders(self, images: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """A uniformly random permutation of the tokens for each image, int64 ``[images, tokens]``."""
        return self.rand(images, tokens, device=device).argsort(dim=-1, stable=True)

    def mark(self, device: torch.device) -> Callable[[], object]:
        """A function that goes back to here: what was drawn for ``device`` meanwhile is drawn again."""
        if self.generator is not None:
            return functools.partial(self.generator.set_state, self.generator.get_state())
        if device.type == "cuda":
            return functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        return functools.partial(torch.set_rng_state, torch.get_rng_state())

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        return draw(shape, device=device, generator=self.generator)


class ImageDraws(Draws):
    """Draws of which image i gets numbers that depend on the seed and on i alone.

    Each image has a counter-based generator of its own (numpy's Philox), drawn from on the host: the same numbers
    on every device, in batches of any size.

    Args:
        seed: not negative, of any size; every seed gives other numbers.
        images: the indices of the images that are drawn for, the first dimension of every draw.

    Raises:
        ValueError: a negative seed or index. TypeError: one that is no integer.
    """

    def __init__(self, seed: int, images: Iterable[int]) -> None:
        super().__init__()
        check_seed(seed)
        self._seed, self._images = seed, list(images)
        self._begin()

    def _begin(self) -> None:
        # A key of its own behind the seed's words: seeds longer than a word don't run into each other.
        sequences = (np.random.SeedSequence(self._seed, spawn_key=(index,)) for index in self._images)
        self._generators = [np.random.Generator(np.random.Philox(sequence)) for sequence in sequences]

    def mark(self, device: torch.device) -> Callable[[], object]:
        """As of :class:`Draws`, at the start: from the first number on."""
        return self._begin

    def fraction(self) -> float:
        raise NotImplementedError("a number for a whole batch is no image's own")

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        images, *sizes = shape
        if images != len(self._generators):
            raise ValueError(f"{images} images are to be drawn for; these draws are of {len(self._generators)}")
        numbers = np.empty(shape, np.float32)
        for own, generator in zip(numbers, self._generators, strict=True):
            if draw is torch.rand:
                generator.random(sizes, np.float32, out=own)
            else:
                generator.standard_normal(sizes, np.float32, out=own)
        return torch.from_numpy(numbers).to(device)


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` is an integer that is not negative."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; it must be an integer")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")


TORCH_DRAWS = Draws()
