"""The memory-bound parts of a pre-norm transformer block as functions: shapes, dtypes, checks, errors.

Under torch.compile they are the plain operations, which inductor fuses by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.ops.transformer import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, compute_dtype, kernel_refusal
from ear_kernels.runtime.launching import processor


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    eps: float = 1e-6,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``x = residual + dropout(branch + branch_bias)`` and ``LN(x)``: between the halves of pre-norm blocks.

    Args:
        branch: ``[..., W]``, what attention or MLP made.
        residual: ``[..., W]``, the residual stream.
        weight, bias: the norm's parameters, ``[W]``.
        branch_bias: ``[W]`` or None: the bias of the linear that made ``branch``, left out there, so that its
            gradient costs no pass of its own.
        dropout: probability that an element of ``branch`` is dropped, in [0, 1). The Triton path rounds it to
            1 / 65536 and scales by the rounded one.
        eps: of the norm.
        seed: int64 ``[1]`` on the same device, what the Triton path draws from; None draws one from torch's
            generator. The reference always draws from torch's generator.
        dtype: of ``LN(x)``; None is the autocast dtype where autocast is on and that of ``branch`` otherwise.
            The reference returns what ``F.layer_norm`` does.

    Returns:
        ``x`` in the promoted dtype of branch and residual, and ``LN(x)``, both ``[..., W]``.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_add_norm(branch, residual, weight, bias, branch_bias, dropout)
    if not torch.compiler.is_compiling() and residual.shape[-1] > 1:
        reason = _refusal(residual, branch, weight, bias, branch_bias)
        if applies("dropout_add_layer_norm", residual, reason):
            from ear_kernels.ops.transformer.autograd import Dropout, DropoutAddLayerNorm

            x, out = DropoutAddLayerNorm.apply(
                *_rows(branch, branch_bias, residual),
                weight,
                bias,
                Dropout.of(dropout, seed, residual.device),
                eps,
                dtype or compute_dtype(branch),
            )
            return x.view(residual.shape), out.view(residual.shape)
    return reference.dropout_add_layer_norm(branch, residual, weight, bias, branch_bias, dropout, eps)


def gelu_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``Linear(dropout(GELU(Linear(x))))``, GELU the exact one.

    Args:
        x: ``[..., W]``.
        weight_in, bias_in: ``[V, W]`` and ``[V]`` or None.
        weight_out, bias_out: ``[U, V]`` and ``[U]`` or None.
        dropout, seed: as for :func:`dropout_add_layer_norm`.

    Returns:
        ``[..., U]`` in the autocast dtype, or in the promoted dtype without autocast.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_mlp(x, weight_in, bias_in, weight_out, bias_out)
    _check_dropout(dropout)
    tensors = (weight_in, bias_in, weight_out, bias_out)
    if not torch.compiler.is_compiling() and applies("gelu_mlp", x, _refusal(x, *tensors)):
        from ear_kernels.ops.transformer.autograd import Dropout, GeluMLP

        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x, *tensors))
        out = GeluMLP.apply(rows, *tensors, Dropout.of(dropout, seed, x.device))
        return out.view(*x.shape[:-1], weight_out.shape[0])
    return reference.gelu_mlp(x, weight_in, bias_in, weight_out, bias_out, dropout)


def qkv_heads(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of multi-head attention from one linear.

    Args:
        x: ``[B, L, W]``.
        weight, bias: ``[3 heads D, W]``, the rows as (query, key, value), (head), (feature), and ``[3 heads D]`` or
            None.
        heads: number of heads H.

    Returns:
        Three ``[B, H, L, D]``, strided, in the autocast dtype, or in the promoted dtype without autocast.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer tensors.
    """
    _check_qkv(x, weight, bias, heads)
    if not torch.compiler.is_compiling() and applies("qkv_heads", x, _refusal(x, weight, bias)):
        from ear_kernels.ops.transformer.autograd import QKVHeads

        return QKVHeads.apply(x.to(compute_dtype(x, weight, bias)), weight, bias, heads)
    return reference.qkv_heads(x, weight, bias, heads)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``, as ``F.linear`` without a bias, but under autocast the weight's gradient is never rounded.

    Args:
        x: ``[..., C]``.
        weight: ``[W, C]``.

    Returns:
        ``[..., W]`` in the autocast dtype, or in the promoted dtype without autocast.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer tensors.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        check_floating(name, tensor)
        check_device(name, tensor, x, "x")
    if weight.ndim != 2 or x.ndim < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [W, {x.shape[-1]}]")
    if not torch.compiler.is_compiling() and applies("project", x, _refusal(x, weight)):
        from ear_kernels.ops.transformer.autograd import Linear

        out = Linear.apply(x.reshape(-1, x.shape[-1]).to(compute_dtype(x, weight)), weight)
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


