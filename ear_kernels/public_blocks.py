"""timm's pre-norm ViT blocks, as the public EAR and MAR models have them, each as one operation.

A block's weights are read directly only where that is what calling its submodules would do
(:mod:`ear_kernels.runtime.plain`); otherwise, and for an attention mask, timm's own forward runs.
"""

from typing import Any

from torch import Tensor, nn

from ear_kernels.functional import Block, BlockOptions, transformer_block
from ear_kernels.runtime.autograd import is_watched
from ear_kernels.runtime.plain import DTYPES, are_modules_watched, is_plain, runs_forward, work_together

# By submodule, "" the block itself: whose forward it is, and the classes of what that calls.
IDENTITIES = dict.fromkeys(("q_norm", "k_norm", "norm", "ls1", "ls2", "drop_path1", "drop_path2"), nn.Identity)
CALLED: dict[str, tuple[str, dict[str, type[nn.Module]]]] = {
    "": ("", {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm}),
    "attn": (
        "Attention.forward",
        {"qkv": nn.Linear, "proj": nn.Linear, "attn_drop": nn.Dropout, "proj_drop": nn.Dropout},
    ),
    "mlp": (
        "Mlp.forward",
        {"fc1": nn.Linear, "fc2": nn.Linear, "act": nn.GELU, "drop1": nn.Dropout, "drop2": nn.Dropout},
    ),
}


def is_block(module: nn.Module) -> bool:
    """Whether a module runs timm's own ``Block.forward``, over ``Attention`` and ``Mlp``, and can be replaced."""
    return _runs_timms(module, "Block.forward") and plain_leaves(module) is not None


def _runs_timms(module: nn.Module, forward: str) -> bool:
    """Whether the class's forward is that of timm's class of this name, be it inherited."""
    function = type(module).forward
    return function.__qualname__ == forward and function.__module__.partition(".")[0] == "timm"


def plain_leaves(block: nn.Module) -> dict[str, Any] | None:
    """The submodules of :data:`CALLED` of a block, if calling attention, MLP and them is what timm's classes say.

    None if it is not, or there is another submodule. Of the block itself only its children are looked at.
    """
    leaves: dict[str, Any] = {}
    for part, (forward, classes) in CALLED.items():
        owner = block._modules.get(part) if part else block
        if owner is None or (part and not (_runs_timms(owner, forward) and runs_forward(owner))):
            return None
        for name, leaf in owner._modules.items():
            if leaf is None or name in CALLED:
                continue
            wanted = classes.get(name) or IDENTITIES.get(name)
            if wanted is None or not is_plain(leaf, wanted):
                return None
            leaves[name] = leaf
        if not classes.keys() <= leaves.keys():
            return None
    return leaves


def _options(attention: Any, leaves: dict[str, Any]) -> BlockOptions | None:
    """Numbers of a block of these leaves; None if the operation has none like them."""

    def rate(name: str) -> float:
        return leaves[name].p if leaves[name].training else 0.0

    # timm's fused attention asks whether it is itself training, the other one calls its dropout.
    dropped = (
        leaves["attn_drop"].p if attention.training and getattr(attention, "fused_attn", False) else rate("attn_drop")
    )
    dropouts = rate("proj_drop"), rate("drop1"), rate("drop2")
    heads, rows = attention.num_heads, leaves["qkv"].weight.shape[0]
    norms = leaves["norm1"], leaves["norm2"]
    fits = (
        leaves["act"].approximate == "none"
        and max(dropped, *dropouts) < 1
        and rows % (3 * heads) == 0
        and attention.scale == (rows // (3 * heads)) ** -0.5
        and all(norm.bias is not None and len(norm.normalized_shape) == 1 for norm in norms)
    )
    return BlockOptions(heads, dropped, dropouts, (norms[0].eps, norms[1].eps)) if fits else None


def read_block(block: Any, x: Tensor) -> tuple[Block, BlockOptions] | None:
    """What :func:`transformer_block` needs for a call of timm's forward with ``x [B, L, W]``.

    None where reading the weights would not be what timm's forward of the block does.
    """
    if x.ndim != 3 or x.dtype not in DTYPES or are_modules_watched():
        return None
    leaves = plain_leaves(block)
    options = None if leaves is None else _options(block.attn, leaves)
    if leaves is None or options is None:
        return None
    modules = (leaves[name] for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"))
    found = Block(*(tensor for module in modules for tensor in (module.weight, module.bias)))
    dense = all(tensor is None or tensor.is_contiguous() for tensor in found)
    return (found, options) if dense and work_together(x, found) else None


def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """timm's ``Block.forward``: the residual stream ``[B, L, W]`` after the block."""
    is_masked = any(value is not None and value is not False for value in (*others, *named.values()))
    found = None if is_masked or is_watched(x) else read_block(self, x)
    return type(self).forward(self, x, *others, **named) if found is None else transformer_block(x, *found)
