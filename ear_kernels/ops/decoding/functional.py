"""The small parts of a decoding step: shapes, checks and errors.

A step predicts k tokens of each of B images, those at places ``left - k .. left - 1`` of its order; ``left``, int64
``[1]`` on the device, is how many are masked before it, so that a CUDA graph serves every step of k tokens. There
are G = B sequences, or 2 B with guidance, of S = P + L positions, P class tokens first; row r of ``G k`` is of
sequence ``r // k``. Without gradients; values of ``orders`` and ``left`` are not checked, which would wait for the
device.
"""

import torch
from torch import Tensor

from ear_kernels.ops.decoding import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, kernel_refusal, takes_tensors


@takes_tensors
@torch.no_grad()
def predicted_rows(
    stream: Tensor,
    orders: Tensor,
    left: Tensor,
    count: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the tokens predicted next, gathered, and normed.

    Args:
        stream: ``[G, S, C]``, contiguous.
        orders: int64 ``[B, L]``.
        left: int64 ``[1]``.
        count: k.
        weight, bias: of the norm, ``[C]``.
        eps: of the norm.
        dtype: of the norm's output; that of ``stream`` if None.

    Returns:
        The rows' indices in ``[G S]``, int64 ``[G k]``; the rows ``[G k, C]``; their norm.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.
    """
    check_floating("stream", stream)
    _check_contiguous("stream", stream, 3)
    _check_integers(orders, left, stream)
    sequences, length, _ = stream.shape
    images, tokens = orders.shape
    if images < 1 or sequences not in (images, 2 * images) or not 1 <= count <= tokens or length < tokens:
        raise ValueError(
            f"stream {tuple(stream.shape)}, orders {tuple(orders.shape)} and count {count} do not fit; they must be "
            "[B or 2 B, at least L, C], [B, L] and 1..L"
        )
    prefix, dtype = length - tokens, dtype or stream.dtype
    if applies("decoding", stream, kernel_refusal(stream, weight, bias, widest=8192)):
        from ear_kernels.ops.decoding import launch

        return launch.predicted_rows(stream, orders, left, count, prefix, weight, bias, eps, dtype)
    rows, x, normed = reference.predicted_rows(stream, orders, left, count, prefix, weight, bias, eps)
    return rows, x, normed.to(dtype)


@takes_tensors
@torch.no_grad()
def guided_norm(
    branch: Tensor,
    branch_bias: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    left: Tensor,
    count: int,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``h = LN(rows + branch + branch_bias)``, and of its halves ``s h_class + (1 - s) h_null``.

    Args:
        branch, rows: ``[G k, C]``, contiguous.
        branch_bias, weight, bias: ``[C]``.
        scales: float32 ``[L + 1]``: the guidance s of the step that keeps as many tokens masked; None: no guidance.
        left: int64 ``[1]``.
        count: k.
        eps: of the norm.

    Returns:
        ``[B k, C]`` in the dtype of ``rows``.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.
    """
    check_floating("rows", rows)
    check_floating("branch", branch)
    _check_contiguous("rows", rows, 2)
    if branch.shape != rows.shape or (scales is not None and len(rows) % 2):
        raise ValueError(
            f"branch has shape {tuple(branch.shape)} and rows {tuple(rows.shape)}; they must be alike, and even "
            "with guidance"
        )
    if applies("decoding", rows, kernel_refusal(rows, branch, weight, bias, widest=8192)):
        from ear_kernels.ops.decoding import launch

        guidance = (scales, left, count)
        return launch.guided_norm(branch.contiguous(), branch_bias, rows, weight, bias, guidance, eps)
    scale = None if scales is None else scales[left - count]
    return reference.guided_norm(branch, branch_bias, rows, weight, bias, scale, eps)


@takes_tensors
@torch.no_grad()
def write_tokens(
    sampled: Tensor,
    tokens: Tensor,
    start: Tensor,
    rows: Tensor,
    embed: tuple[Tensor, Tensor],
    position: Tensor,
    norm: tuple[Tensor, Tensor, float],
) -> Tensor:
    """Write predicted tokens and their embeddings where they belong.

    Args:
        sampled: ``[B k, D]``, contiguous.
        tokens: ``[B, L, D]``, written.
        start: ``[G, S, C]``, written: the sequences' input.
        rows: int64 ``[G k]``, of :func:`predicted_rows`.
        embed: weight ``[C, D]`` and bias ``[C]`` of the tokens' linear, in the dtype that it computes in.
        position: ``[S, C]``, added.
        norm: weight, bias and eps of the first block's norm.

    Returns:
        The norm of the embeddings, ``[B k, C]``, in the dtype of the linear.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.
    """
    check_floating("sampled", sampled)
    for name, tensor, dims in (("sampled", sampled, 2), ("tokens", tokens, 3), ("start", start, 3)):
        _check_contiguous(name, tensor, dims)
        check_device(name, tensor, start, "start")
    length, width = start.shape[1:]
    fits = sampled.shape[1] == tokens.shape[2] and tuple(embed[0].shape) == (width, sampled.shape[1])
    guided = start.shape[0] // max(1, tokens.shape[0])
    if not fits or len(rows) != guided * len(sampled) or tuple(position.shape) != (length, width):
        raise ValueError(
            f"sampled {tuple(sampled.shape)}, tokens {tuple(tokens.shape)}, start {tuple(start.shape)}, "
            f"rows {tuple(rows.shape)}, embed {tuple(embed[0].shape)}, position {tuple(position.shape)} do not fit"
        )
    prefix, dtype = length - tokens.shape[1], embed[0].dtype
    refusal = kernel_refusal(start, sampled, tokens, *embed, position, *norm[:2], widest=8192)
    if applies("decoding", start, refusal):
        from ear_kernels.ops.decoding import launch

        return launch.write_tokens(sampled, tokens, start, rows, prefix, embed, position.contiguous(), norm, dtype)
    return reference.write_tokens(sampled, tokens, start, rows, prefix, embed, position, norm).to(dtype)


@takes_tensors
@torch.no_grad()
def write_rows(values: Tensor, target: Tensor, rows: Tensor, left: Tensor, count: int) -> None:
    """Write ``values [B k, N]`` to rows of ``target [G, S, N]``, for both halves, and take ``count`` off ``left``.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes that differ.
    """
    check_floating("values", values)
    _check_contiguous("target", target, 3)
    if values.dtype != target.dtype:
        raise TypeError(f"values have dtype {values.dtype} and target {target.dtype}; they must be alike")
    if values.ndim != 2 or values.shape[1] != target.shape[2] or not len(values) or len(rows) % len(values):
        raise ValueError(f"values {tuple(values.shape)}, target {tuple(target.shape)}, rows {len(rows)} do not fit")
    if applies("decoding", target, kernel_refusal(target)):
        from ear_kernels.ops.decoding import launch

        launch.write_rows(values.contiguous(), target, rows, left, count)
        return
    reference.write_rows(values, target, rows, left, count)


def _check_contiguous(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.ndim != dims or not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {dims} dimensions and be contiguous")


def _check_integers(orders: Tensor, left: Tensor, like: Tensor) -> None:
    for name, tensor, dims in (("orders", orders, 2), ("left", left, 1)):
        check_device(name, tensor, like, "stream")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be int64")
        _check_contiguous(name, tensor, dims)