def self_attention(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, *, dropout: float = 0.0) -> Tensor:
    """Bidirectional multi-head self-attention with dropout of its weights, without the output linear.

    Args:
        x, weight, bias, heads: as for :func:`qkv_heads`.
        dropout: probability that an attention weight is dropped, in [0, 1); drawn from torch's generator.

    Returns:
        ``[B, L, heads D]``, the heads' results side by side, in the autocast dtype, or in the promoted dtype without
        autocast. Float32, heads wider than 80 and torch.compile take PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_dropout(dropout)
    _check_qkv(x, weight, bias, heads)
    if not torch.compiler.is_compiling():
        dtype = compute_dtype(x, weight, bias)
        fits = _attention_fits(x, weight.shape[0] // (3 * heads), heads, dtype)
        if fits and applies("self_attention", x, _refusal(x, weight, bias)):
            from ear_kernels.ops.transformer.autograd import SelfAttention

            return SelfAttention.apply(x.to(dtype), weight, bias, heads, dropout)
    query, key, value = qkv_heads(x, weight, bias, heads)
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


def norm_self_attention(
    branch: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    eps: float = 1e-6,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dropout_add_layer_norm` and :func:`self_attention` of what it gives: the first half of a pre-norm block.

    Joined they keep less for backward: the normed rows in the compute dtype, not the residual stream and ``LN(x)``.

    Args:
        branch, residual: ``[B, L, W]``.
        norm_weight, norm_bias, branch_bias, dropout, eps, seed: as ``weight`` and so on of
            :func:`dropout_add_layer_norm`.
        weight, bias, heads, attention_dropout: as for :func:`self_attention`.

    Returns:
        ``x = residual + dropout(branch + branch_bias)`` and the heads' results ``[B, L, heads D]``.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_add_norm(branch, residual, norm_weight, norm_bias, branch_bias, dropout)
    _check_dropout(attention_dropout)
    _check_qkv(residual, weight, bias, heads)
    if not torch.compiler.is_compiling() and residual.shape[-1] > 1:
        dtype = compute_dtype(branch, weight, bias)
        reason = _refusal(residual, branch, norm_weight, norm_bias, branch_bias, weight, bias)
        fits = _attention_fits(residual, weight.shape[0] // (3 * heads), heads, dtype)
        if fits and applies("self_attention", residual, reason):
            from ear_kernels.ops.transformer.autograd_halves import Dropout, NormSelfAttention

            options = Dropout.of(dropout, seed, residual.device), eps
            x, out = NormSelfAttention.apply(
                *_rows(branch, branch_bias, residual), norm_weight, norm_bias, *options,
                weight, bias, heads, attention_dropout, residual.shape[0], dtype,
            )  # fmt: skip
            return x.view(residual.shape), out.view(*residual.shape[:2], weight.shape[0] // 3)
    x, normed = dropout_add_layer_norm(
        branch, residual, norm_weight, norm_bias, branch_bias, dropout=dropout, eps=eps, seed=seed
    )
    return x, self_attention(normed, weight, bias, heads, dropout=attention_dropout)


def norm_gelu_mlp(
    branch: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    dropout: float = 0.0,
    eps: float = 1e-6,
    seeds: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """:func:`dropout_add_layer_norm` and :func:`gelu_mlp` of what it gives: the second half of a pre-norm block.

    Joined they keep less for backward: the normed rows in the compute dtype, not the residual stream and ``LN(x)``.

    Args:
        branch, residual: ``[..., W]``.
        norm_weight, norm_bias, branch_bias, eps: as ``weight`` and so on of :func:`dropout_add_layer_norm`.
        weight_in, bias_in, weight_out, bias_out: as for :func:`gelu_mlp`.
        dropout: of both.
        seeds: the norm's and the MLP's.

    Returns:
        ``x = residual + dropout(branch + branch_bias)``, ``[..., W]``, and the MLP's output ``[..., U]``.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_add_norm(branch, residual, norm_weight, norm_bias, branch_bias, dropout)
    _check_mlp(residual, weight_in, bias_in, weight_out, bias_out)
    if not torch.compiler.is_compiling() and residual.shape[-1] > 1:
        linears = (weight_in, bias_in, weight_out, bias_out)
        reason = _refusal(residual, branch, norm_weight, norm_bias, branch_bias, *linears)
        if applies("gelu_mlp", residual, reason):
            from ear_kernels.ops.transformer.autograd_halves import Dropout, NormGeluMLP

            first, second = (Dropout.of(dropout, seed, residual.device) for seed in seeds)
            x, out = NormGeluMLP.apply(
                *_rows(branch, branch_bias, residual), norm_weight, norm_bias, first, eps,
                *linears, second, compute_dtype(branch, *linears),
            )  # fmt: skip
            return x.view(residual.shape), out.view(*residual.shape[:-1], weight_out.shape[0])
    x, normed = dropout_add_layer_norm(
        branch, residual, norm_weight, norm_bias, branch_bias, dropout=dropout, eps=eps, seed=seeds[0]
    )
    return x, gelu_mlp(normed, weight_in, bias_in, weight_out, bias_out, dropout=dropout, seed=seeds[1])


