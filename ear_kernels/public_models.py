"""Put fused head, loss and transformer blocks into a public EAR, MAR or CALM model, in place, copying no parameter.

A model is recognised by the names and shapes of its head's submodules (``docs/accelerate.md``), never by its class:
nothing of the public code is imported. Submodules keep their names and their ``nn.Parameter`` objects, so state
dicts, optimisers, EMA copies and hooks go on working; only ``forward`` methods are replaced, on the instances.
"""

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from ear_kernels import functional, public_blocks
from ear_kernels.head import Rule, head_parameters, is_of_class, linear_parameters
from ear_kernels.runtime.plain import (
    are_modules_watched,
    is_plain,
    is_replaced,
    replace_method,
    runs_forward,
    work_together,
)

PLUGINS = "ear_kernels.accelerate"
"""Entry points of what other packages replace: called with each module, they return what they did or None."""


class UnknownModelError(ValueError):
    """The model has no head that :func:`accelerate` knows."""


@dataclass(frozen=True)
class Replaced:
    """What :func:`accelerate` did: the model's kind and, by module path, what each replaced method does now."""

    kind: str
    methods: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"accelerated {self.kind}:", *(f"  {path}: {what}" for path, what in self.methods.items())]
        return "\n".join(lines)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path (digits index sequences), or None."""
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _head_parameters(net: nn.Module, rule: Rule = is_plain) -> list[Tensor] | None:
    """:func:`head_parameters` of a net whose ``input_proj`` says the width."""
    stream: Any = _child(net, "input_proj")
    if not isinstance(stream, nn.Module) or (rule is is_plain and are_modules_watched()):
        return None
    # A wrapped linear of the input is called.
    width = getattr(stream, "out_features", None)
    return head_parameters(net, width, rule) if isinstance(width, int) else None


def _is_linear(net: nn.Module, path: str, inputs: int | None = None) -> bool:
    """Whether there is a linear at a path, with these inputs, or any."""
    return linear_parameters(_child(net, path), None, inputs, is_of_class) is not None


def _run_blocks(
    net: nn.Module,
    parameters: list[Tensor],
    hidden: Tensor,
    conditioning: Tensor,
    temperature: Any = 1.0,
    index: Tensor | None = None,
) -> Tensor:
    """Blocks and final layer of a recognised net over rows ``[R, W]``."""
    factor = _shift_factor(net, temperature)
    return functional.generator_blocks(hidden, conditioning, parameters, index=index, temperature=factor)


def _shift_factor(net: nn.Module, temperature: Any) -> float:
    """What a net multiplies its shifts by: its temperature, but 1 in training."""
    if net.training:
        return 1.0
    return float(temperature.item() if isinstance(temperature, Tensor) else temperature)


# ------------------------------------------------------------------------------------------------- EAR


def _ear_net_forward(self: nn.Module, z: Tensor, noise: Tensor, infer_temperature: Any = 1.0) -> Tensor:
    """Rows of hidden states and noise to tokens, as the public net's ``forward``."""
    parameters = _head_parameters(self)
    if parameters is None or not work_together(z, parameters):
        return type(self).forward(self, z, noise, infer_temperature)
    leading = z.shape[:-1]
    z, noise = z.reshape(-1, z.shape[-1]), noise.reshape(-1, noise.shape[-1])
    first, second = (linear_parameters(linear) for linear in (self.noise_embed, self.input_proj))
    out = None
    if first is not None and second is not None and work_together(z, first + second):
        factor = _shift_factor(self, infer_temperature)
        out = functional.generator_few_rows(z, noise, first + second, parameters, temperature=factor)
    if out is None:
        hidden, conditioning = self.input_proj(z), self.noise_embed(noise)  # type: ignore[operator]
        out = _run_blocks(self, parameters, hidden, conditioning, infer_temperature)
    return out.view(*leading, out.shape[-1])


def plain_head(loss: nn.Module, z: Tensor) -> list[Tensor] | None:
    """:func:`_head_parameters` of a loss's net if calling the net is no more than that either.

    The linears of the input are called for other rows than in the public code: they must be plain, too.
    """
    net: Any = loss.net
    inputs = linear_parameters(net.noise_embed), linear_parameters(net.input_proj)
    parameters = _head_parameters(net) if runs_forward(net) and None not in inputs else None
    return parameters if parameters is not None and work_together(z, parameters) else None


