"""Ancestral sampling by a denoising MLP: the steps of some rows, over memory that stays where it is.

All that depends on the step is a number on the device, so that one CUDA graph of a few steps serves all of them.

Legend: R rows, G = R or 2 R with guidance (under the null class last), D token size, W width of the MLP, S steps.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels import functional
from ear_kernels.head import head_parameters, linear_parameters
from ear_kernels.runtime.checks import compute_dtype
from ear_kernels.runtime.plain import are_modules_watched, work_together
from ear_model.scores.diffusion_process import DiffusionProcess

MOST_MODULATIONS = 2**28
"""Bytes of the modulations that are computed at once: those of 7 steps of 448 rows with guidance of MAR-B's MLP."""
MOST_STEPS = 25
"""Steps at a time: what a CUDA graph holds."""


def plain_parameters(net: Any) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weight and bias of ``input_proj``, and the parameters of all layers; None where those don't say it all."""
    if are_modules_watched():
        return None
    projection, layers = linear_parameters(net.input_proj, net.width), head_parameters(net, net.width)
    return None if projection is None or layers is None else (projection, layers)


class Denoising:
    """The state of R tokens, and what the net is given with them.

    Args:
        net: :class:`ear_model.scores.diffusion.DenoisingMLP`.
        times: that are kept, ascending. process: of them.
        rows: R. guided: whether there are rows under the null class.
    """

    def __init__(self, net: Any, times: list[int], process: DiffusionProcess, rows: int, *, guided: bool) -> None:
        weight = net.input_proj.weight
        self.net, self.times, self.process, self.rows = net, times, process, rows
        self.dtype = compute_dtype(weight)
        number, size, both = torch.promote_types(weight.dtype, torch.float32), weight.shape[1], rows * (1 + guided)

        def new(*shape: int, dtype: torch.dtype = number) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        self.state_RD, self.states_GD = new(rows, size), new(both, size, dtype=self.dtype)
        self.noise_RSD = new(rows, len(times), size)
        self.table = new(len(times), 5)
        self.embedded_GW = new(both, net.width, dtype=self.dtype)
        self.embedded_SW = new(len(times), net.width, dtype=self.dtype)
        self.guidance = new(1) if guided else None
        self.time = new(1, dtype=torch.int64)
        columns = (3 * len(net.res_blocks) + 2) * net.width
        bytes_of_a_step = max(1, both * columns * self.dtype.itemsize)
        self.chunk = max(1, min(len(times), MOST_STEPS, MOST_MODULATIONS // bytes_of_a_step))
        """Steps of :meth:`advance`."""
        self.offsets = torch.arange(self.chunk, device=weight.device)

    @property
    def calls(self) -> int:
        """Of :meth:`advance` that take a token to its end."""
        return -(-len(self.times) // self.chunk)

    @torch.no_grad()
    def prepare(self, temperature: float) -> None:
        """See to the times and their tables; ``temperature`` multiplies the noise of the steps."""
        self.table.copy_(self.process.table(temperature))
        self.embedded_SW.copy_(self.net.time_embed(torch.tensor(self.times).to(self.time.device, non_blocking=True)))

    @torch.no_grad()
    def start(self, hidden_RC: Tensor, null_RC: Tensor | None, guidance: float | Tensor, noise_RE: Tensor) -> None:
        """The first state of these tokens: pure noise.

        Args:
            hidden_RC, null_RC: hidden states, and those under the null class where there is guidance.
            guidance: a number, or a tensor of one on the device.
            noise_RE: ``[R, S * D]``: the start, then each step's.
        """
        weight: Tensor = self.net.input_proj.weight
        both = hidden_RC if null_RC is None else torch.cat([hidden_RC, null_RC])
        self.embedded_GW.copy_(self.net.cond_embed(both.to(weight.dtype)))
        if self.guidance is not None:
            if isinstance(guidance, Tensor):
                self.guidance.copy_(guidance)
            else:
                self.guidance.fill_(guidance)
        self.noise_RSD.copy_(noise_RE.view_as(self.noise_RSD))
        self.state_RD.copy_(self.noise_RSD[:, 0])
        self.states_GD.copy_(self.state_RD.repeat(len(self.states_GD) // max(1, self.rows), 1))
        self.time.fill_(len(self.times) - 1)

    @torch.no_grad()
    def advance(self) -> None:
        """The next ``chunk`` steps; those after the last change nothing."""
        both, width = self.embedded_GW.shape
        now_T = (self.time - self.offsets).clamp(min=0)
        conditioning_TGW = self.embedded_SW[now_T].unsqueeze(1) + self.embedded_GW
        found = plain_parameters(self.net)
        if found is not None and work_together(self.states_GD, found[1]):
            modulations = functional.generator_modulations(conditioning_TGW.view(-1, width), [], found[1])
            for offset, own in enumerate(modulations.split(both) if both else ()):
                self._step(functional.generator_chain(self.states_GD, own, *found), offset)
        else:
            for offset, own in enumerate(conditioning_TGW):
                self._step(self.net.denoise(self.states_GD, own), offset)
        self.time -= self.chunk

    def _step(self, output: Tensor, offset: int) -> None:
        memory = self.state_RD, self.states_GD, self.noise_RSD, self.table, self.time
        functional.denoise_step(output.contiguous(), *memory, offset, self.guidance)
