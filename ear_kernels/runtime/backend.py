"""The one place that chooses between the eager reference and the Triton kernels.

The environment variable ``EAR_KERNELS_BACKEND`` says which: ``auto`` (Triton where it exists and applies, eager
otherwise; the default), ``triton`` (Triton or an error) or ``eager``. It is read at every call, so a test or a
debugging session may change it at any time.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ear_kernels.runtime.launching import is_recording

BACKEND_VARIABLE = "EAR_KERNELS_BACKEND"
BACKENDS = ("auto", "triton", "eager")

# Operations that have Triton kernels.
TRITON_OPERATIONS: frozenset[str] = frozenset(
    {
        "adaln_modulate",
        "adamw",
        "decoding",
        "denoise_step",
        "dropout_add_layer_norm",
        "energy_distance",
        "energy_loss",
        "gated_silu_ffn",
        "gelu",
        "gelu_mlp",
        "inference_attention",
        "kernel_score_loss",
        "linear_gelu",
        "linear_inference",
        "mlp_generator",
        "project",
        "qkv_heads",
        "residual_norm",
        "self_attention",
    }
)


def requested_backend() -> str:
    """The backend asked for by ``EAR_KERNELS_BACKEND``: "auto", "triton" or "eager".

    Raises:
        ValueError: the variable holds anything else.
    """
    name = os.environ.get(BACKEND_VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={name!r} is not a backend; use one of {', '.join(BACKENDS)}")
    return name


def _triton_is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


# Looked up once, at import: torch.compile cannot trace the look-up. Triton itself is not imported.
TRITON_IS_INSTALLED = _triton_is_installed()


def choose_backend(operation: str, tensor: Tensor | None = None, refusal: str = "") -> str:
    """ "eager" or "triton" for one call of ``operation`` (a name such as ``"energy_loss"``).

    Args:
        operation: the name of the operation.
        tensor: one of its inputs; Triton is the automatic choice for CUDA tensors.
        refusal: why this call cannot go to Triton, if so; the automatic choice is eager then.

    Raises:
        ValueError: ``EAR_KERNELS_BACKEND`` names no backend.
        NotImplementedError: Triton was demanded and this operation or this call has no Triton kernel.
        RuntimeError: Triton was demanded for CPU tensors without Triton's interpreter, or is not installed.
    """
    if is_recording() and operation in TRITON_OPERATIONS and not refusal:
        return "triton"
    requested = requested_backend()
    if requested == "eager":
        return "eager"
    if requested == "auto":
        usable = operation in TRITON_OPERATIONS and not refusal and tensor is not None and tensor.is_cuda
        return "triton" if usable and TRITON_IS_INSTALLED else "eager"
    if operation not in TRITON_OPERATIONS:
        raise NotImplementedError(
            f"{BACKEND_VARIABLE}=triton, but {operation} has no Triton kernel in this version; "
            f"unset the variable or use {BACKEND_VARIABLE}=eager"
        )
    if refusal:
        raise NotImplementedError(f"{BACKEND_VARIABLE}=triton, but {refusal}; use {BACKEND_VARIABLE}=eager")
    if not TRITON_IS_INSTALLED:
        raise RuntimeError(f"{BACKEND_VARIABLE}=triton, but Triton is not installed (pip install triton)")
    if tensor is not None and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{BACKEND_VARIABLE}=triton, but the tensors are on {tensor.device}; put them on a GPU, or set "
            "TRITON_INTERPRET=1 before the first import of triton to run the kernels on its interpreter"
        )
    return "triton"


def functional_transform_is_active() -> bool:
    """Whether torch.func.grad, vmap or another transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode_is_active() -> bool:
    """Whether a level of forward-mode AD (``torch.autograd.forward_ad``, ``torch.func.jvp``) is open."""
    return torch.autograd.forward_ad._current_level >= 0


def applies(operation: str, tensor: Tensor, reason: str | None) -> bool:
    """Whether the kernels take the call; raises NotImplementedError if not and Triton was demanded."""
    if reason is None and not torch.compiler.is_compiling():
        if functional_transform_is_active():
            reason = "a torch.func transform, which needs the reference"
        elif forward_mode_is_active():
            reason = "forward-mode AD, which needs the reference"
    return choose_backend(operation, tensor, f"{operation} got {reason}" if reason else "") == "triton"
