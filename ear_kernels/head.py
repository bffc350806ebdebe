"""Parameters of the MLP generator's residual blocks and final layer, as modules of any class, if these say it all.

The names are those of the public EAR and MAR heads, which :class:`ear_kernels.FusedMLPGenerator` has too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ear_kernels.runtime.plain import is_plain, runs_forward

EPS = 1e-6
"""Of every norm, as the operations over all blocks take it."""

Rule = Callable[[Any, type[nn.Module]], bool]
"""Whether a module is one of this class: :func:`is_plain`, or :func:`is_of_class` to know a head with hooks again."""


def is_of_class(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class and no subclass."""
    return type(module) is kind


def linear_parameters(
    linear: Any, outputs: int | None = None, inputs: int | None = None, rule: Rule = is_plain
) -> list[Tensor] | None:
    """Weight and bias of a linear of these sizes (None: any); None if it has none or is another module."""
    if not rule(linear, nn.Linear):
        return None
    own = linear._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None:
        return None
    rows, columns = weight.shape
    return [weight, bias] if outputs in (None, rows) and inputs in (None, columns) else None


def norm_parameters(norm: Any, width: int, rule: Rule = is_plain) -> list[Tensor] | None:
    """Weight and bias of a layer norm over ``width`` features; None if it has none or is another module."""
    if not rule(norm, nn.LayerNorm) or norm.normalized_shape != (width,):
        return None
    own = norm._parameters
    weight, bias = own.get("weight"), own.get("bias")
    return None if weight is None or bias is None else [weight, bias]


def _children(sequence: Any, kinds: Sequence[type[nn.Module]], rule: Rule) -> list[Any] | None:
    """Modules of an ``nn.Sequential`` if they are of these classes."""
    if not rule(sequence, nn.Sequential):
        return None
    children = list(sequence._modules.values())
    fits = len(children) == len(kinds) and all(map(rule, children, kinds))
    # A SiLU in place changes what was given to it.
    return children if fits and not any(type(child) is nn.SiLU and child.inplace for child in children) else None


def ffn_parameters(mlp: Any, width: int, rule: Rule = is_plain) -> list[Tensor] | None:
    """Weights and biases of a sequence of linear, SiLU and linear, all of this width, else None."""
    children = _children(mlp, (nn.Linear, nn.SiLU, nn.Linear), rule)
    if children is None:
        return None
    first, second = (linear_parameters(child, width, width, rule) for child in children[::2])
    return None if first is None or second is None else first + second


def modulation_parameters(modulation: Any, width: int, count: int, rule: Rule = is_plain) -> list[Tensor] | None:
    """Weight and bias of a sequence of SiLU and a linear to ``count`` times the width, else None."""
    children = _children(modulation, (nn.SiLU, nn.Linear), rule)
    return None if children is None else linear_parameters(children[1], count * width, width, rule)


def _block_parameters(block: Any, width: int, rule: Rule) -> list[Tensor] | None:
    """Of a residual block of nothing but ``in_ln``, ``mlp`` and ``adaLN_modulation``, else None."""
    children = block._modules
    if children.keys() != {"in_ln", "mlp", "adaLN_modulation"} or block._parameters:
        return None
    norm = norm_parameters(children["in_ln"], width, rule)
    ffn = ffn_parameters(children["mlp"], width, rule)
    modulation = modulation_parameters(children["adaLN_modulation"], width, 3, rule)
    if norm is None or ffn is None or modulation is None or children["in_ln"].eps != EPS:
        return None
    return norm + ffn + modulation


def _final_parameters(final: Any, width: int, rule: Rule) -> list[Tensor] | None:
    """Of a final layer of ``adaLN_modulation`` and ``linear``, its norm without parameters, else None."""
    children = final._modules
    if children.keys() - {"norm_final"} != {"linear", "adaLN_modulation"} or final._parameters:
        return None
    norm = children.get("norm_final")
    if norm is not None and not (
        rule(norm, nn.LayerNorm) and norm.normalized_shape == (width,) and norm.eps == EPS and norm.weight is None
    ):
        return None
    modulation = modulation_parameters(children["adaLN_modulation"], width, 2, rule)
    linear = linear_parameters(children["linear"], None, width, rule)
    return None if modulation is None or linear is None else modulation + linear


def head_parameters(net: Any, width: int, rule: Rule = is_plain) -> list[Tensor] | None:
    """Of the blocks and the final layer of a head of this width in the order of ``functional.generator_blocks``.

    None unless these are modules of that structure, all blocks of one class. By the rule :func:`is_plain` they are
    also in the head's mode, and calling them runs their class's ``forward`` alone.
    """
    blocks, final = (net._modules.get(name) for name in ("res_blocks", "final_layer"))
    if type(blocks) is not nn.ModuleList or not blocks._modules or final is None:
        return None
    layers = list(blocks._modules.values())
    if rule is is_plain and not all(
        runs_forward(layer) and layer.training == net.training for layer in [*layers, final]
    ):
        return None
    parts = [_block_parameters(block, width, rule) for block in layers]
    parts.append(_final_parameters(final, width, rule))
    found: list[Tensor] = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found if len({type(block) for block in layers}) == 1 else None
