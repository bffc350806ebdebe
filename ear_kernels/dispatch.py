"""The one place that chooses between the eager reference and the Triton kernels.

The environment variable ``EAR_KERNELS_BACKEND`` says which: ``auto`` (Triton where it exists and applies, eager
otherwise; the default), ``triton`` (Triton or an error) or ``eager``. It is read at every call, so a test or a
debugging session may change it at any time.
"""

import os

BACKEND_VARIABLE = "EAR_KERNELS_BACKEND"
BACKENDS = ("auto", "triton", "eager")

# Operations that have Triton kernels. Each issue that brings kernels adds its names here.
TRITON_OPERATIONS: frozenset[str] = frozenset()


def requested_backend() -> str:
    """The backend asked for by ``EAR_KERNELS_BACKEND``: "auto", "triton" or "eager".

    Raises:
        ValueError: the variable holds anything else.
    """
    name = os.environ.get(BACKEND_VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={name!r} is not a backend; use one of {', '.join(BACKENDS)}")
    return name


def choose_backend(operation: str) -> str:
    """ "eager" or "triton" for one call of ``operation`` (a name such as ``"energy_loss"``).

    Raises:
        ValueError: ``EAR_KERNELS_BACKEND`` names no backend.
        NotImplementedError: Triton was demanded and this operation has no Triton kernel yet.
    """
    requested = requested_backend()
    if requested == "triton" and operation not in TRITON_OPERATIONS:
        raise NotImplementedError(
            f"{BACKEND_VARIABLE}=triton, but {operation} has no Triton kernel in this version; "
            f"unset the variable or use {BACKEND_VARIABLE}=eager"
        )
    return "triton" if requested == "triton" else "eager"
