"""The one place that chooses between the eager reference and the Triton kernels.

The environment variable ``EAR_KERNELS_BACKEND`` says which: ``auto`` (Triton where it exists and applies, eager
otherwise; the default), ``triton`` (Triton or an error) or ``eager``. It is read at every call, so a test or a
debugging session may change it at any time.
"""

import importlib.util
import os

from torch import Tensor

BACKEND_VARIABLE = "EAR_KERNELS_BACKEND"
BACKENDS = ("auto", "triton", "eager")

# Operations that have Triton kernels. Each issue that brings kernels adds its names here.
TRITON_OPERATIONS: frozenset[str] = frozenset({"adaln_modulate", "gated_silu_ffn", "mlp_generator"})

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported: that happens at the first launch


def requested_backend() -> str:
    """The backend asked for by ``EAR_KERNELS_BACKEND``: "auto", "triton" or "eager".

    Raises:
        ValueError: the variable holds anything else.
    """
    name = os.environ.get(BACKEND_VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={name!r} is not a backend; use one of {', '.join(BACKENDS)}")
    return name


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_backend(operation: str, tensor: Tensor | None = None) -> str:
    """"eager" or "triton" for one call of ``operation`` (a name such as ``"energy_loss"``).

    Args:
        operation: the name of the operation.
        tensor: an input of the call; its device decides under ``auto`` (Triton for CUDA tensors).

    Raises:
        ValueError: ``EAR_KERNELS_BACKEND`` names no backend.
        NotImplementedError: Triton was demanded and this operation has no Triton kernel yet.
        RuntimeError: Triton was demanded for a tensor on the CPU without ``TRITON_INTERPRET=1``.
    """
    requested = requested_backend()
    if requested == "eager":
        return "eager"
    on_gpu = tensor is not None and tensor.device.type == "cuda"
    if requested == "auto":
        known = operation in TRITON_OPERATIONS and on_gpu and _HAS_TRITON
        return "triton" if known else "eager"
    if operation not in TRITON_OPERATIONS:
        raise NotImplementedError(
            f"{BACKEND_VARIABLE}=triton, but {operation} has no Triton kernel in this version; "
            f"unset the variable or use {BACKEND_VARIABLE}=eager"
        )
    if not on_gpu and not _interpreting():
        where = "no tensor" if tensor is None else f"a tensor on {tensor.device}"
        raise RuntimeError(
            f"{BACKEND_VARIABLE}=triton, but {operation} got {where}: Triton kernels run on CUDA tensors, or on CPU "
            "tensors with TRITON_INTERPRET=1 set before the first kernel is imported"
        )
    return "triton"
