"""A whole pre-norm transformer block as one function: shapes, dtypes, checks, errors."""

import torch
from torch import Tensor

from ear_kernels.ops.transformer import functional, reference
from ear_kernels.ops.transformer.reference import Block, BlockOptions
from ear_kernels.runtime.checks import check_device, check_floating, takes_tensors

BIASES = ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias")
"""What a block may have as None."""


@takes_tensors
def transformer_block(x: Tensor, block: Block, options: BlockOptions) -> Tensor:
    """``x + dropout(attention(LN(x)))``, and the same of ``MLP = Linear(dropout(GELU(Linear)))`` after it.

    Args:
        x: ``[B, L, W]``, the residual stream.
        block: parameters, see :class:`Block` for their shapes.
        options: see :class:`BlockOptions`. Dropout draws from torch's generator; the Triton path rounds the
            probabilities of ``dropouts`` to 1 / 65536 and scales by the rounded ones.

    Returns:
        ``[B, L, W]`` in the promoted dtype of x and of what the linears return: the autocast dtype under autocast.
        Float32 without autocast, heads wider than 80 and torch.compile take the reference.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check(x, block, options)
    dtype = functional._attention_dtype(x, block.qkv_weight, block.qkv_bias, options.heads)
    if dtype is None or x.shape[-1] < 2 or not functional._kernels_take("self_attention", x, *block):
        return reference.transformer_block(x, block, options)
    from ear_kernels.ops.transformer.autograd_block import Dropout, Options, TransformerBlock

    seeds: tuple[Tensor | None, ...] = (None, None, None)
    if any(options.dropouts):
        seeds = torch.randint(2**31, (3, 1), device=x.device).unbind()
    dropouts = [Dropout.of(rate, seed, x.device) for rate, seed in zip(options.dropouts, seeds, strict=True)]
    # Asked here: inside an autograd function gradients are always off, and needs_input_grad ignores no_grad.
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *block))
    stream = x.to(torch.promote_types(dtype, x.dtype)).contiguous()
    drawn = Options(options.heads, options.attention_dropout, dropouts, options.eps, dtype, save)
    # The kernels read vectors that are dense in memory; any matrix will do for a product.
    dense = (each.contiguous() if each is not None and each.ndim == 1 else each for each in block)
    return TransformerBlock.apply(stream, drawn, *dense)


def _check(x: Tensor, block: Block, options: BlockOptions) -> None:
    if not isinstance(block, Block):
        raise TypeError(f"block is a {type(block).__name__}; it must be a Block")
    for name, tensor in zip(Block._fields, block, strict=True):
        if tensor is not None or name not in BIASES:
            check_floating(name, tensor)
    functional._check_qkv(x, block.qkv_weight, block.qkv_bias, options.heads)
    for rate in (options.attention_dropout, *options.dropouts):
        functional._check_dropout(rate)
    width, rows, inner = x.shape[2], block.qkv_weight.shape[0] // 3, tuple(block.fc1_weight.shape[:1])
    vector = (width,)
    shapes = {"proj_weight": (width, rows), "fc1_weight": (*inner, width), "fc1_bias": inner}
    shapes |= {"fc2_weight": (width, *inner), "qkv_weight": (3 * rows, width), "qkv_bias": (3 * rows,)}
    for name, tensor in zip(Block._fields, block, strict=True):
        if tensor is not None:
            check_device(name, tensor, x, "x")
            wanted = shapes.get(name, vector)
            if tensor.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {list(wanted)}")
