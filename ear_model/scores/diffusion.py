"""The diffusion score (paper section 3.3): MAR's diffusion loss, a denoising MLP under the hidden state.

Hyvarinen's score of a token at every noise level: a network predicts the noise in a noisy token
(:mod:`ear_model.scores.diffusion_process`). Shapes: R rows, n noise levels a row, D token size, W width of the MLP,
C backbone width, S sampling steps.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ear_kernels import functional
from ear_kernels.head import head_parameters
from ear_kernels.modules import FusedAdaLNBlock, FusedFinalLayer
from ear_kernels.runtime.plain import are_modules_watched, work_together
from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.base import Score
from ear_model.scores.denoising import Denoising
from ear_model.scores.diffusion_process import DiffusionProcess, cosine_betas

FREQUENCIES = 128
LONGEST_PERIOD = 10_000


class TimeEmbedding(nn.Module):
    """Times to vectors ``[..., W]``: cosines and sines at 128 frequencies, 1 to nearly 1e-4, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """
        Args:
            times: int64 ``[...]``.
        """
        weight: Any = self.mlp[0].weight
        # float32 under autocast too: times up to 1000 need more than a 16-bit mantissa.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        places = torch.arange(FREQUENCIES, device=times.device, dtype=dtype)
        angles = times.unsqueeze(-1).to(dtype) * (places * (-math.log(LONGEST_PERIOD) / FREQUENCIES)).exp()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype))


class DenoisingMLP(nn.Module):
    """Noisy tokens, times and hidden states to the predicted noise and variance range.

    Its state dict is that of the public head below ``diffloss.net.``: ``time_embed.mlp``, ``cond_embed``,
    ``input_proj``, ``res_blocks.i``, ``final_layer``. Blocks and final layer are those of the energy score's
    generator; the stream is the noisy token and the conditioning time plus hidden state.

    Args:
        input_dim: C. width: W. token_dim: D. depth: number of residual blocks.
    """

    def __init__(self, input_dim: int, width: int, token_dim: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(input_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList([FusedAdaLNBlock(width) for _ in range(depth)])
        self.final_layer = FusedFinalLayer(width, 2 * token_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights (the time's: normal 0.02), zero biases; modulations and last linear zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for parameter in self.time_embed.mlp.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        layers: list[Any] = [*self.res_blocks, self.final_layer]
        for linear in [*(layer.adaLN_modulation[1] for layer in layers), self.final_layer.linear]:
            nn.init.zeros_(linear.weight)

    def forward(self, states_RnD: Tensor, times_Rn: Tensor, hidden_RC: Tensor) -> Tensor:
        """``[R, n, 2 D]`` of n noisy tokens of each hidden state, which is embedded once for all of them."""
        conditioning_RnW = self.time_embed(times_Rn) + self.cond_embed(hidden_RC).unsqueeze(1)
        return self.denoise(states_RnD.flatten(0, 1), conditioning_RnW.flatten(0, 1)).unflatten(0, times_Rn.shape)

    def denoise(self, states_RD: Tensor, conditioning_RW: Tensor) -> Tensor:
        """``[R, 2 D]`` of noisy tokens and the sum of embedded time and hidden state."""
        stream = self.input_proj(states_RD)
        parameters = None if are_modules_watched() else head_parameters(self, self.width)
        if parameters is not None and work_together(stream, parameters):
            return functional.generator_blocks(stream, conditioning_RW, parameters)
        for block in self.res_blocks:
            stream = block(stream, conditioning_RW)
        return self.final_layer(stream, conditioning_RW)


class DiffusionScore(Score):
    """The denoising MLP and its process of ``diffusion_steps`` noise levels, T."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = DenoisingMLP(config.width, config.generator_width, config.token_dim, config.generator_depth)
        self.process = DiffusionProcess(cosine_betas(config.diffusion_steps))
        self.num_samples = config.num_samples

    def loss(self, hidden_RC: Tensor, targets_RT: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The mean over rows and ``num_samples`` uniformly random noise levels of each, a scalar."""
        shape = hidden_RC.shape[0], self.num_samples
        last = len(self.process.betas) - 1
        times_Rn = (draws.rand(*shape, device=hidden_RC.device) * (last + 1)).long().clamp(max=last)
        noise_RnD = draws.randn(*shape, targets_RT.shape[-1], device=hidden_RC.device)
        return self.loss_of(hidden_RC, targets_RT, times_Rn, noise_RnD)

    def loss_of(self, hidden_RC: Tensor, targets_RD: Tensor, times_Rn: Tensor, noise_RnD: Tensor) -> Tensor:
        """The loss at these noise levels with this noise; 0 for no rows."""
        dtype = torch.promote_types(targets_RD.dtype, torch.float32)
        noise_RnD = noise_RnD.to(dtype)
        start_RnD = targets_RD.to(dtype).unsqueeze(1).expand_as(noise_RnD)
        states_RnD = self.process.diffuse(start_RnD, times_Rn, noise_RnD)
        output = self.net(states_RnD.to(self._input_dtype), times_Rn, hidden_RC.to(self._input_dtype))
        losses_Rn = self.process.loss(output.to(dtype), start_RnD, times_Rn, noise_RnD)
        return losses_Rn.sum() / max(1, losses_Rn.numel())

    def multiply_adds(self) -> float:
        return self.num_samples * super().multiply_adds()

    def kept_numbers(self) -> float:
        return self.num_samples * super().kept_numbers()

    @property
    def _input_dtype(self) -> torch.dtype:
        """What the linears take without autocast."""
        return self.net.input_proj.weight.dtype

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS, diffusion_steps: int = 100) -> Tensor:
        """Standard normal numbers ``[*shape, S * D]`` of all steps, in float32: the start, then each step's but the
        last one's, which adds none.

        Raises:
            ValueError: more steps than were trained, or none.
        """
        self._check_steps(diffusion_steps)
        return draws.randn(*shape, diffusion_steps * self.token_size, device=like.device)

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_RE: Tensor,
        diffusion_steps: int = 100,
    ) -> Tensor:
        """Tokens ``[R, D]`` in float32 by ``diffusion_steps`` respaced ancestral steps.

        Guidance mixes the predicted noise, ``e_null + g (e_class - e_null)``; the variance is that under the class.
        ``temperature`` multiplies the noise of the steps, not that of the start.

        Raises:
            ValueError: more steps than were trained, or none; noise of another size.
        """
        self._check_steps(diffusion_steps)
        size = self.token_size
        if noise_RE.shape[-1] != diffusion_steps * size:
            raise ValueError(
                f"noise has {noise_RE.shape[-1]} numbers a token; {diffusion_steps} diffusion steps of tokens of "
                f"{size} need {diffusion_steps * size}"
            )
        denoising = self.denoising(hidden_RC.shape[0], diffusion_steps, guided=null_hidden_RC is not None)
        denoising.prepare(temperature)
        denoising.start(hidden_RC, null_hidden_RC, guidance, noise_RE)
        for _ in range(denoising.calls):
            denoising.advance()
        return denoising.state_RD.float()

    def denoising(self, rows: int, diffusion_steps: int, *, guided: bool) -> Denoising:
        """What :meth:`sample` does for so many rows, over memory of its own."""
        return Denoising(self.net, *self.process.respaced(diffusion_steps), rows, guided=guided)

    def _check_steps(self, diffusion_steps: int) -> None:
        trained = len(self.process.betas)
        if not 1 <= diffusion_steps <= trained:
            raise ValueError(f"diffusion_steps is {diffusion_steps}; this model was trained with {trained} of them")
