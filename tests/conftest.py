"""Fixtures of all tests: a fresh seed each run, printed on failure, and GPU tests skipped where there is none."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Before anything imports triton, which reads this once: model tests do too.
    os.environ["TRITON_INTERPRET"] = "1"

# One seed a session, so that inputs are fresh in every run and a failing run can be repeated.
SESSION_SEED = int(os.environ.get("EAR_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header(config) -> str:
    return f"EAR_TEST_SEED={SESSION_SEED}"


def pytest_collection_modifyitems(items) -> None:
    if torch.cuda.is_available():
        # What takes the device it is given runs on the GPU there: `-m gpu` is every test of a kernel.
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SESSION_SEED)


@pytest.fixture(autouse=True)
def _no_backend_variable(monkeypatch) -> None:
    """A backend set in the caller's shell must not change what a test means."""
    monkeypatch.delenv("EAR_KERNELS_BACKEND", raising=False)
