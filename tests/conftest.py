"""Fixtures of all tests: a fresh seed each run, printed on failure, and GPU tests skipped where there is none."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Before anything imports triton, which reads this once: model tests do too.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each start a thread a core would mostly wait for one another. The programs that tests start take
    # the same number, or their sums would be rounded in another order than the test's own.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

# One seed a session, so that inputs are fresh in every run and a failing run can be repeated.
SESSION_SEED = int(os.environ.get("EAR_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header(config) -> str:
    return f"EAR_TEST_SEED={SESSION_SEED}"


def pytest_collection_modifyitems(config, items) -> None:
    if "soak" not in config.option.markexpr:
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; -m soak runs it"))
    if torch.cuda.is_available():
        # The kernels' tests run on the GPU there, so `-m gpu` is all of them. The compile gate needs none.
        for item in items:
            if "kernels" in item.path.parts and item.path.name != "test_compile_gate.py":
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
