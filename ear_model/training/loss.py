"""The energy score's loss as a run computes it: with shared noise, part by part, or with its gradients at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.energy import EnergyScore


@dataclass(frozen=True)
class TrainingLoss:
    """In the place of ``score.loss`` (see :meth:`ear_model.ear.EAR.forward`)."""

    score: EnergyScore
    chunks: int = 1
    """Parts of the tokens that the generator takes one after another, backward included."""
    rows_per_noise: int = 1
    """Rows that share a noise vector; 1 is independent noise."""

    def __call__(self, hidden_RC: Tensor, targets_RD: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The loss with noise that is drawn anew, a scalar in float32."""
        return self.with_noise(hidden_RC, targets_RD, self.draw_noise(hidden_RC, draws))

    def draw_noise(self, hidden_RC: Tensor, draws: Draws) -> Tensor:
        """Noise vectors ``[R, num_samples, noise_dim]``."""
        return self.score.draw_noise(hidden_RC.shape[0], self.score.num_samples, like=hidden_RC, draws=draws)

    def with_noise(self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor) -> Tensor:
        """The loss with these noise vectors."""
        if self.chunks > 1 and torch.is_grad_enabled() and hidden_RC.shape[0]:
            return _ChunkedLoss.apply(self, hidden_RC, targets_RD, noise_RnE, *self.score.generator.parameters())
        return self._loss_of(hidden_RC, targets_RD, noise_RnE)

    def _loss_of(self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor) -> Tensor:
        samples = self.score.num_samples
        rows = hidden_RC.shape[0] * samples
        pool = max(samples, rows // self.rows_per_noise) if self.rows_per_noise > 1 else None
        return self.score.loss_of(hidden_RC, targets_RD, noise_RnE, noise_pool=pool)

    def and_gradients(self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor) -> list[Tensor]:
        """The loss with these noise vectors, and at once its gradients, ``chunks`` parts of the tokens in turn.

        Returns:
            The loss, a float32 scalar; the gradient of ``hidden_RC``; those of the generator's parameters that are
            trained, in the order of ``generator.parameters()``.
        """
        count = hidden_RC.shape[0]
        size = -(-count // self.chunks)
        wanted = [parameter for parameter in self.score.generator.parameters() if parameter.requires_grad]
        parts: list[Tensor] = []
        sums: list[Tensor] = []
        total = torch.zeros((), device=hidden_RC.device)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            with torch.enable_grad():
                hidden = hidden_RC[part].detach().requires_grad_()
                loss = self._loss_of(hidden, targets_RD[part], noise_RnE[part])
                if size < count:
                    loss = loss * (hidden.shape[0] / count)
            # A parameter that a wrapper leaves out has a gradient of 0.
            grad_hidden, *gradients = torch.autograd.grad(loss, [hidden, *wanted], materialize_grads=True)
            parts.append(grad_hidden)
            total += loss.detach()
            if sums:
                torch._foreach_add_(sums, gradients)
            else:
                sums = list(gradients)
        return [total, parts[0] if len(parts) == 1 else torch.cat(parts), *sums]


class _ChunkedLoss(torch.autograd.Function):
    """The loss with the generator's gradients taken part by part in the forward pass.

    A token's loss needs nothing of the other tokens, and the loss is the end of the graph. So the generator's
    activations are those of one part, while those of the backbone wait. Backward multiplies by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: TrainingLoss,
        hidden_RC: Tensor,
        targets_RD: Tensor,
        noise_RnE: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        total, *gradients = loss.and_gradients(hidden_RC, targets_RD, noise_RnE)
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
