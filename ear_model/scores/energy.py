"""The energy score (paper section 4.1): an implicit generator trained with the energy loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ear_kernels import FusedEnergyLoss, FusedMLPGenerator
from ear_model.config import ModelConfig


class ChunkedLoss(torch.autograd.Function):
    """The loss with the generator's gradients taken part by part in the forward pass.

    A token's loss needs nothing of the other tokens, and the loss is the end of the graph. So the generator's
    activations are those of one part, while those of the backbone wait. Backward multiplies by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        score: EnergyScore,
        hidden_RC: Tensor,
        targets_RD: Tensor,
        noise_RnE: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        total, *gradients = score.loss_and_gradients(hidden_RC, targets_RD, noise_RnE)
        ctx.save_for_backward(*gradients)
        ctx.trained = [parameter.requires_grad for parameter in parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *sums = ctx.saved_tensors
        scaled = iter(torch._foreach_mul(sums, grad) if sums else ())
        gradients = [next(scaled) if trained else None for trained in ctx.trained]
        return None, grad_hidden * grad, None, None, *gradients


class EnergyScore(nn.Module):
    """The MLP generator and the energy loss over all pairs of ``num_samples`` samples."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.generator = FusedMLPGenerator(
            config.width,
            config.generator_width,
            config.token_dim,
            depth=config.generator_depth,
            noise_dim=config.noise_dim,
        )
        self.energy_loss = FusedEnergyLoss(alpha=config.alpha)
        self.num_samples = config.num_samples
        self.noise = config.noise
        self.rows_per_noise = 1
        """Rows that share a noise vector in training (docs/noise_pool.md); 1 is independent noise."""
        self.loss_chunks = 1
        """Parts of the tokens that the generator takes one after another in training, backward included."""
        self.captured: Any = None

    @property
    def tau(self) -> float:
        """Weight of the diversity term in training; set it to fine-tune (section 4.3)."""
        return self.energy_loss.tau

    @tau.setter
    def tau(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"tau is {value}; it must be in (0, 1]")
        self.energy_loss.tau = value

    def draw_noise(self, *shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise vectors ``[*shape, noise_dim]``: uniform on [-0.5, 0.5), or standard normal."""
        full_shape = (*shape, self.generator.noise_dim)
        if self.noise == "gaussian":
            return torch.randn(full_shape, device=like.device, generator=generator)
        return torch.rand(full_shape, device=like.device, generator=generator) - 0.5

    def loss(self, hidden_RC: Tensor, targets_RD: Tensor) -> Tensor:
        """The energy loss of paper Eq. 10 over all pairs of samples, a scalar in float32."""
        noise_RnE = self.draw_noise(hidden_RC.shape[0], self.num_samples, like=hidden_RC)
        if torch.is_grad_enabled() and hidden_RC.shape[0]:
            if self.captured is not None and self.training and self.captured.takes(hidden_RC):
                return self.captured.replay(hidden_RC, targets_RD, noise_RnE)
            if self.loss_chunks > 1:
                return ChunkedLoss.apply(self, hidden_RC, targets_RD, noise_RnE, *self.generator.parameters())
        return self.loss_of(hidden_RC, targets_RD, noise_RnE)

    def loss_and_gradients(self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor) -> list[Tensor]:
        """The loss with these noise vectors, and at once its gradients, ``loss_chunks`` parts of the tokens in turn.

        Returns:
            The loss, a float32 scalar; the gradient of ``hidden_RC``; those of the generator's parameters that are
            trained, in the order of ``generator.parameters()``.
        """
        count = hidden_RC.shape[0]
        size = -(-count // self.loss_chunks)
        wanted = [parameter for parameter in self.generator.parameters() if parameter.requires_grad]
        parts: list[Tensor] = []
        sums: list[Tensor] = []
        total = torch.zeros((), device=hidden_RC.device)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            with torch.enable_grad():
                hidden = hidden_RC[part].detach().requires_grad_()
                loss = self.loss_of(hidden, targets_RD[part], noise_RnE[part])
                if size < count:
                    loss = loss * (hidden.shape[0] / count)
            grad_hidden, *gradients = torch.autograd.grad(loss, [hidden, *wanted])
            parts.append(grad_hidden)
            total += loss.detach()
            if sums:
                torch._foreach_add_(sums, gradients)
            else:
                sums = list(gradients)
        return [total, parts[0] if len(parts) == 1 else torch.cat(parts), *sums]

    def loss_of(self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor) -> Tensor:
        """The loss with these noise vectors ``[R, num_samples, noise_dim]``."""
        rows = hidden_RC.shape[0] * self.num_samples
        pool = max(self.num_samples, rows // self.rows_per_noise) if self.rows_per_noise > 1 else None
        return self.energy_loss(self.generator(hidden_RC, noise_RnE, noise_pool=pool), targets_RD)

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Tokens ``[R, D]`` in float32 from guided hidden states ``g h_class + (1 - g) h_null``."""
        if null_hidden_RC is not None:
            hidden_RC = guidance * hidden_RC + (1 - guidance) * null_hidden_RC
        noise_RE = self.draw_noise(hidden_RC.shape[0], like=hidden_RC, generator=generator)
        return self.generator(hidden_RC, noise_RE, temperature).float()
