"""What scores over samples share: the MLP generator that draws them, in training and in sampling."""

import torch
from torch import Tensor

from ear_kernels import FusedMLPGenerator
from ear_kernels.runtime.checks import compute_dtype
from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.base import Score


class GeneratorScore(Score):
    """A score whose forecast is implicit: the generator's samples, ``num_samples`` of them a token in training.

    What it scores them by is :meth:`loss_of`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.generator = FusedMLPGenerator(
            config.width,
            config.generator_width,
            config.token_dim,
            depth=config.generator_depth,
            noise_dim=config.noise_dim,
        )
        self.num_samples = config.num_samples
        self.noise = config.noise

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """Noise vectors ``[*shape, noise_dim]``: uniform on [-0.5, 0.5), or standard normal.

        Drawn in float32, given in the dtype of ``like``.
        """
        draw = draws.randn if self.noise == "gaussian" else draws.rand
        noise = draw(*shape, self.generator.noise_dim, device=like.device)
        return (noise if self.noise == "gaussian" else noise - 0.5).to(like.dtype)

    def loss(self, hidden_RC: Tensor, targets_RD: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The score of samples with noise that is drawn anew, a scalar in float32."""
        noise_RnE = self.draw_noise(hidden_RC.shape[0], self.num_samples, like=hidden_RC, draws=draws)
        return self.loss_of(hidden_RC, targets_RD, noise_RnE)

    def loss_of(
        self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor, *, noise_pool: int | None = None
    ) -> Tensor:
        """The loss with these noise vectors ``[R, num_samples, noise_dim]``, or with about ``noise_pool`` of them."""
        raise NotImplementedError

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_RE: Tensor,
    ) -> Tensor:
        """Tokens ``[R, D]`` in float32 from guided hidden states ``g h_class + (1 - g) h_null`` and noise."""
        if null_hidden_RC is not None:
            hidden_RC = guidance * hidden_RC + (1 - guidance) * null_hidden_RC
        return self.generator(hidden_RC, noise_RE, temperature).float()

    def prepare(self, noise_RE: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
        """What can be computed of the noise before hidden states are known: the generator's modulations.

        They are ``[R, (3 depth + 2) W]`` in the autocast dtype, or in that of the parameters; ``out`` is memory for
        them.
        """
        return self.generator.modulations(noise_RE, temperature, out)

    def prepared_bytes(self, rows: int) -> int:
        """Bytes of what :meth:`prepare` returns for this many rows, here and under this autocast."""
        weight = self.generator.noise_embed.weight
        columns = (3 * len(self.generator.res_blocks) + 2) * self.generator.width
        return rows * columns * compute_dtype(weight).itemsize

    @torch.no_grad()
    def sample_prepared(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float | Tensor,
        prepared_R: Tensor,
    ) -> Tensor:
        """:meth:`sample` with what :meth:`prepare` returned for its rows; nothing waits for the device.

        Args:
            hidden_RC, null_hidden_RC: as in :meth:`sample`.
            guidance: a number, or a tensor of one on the device, whose value a CUDA graph reads at replay.
            prepared_R: rows of what :meth:`prepare` returned, any distance apart.
        """
        if null_hidden_RC is not None:
            if isinstance(guidance, Tensor):
                guidance = guidance.float()
            # null + g (hidden - null), in float32 whatever they are in.
            hidden_RC = torch.lerp(null_hidden_RC.float(), hidden_RC.float(), guidance)
        return self.generator.chain(hidden_RC, prepared_R).float()