def _rows(branch: Tensor, branch_bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Branch, its bias and the stream as rows, the stream in the promoted dtype."""
    width = residual.shape[-1]
    stream = residual.to(torch.promote_types(branch.dtype, residual.dtype))
    return branch.reshape(-1, width), branch_bias, stream.reshape(-1, width)


def _attention_fits(x: Tensor, dim: int, heads: int, dtype: torch.dtype) -> bool:
    """Whether our kernels take this attention; PyTorch's own are no worse than ours where they don't."""
    # Wider heads are two blocks, which spill kilobytes on AMD's wide waves.
    widest = 64 if processor(x).is_amd else 80
    return dtype in (torch.float16, torch.bfloat16) and dim <= widest and x.shape[0] * heads <= 65535


def _refusal(first: Tensor, *tensors: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors, or None if they do."""
    if first.numel() // 8 >= 2**30:
        return f"{first.numel()} elements (the kernels count to 2^33)"
    return kernel_refusal(first, *tensors, widest=8192)


def _check_qkv(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> None:
    check_floating("x", x)
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, L, W]")
    rows = weight.shape[0]
    if weight.ndim != 2 or weight.shape[1] != x.shape[2] or heads < 1 or rows % (3 * heads):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; for {heads} heads it must be [3 * {heads} * D, {x.shape[2]}]"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{rows}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_floating(name, tensor)
            check_device(name, tensor, x, "x")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


def _check_add_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None, dropout: float
) -> None:
    for name, tensor in (("branch", branch), ("residual", residual)):
        check_floating(name, tensor)
        check_device(name, tensor, residual, "residual")
    _check_dropout(dropout)
    if branch.shape != residual.shape or residual.ndim < 1:
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} and residual {tuple(residual.shape)}; "
            "they must be alike, [..., W]"
        )
    for name, parameter in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if parameter is None:
            continue
        check_device(name, parameter, residual, "residual")
        if tuple(parameter.shape) != (residual.shape[-1],):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must be [{residual.shape[-1]}]")


def _check_mlp(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> None:
    tensors = {"weight_in": weight_in, "bias_in": bias_in, "weight_out": weight_out, "bias_out": bias_out}
    check_floating("x", x)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_floating(name, tensor)
            check_device(name, tensor, x, "x")
    inner, outer = weight_in.shape[0], weight_out.shape[0]
    expected = {
        "weight_in": (inner, x.shape[-1]),
        "bias_in": (inner,),
        "weight_out": (outer, inner),
        "bias_out": (outer,),
    }
    for name, shape in expected.items():
        given = tensors[name]
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be {list(shape)}")
