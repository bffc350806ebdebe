"""Matrix products by cuBLAS, which no Triton kernel beats at training sizes."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` (cuBLAS's bias epilogue is free); float32 follows the matmul precision setting."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out) if out is not None else torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t(), out=out) if out is not None else torch.addmm(bias, x, weight.t())


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T @ x`` in ``dtype``: a float32 master weight gets the float32 accumulator, unrounded."""
    if grad.dtype != dtype and dtype == torch.float32 and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)
