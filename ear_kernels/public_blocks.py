"""timm's pre-norm ViT blocks, as the public EAR and MAR models have them, each as one operation.

A block's weights are read directly only where that is what calling its submodules would do; this is asked at every
call, and wherever it is not so (a hook, a LoRA layer, a parametrisation, an attention mask, ...) timm's own forward
runs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ear_kernels.functional import Block, BlockOptions, transformer_block
from ear_kernels.runtime.autograd import is_watched

# By submodule, "" the block itself: whose forward it is, and the classes of what that calls.
IDENTITIES = dict.fromkeys(("q_norm", "k_norm", "norm", "ls1", "ls2", "drop_path1", "drop_path2"), nn.Identity)
CALLED: dict[str, tuple[str, dict[str, type[nn.Module]]]] = {
    "": ("Block.forward", {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm}),
    "attn": (
        "Attention.forward",
        {"qkv": nn.Linear, "proj": nn.Linear, "attn_drop": nn.Dropout, "proj_drop": nn.Dropout},
    ),
    "mlp": (
        "Mlp.forward",
        {"fc1": nn.Linear, "fc2": nn.Linear, "act": nn.GELU, "drop1": nn.Dropout, "drop2": nn.Dropout},
    ),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_block(module: nn.Module) -> bool:
    """Whether a module runs timm's own ``Block.forward``, over ``Attention`` and ``Mlp``, and can be replaced."""
    return "forward" not in vars(module) and _leaves(module) is not None


def _runs_timms(module: nn.Module, forward: str) -> bool:
    """Whether the class's forward is that of timm's class of this name, be it inherited."""
    function = type(module).forward
    return function.__qualname__ == forward and function.__module__.partition(".")[0] == "timm"


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs its ``forward`` and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks


def is_only_forward(module: nn.Module) -> bool:
    """Whether calling a module is its class's ``forward``: no hook, no forward on the instance."""
    return has_no_hooks(module) and "forward" not in module.__dict__


def _leaves(block: nn.Module) -> dict[str, Any] | None:
    """The submodules of :data:`CALLED` if calling them is what their classes say and there is no other, or None."""
    leaves: dict[str, Any] = {}
    for part, (forward, classes) in CALLED.items():
        owner = block._modules.get(part) if part else block
        if owner is None or not _runs_timms(owner, forward) or (part and not is_only_forward(owner)):
            return None
        for name, leaf in owner._modules.items():
            if leaf is None or name in CALLED:
                continue
            wanted = classes.get(name) or IDENTITIES.get(name)
            if type(leaf) is not wanted or not is_only_forward(leaf):
                return None
            leaves[name] = leaf
        if not classes.keys() <= leaves.keys():
            return None
    return leaves


def _work_together(x: Tensor, block: Block) -> bool:
    """Whether these parameters are plain tensors that work together with ``x [B, L, W]``, autocast or not."""
    if x.ndim != 3 or x.dtype not in DTYPES:
        return False
    mixed = torch.is_autocast_enabled(x.device.type)
    return all(
        type(parameter) in (nn.Parameter, Tensor)
        and parameter.device == x.device
        and (parameter.dtype in DTYPES if mixed else parameter.dtype == x.dtype)
        and parameter.is_contiguous()
        for parameter in block
        if parameter is not None
    )


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


def _read(self: Any, x: Tensor) -> tuple[Block, BlockOptions] | None:
    """What :func:`transformer_block` needs for a call with ``x``; None where it would not be what timm does."""
    if is_watched(x) or _has_any_global_hook():
        return None
    leaves = _leaves(self)
    options = None if leaves is None else _options(self.attn, leaves)
    if leaves is None or options is None:
        return None
    modules = (leaves[name] for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"))
    block = Block(*(tensor for module in modules for tensor in (module.weight, module.bias)))
    return (block, options) if _work_together(x, block) else None


def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """timm's ``Block.forward``: the residual stream ``[B, L, W]`` after the block."""
    is_masked = any(value is not None and value is not False for value in (*others, *named.values()))
    found = None if is_masked else _read(self, x)
    return type(self).forward(self, x, *others, **named) if found is None else transformer_block(x, *found)
