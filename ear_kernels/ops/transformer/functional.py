"""The memory-bound parts of a pre-norm transformer block as functions: shapes, dtypes, checks, errors.

Under torch.compile they are the plain operations, which inductor fuses by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.ops.transformer import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, compute_dtype, kernel_refusal, takes_tensors
from ear_kernels.runtime.launching import processor


@takes_tensors
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
    if residual.shape[-1] > 1 and _kernels_take(
        "dropout_add_layer_norm", residual, branch, weight, bias, branch_bias
    ):
        from ear_kernels.ops.transformer.autograd import Dropout, DropoutAddLayerNorm

        options = Dropout.of(dropout, seed, residual.device), eps, dtype or compute_dtype(branch)
        x, out = DropoutAddLayerNorm.apply(*_norm_inputs(branch, branch_bias, residual, weight, bias), *options)
        return x.view(residual.shape), out.view(residual.shape)
    return reference.dropout_add_layer_norm(branch, residual, weight, bias, branch_bias, dropout, eps)


@takes_tensors
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
    if _kernels_take("gelu_mlp", x, *tensors):
        from ear_kernels.ops.transformer.autograd import Dropout, GeluMLP

        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x, *tensors))
        out = GeluMLP.apply(rows, *tensors, Dropout.of(dropout, seed, x.device))
        return out.view(*x.shape[:-1], weight_out.shape[0])
    return reference.gelu_mlp(x, weight_in, bias_in, weight_out, bias_out, dropout)


@takes_tensors
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
    if _kernels_take("qkv_heads", x, weight, bias):
        from ear_kernels.ops.transformer.autograd import QKVHeads

        return QKVHeads.apply(x.to(compute_dtype(x, weight, bias)), weight, bias, heads)
    return reference.qkv_heads(x, weight, bias, heads)


@takes_tensors
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
    check_floating("x", x)
    _check_parameters(x, "x", {"weight": (weight, ("W", x.shape[-1]))})
    if _kernels_take("project", x, weight):
        from ear_kernels.ops.transformer.autograd import Linear

        out = Linear.apply(x.reshape(-1, x.shape[-1]).to(compute_dtype(x, weight)), weight)
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


@takes_tensors
def self_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, *, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """Multi-head self-attention with dropout of its weights, without the output linear.

    Args:
        x, weight, bias, heads: as for :func:`qkv_heads`.
        dropout: probability that an attention weight is dropped, in [0, 1); drawn from torch's generator.
        causal: whether a position sees itself and those before it alone; all of them if not.

    Returns:
        ``[B, L, heads D]``, the heads' results side by side, in the autocast dtype, or in the promoted dtype without
        autocast. Float32, heads wider than 80 and torch.compile take PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_dropout(dropout)
    _check_qkv(x, weight, bias, heads)
    dtype = _attention_dtype(x, weight, bias, heads)
    if dtype is not None and _kernels_take("self_attention", x, weight, bias):
        from ear_kernels.ops.transformer.autograd import SelfAttention

        return SelfAttention.apply(x.to(dtype), weight, bias, heads, dropout, causal)
    query, key, value = qkv_heads(x, weight, bias, heads)
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


