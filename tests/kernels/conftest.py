"""Fixtures of the kernel tests: a GPU if there is one, Triton's interpreter (tests/conftest.py) otherwise."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

HAS_GPU = torch.cuda.is_available()

# More by EAR_TEST_EXAMPLES; the defaults keep a run of all tests to a few minutes.
EXAMPLES = int(os.environ.get("EAR_TEST_EXAMPLES", "100" if HAS_GPU else "25"))
settings.register_profile(
    "kernels",
    max_examples=EXAMPLES,
    deadline=None,
    # Fresh examples in every run but CI's: what lands must not hang on a draw. Other tests are fresh there too.
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=list(HealthCheck),
    # No shrinking or explaining: those phases trace every line, and the interpreter has many.
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("kernels")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh memory holds NaN, so that a number which a kernel forgets to write shows."""

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
