"""The random numbers of a training run: which processes share them, and how they survive a resume.

On a single process everything is drawn from torch's own generators. On several there are two kinds of draws:

- common ones, from generators that are alike on all processes: the number of masked tokens of a batch always, and
  orders, noise and dropped classes in models without dropout, whose loss curve so is that of a single process;
- each process's own, from torch's generators, seeded by seed and rank: dropout, and in models with dropout, whose
  curves can't be equal anyway, orders, noise and dropped classes too. This costs nothing at any number of processes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ear_model.draws import TORCH_DRAWS, Draws, mixed_seed
from ear_model.training import distributed


class CommonDraws(Draws):
    """Random numbers that don't depend on the number of processes.

    Every process draws the rows of all processes from generators that are alike on all of them, and keeps its own. So
    W processes with b images each draw what one process draws for W b images: orders, noise and dropped classes all
    have the images first. A fraction, for the number of masked tokens, is the same everywhere.

    The generators start where torch's own stand. Dropout is not drawn this way.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.generators = {"cpu": torch.Generator().set_state(torch.get_rng_state())}
        if device.type == "cuda":
            self.generators["cuda"] = torch.Generator(device).set_state(torch.cuda.get_rng_state(device))

    def fraction(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generators["cpu"]))

    def _draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        rows, rank = shape[0], distributed.rank()
        whole = (rows * distributed.world_size(), *shape[1:])
        drawn = draw(whole, device=device, generator=self.generators[device.type])
        # A copy, so that the other processes' rows are freed.
        return drawn[rank * rows : (rank + 1) * rows].clone()


class Randomness:
    """Where the random numbers of a run come from; to be made when the model is initialised.

    Args:
        device: what the model is on.
        seed: of the run.
        has_dropout: whether the model has dropout, so that each process draws on its own.
    """

    def __init__(self, device: torch.device, seed: int, *, has_dropout: bool) -> None:
        self.device, self.seed, self.has_dropout = device, seed, has_dropout
        self.common = CommonDraws(device) if distributed.world_size() > 1 else None
        if self.common is not None:
            self._reseed(0)

    def _reseed(self, step: int) -> None:
        torch.manual_seed(mixed_seed(self.seed, distributed.rank(), step))

    @property
    def same_everywhere(self) -> Draws:
        """For what all processes must draw alike."""
        return self.common or TORCH_DRAWS

    @property
    def of_images(self) -> Draws:
        """For what is drawn anew for each image: the forward pass."""
        return TORCH_DRAWS if self.has_dropout else self.same_everywhere

    def _own(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint; to be called by all processes."""
        own = self._own()
        if self.common is None:
            return {**own, "process_rng": [own]}
        generators = self.common.generators
        return {
            "cpu_rng": generators["cpu"].get_state(),
            "cuda_rng": generators["cuda"].get_state() if "cuda" in generators else None,
            "process_rng": distributed.gather_objects(own),
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint of :meth:`state`.

        After as many processes as there are here, every generator goes on where it stood. After another number the
        common ones do, and each process's own are seeded by seed, rank and step.
        """
        processes = state.get("process_rng", [None])  # converted checkpoints know of none
        if self.common is not None:
            self.common.generators["cpu"].set_state(state["cpu_rng"])
            if "cuda" in self.common.generators and state["cuda_rng"] is not None:
                self.common.generators["cuda"].set_state(state["cuda_rng"])
        else:
            self._set_own(state)
        if len(processes) == distributed.world_size():
            if self.common is not None:
                self._set_own(processes[distributed.rank()])
        elif self.common is not None or self.has_dropout or not processes:
            self._reseed(step)

    def _set_own(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