@takes_tensors
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
    causal: bool = False,
    eps: float = 1e-6,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`dropout_add_layer_norm` and :func:`self_attention` of what it gives: the first half of a pre-norm block.

    Joined they keep less for backward: the normed rows in the compute dtype, not the residual stream and ``LN(x)``.

    Args:
        branch, residual: ``[B, L, W]``.
        norm_weight, norm_bias, branch_bias, dropout, eps, seed: as ``weight`` and so on of
            :func:`dropout_add_layer_norm`.
        weight, bias, heads, attention_dropout, causal: as for :func:`self_attention`.

    Returns:
        ``x = residual + dropout(branch + branch_bias)`` and the heads' results ``[B, L, heads D]``.

    Raises:
        ValueError: shapes or devices that do not fit, a dropout outside [0, 1). TypeError: integer tensors.
    """
    _check_add_norm(branch, residual, norm_weight, norm_bias, branch_bias, dropout)
    _check_dropout(attention_dropout)
    _check_qkv(residual, weight, bias, heads)
    dtype = _attention_dtype(branch, weight, bias, heads)
    tensors = (branch, norm_weight, norm_bias, branch_bias, weight, bias)
    if dtype is not None and residual.shape[-1] > 1 and _kernels_take("self_attention", residual, *tensors):
        from ear_kernels.ops.transformer.autograd_halves import Dropout, NormSelfAttention

        norm = _norm_inputs(branch, branch_bias, residual, norm_weight, norm_bias)
        options = Dropout.of(dropout, seed, residual.device), eps
        attention = weight, bias, heads, attention_dropout, causal, residual.shape[:2]
        x, out = NormSelfAttention.apply(*norm, *options, *attention, dtype)
        return x.view(residual.shape), out
    x, normed = dropout_add_layer_norm(
        branch, residual, norm_weight, norm_bias, branch_bias, dropout=dropout, eps=eps, seed=seed
    )
    return x, self_attention(normed, weight, bias, heads, dropout=attention_dropout, causal=causal)


@takes_tensors
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
    linears = (weight_in, bias_in, weight_out, bias_out)
    tensors = (branch, norm_weight, norm_bias, branch_bias, *linears)
    if residual.shape[-1] > 1 and _kernels_take("gelu_mlp", residual, *tensors):
        from ear_kernels.ops.transformer.autograd_halves import Dropout, NormGeluMLP

        first, second = (Dropout.of(dropout, seed, residual.device) for seed in seeds)
        norm = _norm_inputs(branch, branch_bias, residual, norm_weight, norm_bias)
        x, out = NormGeluMLP.apply(*norm, first, eps, *linears, second, compute_dtype(branch, *linears))
        return x.view(residual.shape), out.view(*residual.shape[:-1], weight_out.shape[0])
    x, normed = dropout_add_layer_norm(
        branch, residual, norm_weight, norm_bias, branch_bias, dropout=dropout, eps=eps, seed=seeds[0]
    )
    return x, gelu_mlp(normed, weight_in, bias_in, weight_out, bias_out, dropout=dropout, seed=seeds[1])


def _norm_inputs(
    branch: Tensor, branch_bias: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Branch, its bias, the stream in the promoted dtype, and the norm's parameters: rows, dense in memory."""
    width = residual.shape[-1]
    stream = residual.to(torch.promote_types(branch.dtype, residual.dtype))
    branch, stream = (tensor.reshape(-1, width).contiguous() for tensor in (branch, stream))
    branch_bias = None if branch_bias is None else branch_bias.contiguous()
    return branch, branch_bias, stream, weight.contiguous(), bias.contiguous()


def _attention_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> torch.dtype | None:
    """What our kernels compute this attention in; None where they don't, and PyTorch's own are no worse."""
    if torch.compiler.is_compiling():
        return None
    dtype = compute_dtype(x, weight, bias)
    # Heads wider than 64 are two blocks, which spill kilobytes on AMD's wide waves.
    widest = 64 if processor(x).is_amd else 80
    fits = weight.shape[0] // (3 * heads) <= widest and x.shape[0] * heads <= 65535
    return dtype if fits and dtype in (torch.float16, torch.bfloat16) else None


def _kernels_take(operation: str, first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether a call on these tensors goes to the kernels."""
    if torch.compiler.is_compiling():
        return False
    reason = kernel_refusal(first, *tensors, widest=8192)
    if first.numel() // 8 >= 2**30:
        reason = f"{first.numel()} elements (the kernels count to 2^33)"
    return applies(operation, first, reason)


def _check_parameters(
    x: Tensor, x_name: str, expected: dict[str, tuple[Tensor | None, tuple[int | str, ...]]]
) -> None:
    """Type, device and shape of parameters that are not None; a letter in a shape is the first size that it meets."""
    sizes: dict[str, int | str] = {}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        check_floating(name, tensor)
        check_device(name, tensor, x, x_name)
        found = tensor.shape if tensor.ndim == len(shape) else shape
        pairs = zip(shape, found, strict=True)
        wanted = [sizes.setdefault(part, size) if isinstance(part, str) else part for part, size in pairs]
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{', '.join(map(str, wanted))}]")


def _check_qkv(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> None:
    check_floating("x", x)
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, L, W]")
    wanted = (f"3 * {heads} * D", x.shape[2])
    _check_parameters(x, "x", {"weight": (weight, wanted)})
    if heads < 1 or weight.shape[0] % (3 * heads):
        shape = tuple(weight.shape)
        raise ValueError(f"weight has shape {shape}; for {heads} heads it must be [{wanted[0]}, {wanted[1]}]")
    _check_parameters(x, "x", {"bias": (bias, weight.shape[:1])})


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


def _check_add_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor | None, dropout: float
) -> None:
    check_floating("branch", branch)
    check_floating("residual", residual)
    check_device("branch", branch, residual, "residual")
    _check_dropout(dropout)
    if branch.shape != residual.shape or residual.ndim < 1:
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} and residual {tuple(residual.shape)}; "
            "they must be alike, [..., W]"
        )
    parameters = {"weight": weight, "bias": bias, "branch_bias": branch_bias}
    width = residual.shape[-1:]
    _check_parameters(residual, "residual", {name: (tensor, width) for name, tensor in parameters.items()})


def _check_mlp(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> None:
    check_floating("x", x)
    _check_parameters(x, "x", {
        "weight_in": (weight_in, ("V", x.shape[-1])), "bias_in": (bias_in, ("V",)),
        "weight_out": (weight_out, ("U", "V")), "bias_out": (bias_out, ("U",)),
    })  # fmt: skip
