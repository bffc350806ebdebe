"""Parameter groups, learning-rate schedule and the moving average of the weights (docs/model.md, "Optimiser")."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ear_kernels import FusedAdamW, LowCopies
from ear_model.config import TrainConfig
from ear_model.ear import EAR


def parameter_groups(model: EAR, config: TrainConfig) -> list[dict]:
    """AdamW groups with ``weight_decay`` and ``lr_scale`` (multiplies the scheduled learning rate).

    "paper": (1) 1-D parameters and biases of the backbone: no decay; (2) its other parameters, embeddings and
    positions included: decay; (3) the whole generator: no decay, scaled rate. "public", the grouping of the
    public code: (1) also holds the generator's 1-D parameters and biases, at the full rate. What is not trained,
    such as a codebook, is in none.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    generator: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        one_dimensional = parameter.ndim == 1 or name.endswith(".bias")
        if name.startswith("score.") and not (one_dimensional and config.parameter_groups == "public"):
            generator.append(parameter)
        else:
            (plain if one_dimensional else decayed).append(parameter)
    return [
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": generator, "weight_decay": 0.0, "lr_scale": config.generator_lr_scale},
    ]


def make_optimizer(model: EAR, config: TrainConfig) -> FusedAdamW:
    """AdamW over :func:`parameter_groups`."""
    return FusedAdamW(parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2))


def is_finetuning(step: int, config: TrainConfig) -> bool:
    """Whether step (from 0) belongs to the tau fine-tuning phase at the end of the run."""
    return config.is_finetuning(step)


def tau(step: int, config: TrainConfig) -> float:
    """Weight of the loss's diversity term in step ``step`` (from 0)."""
    return config.tau_of(step)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimiser step ``step`` (from 0): linear warm-up, then constant or cosine to min_lr."""
    if is_finetuning(step, config):
        return config.finetune_lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last = config.steps - config.finetune_steps
    progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class ExponentialMovingAverage:
    """Moving average of the parameters, updated after every optimiser step.

    Args:
        model: the model; the average starts at its weights.
        decay: ``average = decay * average + (1 - decay) * weight``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }
        self._parameters = dict(model.named_parameters())

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The averages under the model's own parameters."""
        return {self._parameters[name]: average for name, average in self.averages.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step, over all parameters at once."""
        parameters: list[Tensor] = [self._parameters[name].detach() for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay)


@torch.no_grad()
def clipped_step(
    optimizer: torch.optim.Optimizer,
    limit: float,
    ema: ExponentialMovingAverage | None = None,
    copies: LowCopies | None = None,
) -> Tensor:
    """Scale the gradients to a norm of at most ``limit``, step and average; returns the norm before (no wait).

    :class:`FusedAdamW` does all of it in one pass, which also writes the 16-bit ``copies``, and leaves the gradients
    as they are. Other optimisers, and gradients spread over processes (FSDP), get a pass for each.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm(gradients)
    norm = total.full_tensor() if isinstance(total, DTensor) else total
    # The inverse of clip_grad_norm_'s factor; NaN stays NaN.
    divisor = ((norm.float() + 1e-6) / limit).clamp(min=1.0)
    if isinstance(optimizer, FusedAdamW) and total is norm:
        averages, decay = (ema.by_parameter(), ema.decay) if ema is not None else ({}, 0.0)
        optimizer.update(divisor, averages, decay, copies=copies, finite=norm.isfinite())
        return norm
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_div_(local, divisor)
    optimizer.step()
    if ema is not None:
        ema.update()
    return norm