def _ear_samples(loss: nn.Module, parameters: list[Tensor], z: Tensor, noise: Tensor) -> Tensor:
    """``z [M, C]``, ``noise [M, n, noise_channels]`` -> ``[M, n, D]``: z is projected once for its n samples."""
    net = loss.net
    assert isinstance(net, nn.Module)
    rows, samples, channels = noise.shape
    index = torch.arange(rows * samples, dtype=torch.int32, device=z.device) // samples
    conditioning = net.noise_embed(noise.reshape(-1, channels))  # type: ignore[operator]
    out = _run_blocks(net, parameters, net.input_proj(z), conditioning, index=index)  # type: ignore[operator]
    return out.view(rows, samples, out.shape[-1])


def _draw(loss: nn.Module, rows: int, like: Tensor) -> Tensor:
    """Noise for two samples of each row, ``[2, rows, noise_channels]``: the public code's draw, number for number."""
    channels = int(loss.noise_channels)  # type: ignore[arg-type]
    noise = torch.rand((2 * rows, channels), dtype=like.dtype, device=like.device) - 0.5
    return noise.view(2, rows, -1)


def _ear_energy(loss: nn.Module, sample: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The public loss; a mask that is not bool weighs, and what it weighs with 0 has no gradient."""
    alpha, tau = float(loss.alpha), float(loss.train_temperature)  # type: ignore[arg-type]
    weights = None
    if mask is not None and mask.dtype != torch.bool:
        weights = mask if mask.is_floating_point() else mask.float()
    return functional.energy_loss(sample, target, mask, alpha=alpha, tau=tau, weights=weights)


def _takes(loss: nn.Module, mask: Tensor | None) -> bool:
    """Whether the operation has these options and a mask like this one."""
    in_range = 0 < float(loss.alpha) <= 2 and 0 < float(loss.train_temperature) <= 1  # type: ignore[arg-type]
    return in_range and (mask is None or not mask.requires_grad)


def _ear_loss_forward(self: nn.Module, target: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """The public training loss: two samples a row, masked mean of the energy loss."""
    parameters = plain_head(self, z) if _takes(self, mask) else None
    if parameters is None:
        return type(self).forward(self, target=target, z=z, mask=mask)
    noise = _draw(self, z.shape[0], z).transpose(0, 1)
    return _ear_energy(self, _ear_samples(self, parameters, z, noise), target, mask)


def _ear_model_forward_loss(self: nn.Module, z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The public model's loss on the masked tokens alone, each projected once for all of its samples.

    The public code runs the head on every token and multiplies the others by 0: the value is the same.
    """
    loss, repeats = self.scoreloss, int(self.score_batch_mul)  # type: ignore[arg-type]
    assert isinstance(loss, nn.Module)
    parameters = plain_head(loss, z) if runs_forward(loss) and _takes(loss, mask) else None
    if parameters is None:
        return type(self).forward_loss(self, z=z, target=target, mask=mask)  # type: ignore[attr-defined]
    z, target, mask = z.reshape(-1, z.shape[-1]), target.reshape(-1, target.shape[-1]), mask.reshape(-1)
    rows = z.shape[0]
    noise = _draw(loss, repeats * rows, z).view(2, repeats, rows, -1)
    keep = mask.nonzero().squeeze(1)
    noise = noise[:, :, keep].permute(2, 1, 0, 3)  # [masked, repeats, 2, noise_channels]
    sample = _ear_samples(loss, parameters, z[keep], noise.reshape(keep.shape[0], 2 * repeats, -1))
    sample = sample.view(keep.shape[0], repeats, 2, sample.shape[-1])
    weights = None if mask.dtype == torch.bool else mask[keep].unsqueeze(1)
    return _ear_energy(loss, sample, target[keep].unsqueeze(1).expand(-1, repeats, -1), weights)


def _is_ear_model(module: nn.Module) -> bool:
    loss = _child(module, "scoreloss")
    return (
        loss is not None
        and _is_ear_loss(loss)
        and callable(getattr(module, "forward_loss", None))
        and isinstance(getattr(module, "score_batch_mul", None), int)
    )


def _is_ear_loss(module: nn.Module) -> bool:
    net = _child(module, "net")
    return (
        net is not None
        and _is_linear(net, "noise_embed", getattr(module, "noise_channels", -1))
        and _is_linear(net, "input_proj")
        and all(hasattr(module, name) for name in ("alpha", "train_temperature"))
        and _takes(module, None)
        and _head_parameters(net, is_of_class) is not None
    )


# ------------------------------------------------------------------------------------------------- MAR


def _mar_net_forward(self: nn.Module, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Noisy tokens, times and conditions to the predicted noise and variance range, as the public ``forward``."""
    parameters = _head_parameters(self)
    if parameters is None or not work_together(x, parameters):
        return type(self).forward(self, x, t, c)
    conditioning = self.time_embed(t) + self.cond_embed(c)  # type: ignore[operator]
    return _run_blocks(self, parameters, self.input_proj(x), conditioning)  # type: ignore[operator]


def _is_mar_loss(module: nn.Module) -> bool:
    net = _child(module, "net")
    names = ("input_proj", "cond_embed", "time_embed.mlp.0", "time_embed.mlp.2")
    is_mar = net is not None and all(_is_linear(net, name) for name in names)
    return is_mar and _head_parameters(net, is_of_class) is not None  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- CALM


def _calm_energy_score(self: nn.Module, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """CALM's energy score of ``x [n, rows, D]`` against targets from N(mean, exp(log_std)^2): minus the energy loss.

    100 targets a row, samples first, as in the public code; alpha is its ``beta``.
    """
    beta = float(self.beta)  # type: ignore[arg-type]
    if is_replaced(self, "distance") or not 0 < beta <= 2 or x.shape[0] < 2:
        return type(self).energy_score(self, x, mean, log_std)  # type: ignore[attr-defined]
    targets = mean + torch.exp(log_std) * torch.randn((100, *mean.shape), device=mean.device)
    return -functional.energy_loss(x, targets, alpha=beta, sample_dim=0, target_dim=0, reduction="none")


def _is_calm(module: nn.Module) -> bool:
    head = _child(module, "generative_head")
    return (
        head is not None
        and callable(getattr(module, "energy_score", None))
        and hasattr(module, "beta")
        and _child(module, "transformer") is not None
        and 0 < float(module.beta) <= 2  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> Replaced:
    """Replace head, loss and timm blocks of a public model in place by the fused operations.

    Args:
        model: an instance of the public EAR model (``scoreloss``), MAR model (``diffloss``), or CALM energy
            Transformer (``generative_head`` and ``energy_score``), or a module that contains one.

    Returns:
        What was replaced; print it.

    Raises:
        TypeError: ``model`` is no module. UnknownModelError: nothing in it is recognised; it is left untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    kinds: list[str] = []
    methods: dict[str, str] = {}
    found: list[tuple[nn.Module, str, Any]] = []

    def add(module: Any, name: str, function: Any, path: str, what: str) -> None:
        """Note a method to replace, but for one that somebody has replaced on the instance."""
        if not is_replaced(module, name):
            found.append((module, name, function))
            methods[path] = what

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if _is_ear_model(module):
            add(
                module,
                "forward_loss",
                _ear_model_forward_loss,
                f"{prefix}forward_loss",
                "masked tokens only, each projected once",
            )
        if _is_ear_loss(module):
            kinds.append("EAR")
            add(module, "forward", _ear_loss_forward, f"{prefix}forward", "fused energy loss, one projection a row")
            add(module.net, "forward", _ear_net_forward, f"{prefix}net.forward", "fused MLP generator")
        elif _is_mar_loss(module):
            kinds.append("MAR")
            what = "fused MLP blocks and final layer (the diffusion loss is unchanged)"
            add(module.net, "forward", _mar_net_forward, f"{prefix}net.forward", what)
        elif _is_calm(module):
            kinds.append("CALM")
            what = "fused energy score, 100 Gaussian targets a row"
            add(module, "energy_score", _calm_energy_score, f"{prefix}energy_score", what)
    if not kinds:
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise UnknownModelError(
            f"{type(model).__name__} is not a model that accelerate() knows: no submodule has the public EAR score "
            "loss (net.{noise_embed, input_proj, res_blocks, final_layer}, alpha, train_temperature, "
            "noise_channels), the MAR diffusion loss (net.{time_embed, cond_embed, input_proj, res_blocks, "
            "final_layer}) or CALM's energy Transformer (generative_head, transformer, energy_score, beta). "
            f"Its children: {children}. It was left untouched."
        )
    for path, module in model.named_modules():
        if public_blocks.is_block(module):
            blocks = f"{path.rpartition('.')[0] or path}.*.forward"
            add(module, "forward", public_blocks.forward, blocks, "each timm block is one operation")
    for module, name, function in found:
        replace_method(module, name, function)
    for entry in entry_points(group=PLUGINS):
        for path, module in model.named_modules():
            done = entry.load()(module)
            if done:
                methods[f"{path}.{entry.name}" if path else entry.name] = done
    return Replaced(" and ".join(dict.fromkeys(kinds)), methods)


__all__ = ["Replaced", "UnknownModelError", "accelerate"]
