"""What people do to modules of a model: adapters, computed weights, quantised layers, hooks; each changes results."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

Spoiler = Callable[[nn.Module, str], object]


def lora(model: nn.Module, path: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[path], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def old_weight_norm(model: nn.Module, path: str) -> None:
    linear = model.get_submodule(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(linear)
    # Another weight than the last one computed.
    with torch.no_grad():
        linear.weight_g.mul_(2)


def weight_norm(model: nn.Module, path: str) -> None:
    linear = parametrizations.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2)


def pruned(model: nn.Module, path: str) -> None:
    linear = model.get_submodule(path)
    prune.l1_unstructured(linear, "weight", 0.5)
    with torch.no_grad():
        linear.weight_orig.mul_(2)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrised(model: nn.Module, path: str) -> None:
    parametrize.register_parametrization(model.get_submodule(path), "bias", Doubled())


class Rounded(nn.Linear):
    """What a quantised linear is to a caller: the class of a linear, weights in other units."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.25 * self.weight, self.bias)


def quantised(model: nn.Module, path: str) -> None:
    linear = model.get_submodule(path)
    linear.__class__ = Rounded


LINEAR: dict[str, Spoiler] = {
    "peft LoRA": lora,
    "old weight norm": old_weight_norm,
    "weight norm": weight_norm,
    "prune": pruned,
    "parametrize": parametrised,
    "quantised": quantised,
}
"""For a linear."""


def scaled_forward(model: nn.Module, path: str) -> None:
    module = model.get_submodule(path)
    inner = module.forward
    module.forward = lambda *inputs, **named: 2 * inner(*inputs, **named)


def hook(model: nn.Module, path: str) -> object:
    return model.get_submodule(path).register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(model: nn.Module, path: str) -> object:
    return model.get_submodule(path).register_forward_pre_hook(
        lambda module, inputs: (inputs[0].square(), *inputs[1:])
    )


def backward_hook(model: nn.Module, path: str) -> object:
    def double(module, inputs, outputs):
        return tuple(None if each is None else 2 * each for each in inputs)

    return model.get_submodule(path).register_full_backward_hook(double)


def backward_pre_hook(model: nn.Module, path: str) -> object:
    return model.get_submodule(path).register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))


ANY: dict[str, Spoiler] = {
    "hook": hook,
    "pre-hook": pre_hook,
    "backward hook": backward_hook,
    "backward pre-hook": backward_pre_hook,
    "forward on the instance": scaled_forward,
}
"""For any module."""
