"""What every autograd function of the kernels asks about the pass that runs."""

import torch
from torch import Tensor


def is_watched(tensor: Tensor) -> bool:
    """Whether a call must go through a library operator: under compilation, fake tensors or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def graph_is_kept() -> bool:
    """Whether the running backward may run again (``retain_graph=True``); yes where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask() if ask is not None else True


def refuse_double_backward(name: str) -> None:
    """Raise in a backward that runs with ``create_graph=True``: its gradient would be silently wrong.

    ``once_differentiable`` would not raise for a scalar loss.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: the Triton backward has no derivative of its own (create_graph=True); "
            "set EAR_KERNELS_BACKEND=eager for second-order gradients"
        )
