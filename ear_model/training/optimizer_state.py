"""States of AdamW as files hold them: by number there, by name here, every entry compared with its parameter."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ear_model.config import TrainConfig
from ear_model.ear import EAR
from ear_model.errors import shown
from ear_model.tensor_files import WEIGHT_DTYPES
from ear_model.training import optim

Grouping = Literal["paper", "public", "mar"]
MOMENTS = ("exp_avg", "exp_avg_sq")
# Options of AdamW that change what its state means, and are off in the public program and here.
_OFF = ("amsgrad", "maximize", "capturable", "differentiable")


def grouped_names(model: EAR, grouping: Grouping) -> list[list[str]]:
    """Names of the parameters of each group, in the order of their numbers.

    "paper" and "public" as of :func:`ear_model.training.optim.parameter_groups`. "mar", the public MAR code's: (1)
    1-D parameters, biases and all of the score, (2) the others, each in the model's order.
    """
    if grouping == "mar":
        groups: list[list[str]] = [[], []]
        for name, parameter in model.named_parameters():
            plain = parameter.ndim == 1 or name.endswith(".bias") or name.startswith("score.")
            groups[not plain].append(name)
        return groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own_groups = optim.parameter_groups(model, replace(TrainConfig(), parameter_groups=grouping))
    return [[names[id(parameter)] for parameter in group["params"]] for group in own_groups]


def moments_by_name(optimizer: Any, model: EAR, grouping: Grouping, where: str) -> dict[str, dict[str, Tensor]]:
    """An AdamW state of EAR by parameter name; see :func:`checked_moments`.

    Args:
        optimizer: what ``state_dict`` of the optimiser gave, as read from a file.
        model: the model, which may be on the meta device.
        grouping: how its parameters are numbered.
        where: the file, for messages.
    """
    return checked_moments(optimizer, grouped_names(model, grouping), dict(model.named_parameters()), where)


def checked_moments(
    optimizer: Any, expected: list[list[str]], parameters: Mapping[str, Tensor], where: str
) -> dict[str, dict[str, Tensor]]:
    """An AdamW state by parameter name: ``step`` (a float32 scalar), ``exp_avg`` and ``exp_avg_sq`` in float32.

    Args:
        optimizer: what ``state_dict`` of the optimiser gave, as read from a file.
        expected: names of the parameters of each group.
        parameters: of which names and shapes count: they may be on the meta device.
        where: the file, for messages.

    Raises:
        ValueError: groups of other sizes than expected, or options of another optimiser; states
            of unknown parameters, or of some but not of all; entries that are missing, unknown, of another shape than
            their parameter, not floating-point or not finite; steps that are no counts.
    """
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise ValueError(f"{where}: 'optimizer' is no state of a torch optimiser")
    groups, states = optimizer.get("param_groups"), optimizer["state"]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise ValueError(f"{where}: param_groups of 'optimizer' is no list of groups of a torch optimiser")
    if [len(group["params"]) for group in groups] != [len(group) for group in expected]:
        raise ValueError(
            f"{where}: the optimiser has groups of {[len(group['params']) for group in groups]} parameters; "
            f"the model's has {[len(group) for group in expected]}"
        )
    for group in groups:
        _check_options(group, where)
    numbers = [number for group in groups for number in group["params"]]
    if any(type(number) is not int for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"{where}: params of 'optimizer' are no different numbers of parameters")
    unknown = [number for number in states if number not in set(numbers)]
    names = [name for group in expected for name in group]
    missing = [name for number, name in zip(numbers, names, strict=True) if number not in states]
    if unknown or (states and missing):
        raise ValueError(
            f"{where}: the optimiser has no state of {len(missing)} parameters {missing[:3]} and one of "
            f"{len(unknown)} others"
        )
    return {
        name: _entries(states[number], parameters[name], f"of {name}", where)
        for number, name in zip(numbers, names, strict=True)
        if number in states
    }


def _check_options(group: dict[str, Any], where: str) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if name in group and not is_number(group[name]):
            raise ValueError(
                f"{where}: {name} of the optimiser is {shown(group[name])}; a number from 0 on is needed"
            )
    betas = group.get("betas", (0.9, 0.95))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(is_number(b) and b < 1 for b in betas):
        raise ValueError(f"{where}: betas of the optimiser are {shown(betas)}; they must be two numbers in [0, 1)")
    for name in _OFF:
        # By identity first: a comparison with a tensor is a tensor.
        if group.get(name) is not None and group[name] is not False:
            raise ValueError(f"{where}: the optimiser has {name} {shown(group[name])}; it must be off")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _entries(state: Any, parameter: Tensor, of: str, where: str) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise ValueError(f"{where}: the optimiser's state {of} is no dict")
    names = ("step", *MOMENTS)
    unknown = [name for name in state if name not in names]
    # amsgrad's, which some versions write empty.
    if any(state[name] is not None for name in unknown):
        raise ValueError(f"{where}: the optimiser's state {of} holds {shown(unknown[:3])}; AdamW's has {names}")
    entries = {"step": _step(state.get("step"), of, where)}
    for name in MOMENTS:
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
            raise ValueError(f"{where}: {name} {of} has shape {shape}; it must be {tuple(parameter.shape)}")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{where}: {name} {of} is {tensor.dtype}; it must be floating-point")
        entries[name] = tensor.float()
        if not entries[name].isfinite().all() or (name == "exp_avg_sq" and (entries[name] < 0).any()):
            raise ValueError(f"{where}: {name} {of} holds values that no optimiser leaves; the file is damaged")
    return entries


def _step(value: Any, of: str, where: str) -> Tensor:
    # Old versions of torch count in a plain number.
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        number: Any = value.item()
    else:
        number = value
    if not is_number(number) or number != int(number) or number > 2**31:
        raise ValueError(f"{where}: step {of} is {shown(value)}; it must be a count")
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim == 0:
        return value
    return torch.tensor(float(number))


def number_moments(
    moments: dict[str, dict[str, Tensor]], model: EAR, grouping: Grouping
) -> tuple[dict[int, dict[str, Tensor]], list[list[int]]]:
    """The inverse of :func:`moments_by_name`: states by number, and the numbers of each group."""
    groups = grouped_names(model, grouping)
    names = [name for group in groups for name in group]
    states = {index: moments[name] for index, name in enumerate(names) if name in moments}
    numbers = iter(range(len(names)))
    return states, [[next(numbers) for _ in group] for group in groups]
