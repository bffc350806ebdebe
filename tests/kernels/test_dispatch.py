"""Choosing a backend, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch

from ear_kernels import FusedEnergyLoss
from ear_kernels.runtime import backend as dispatch


def _loss():
    return FusedEnergyLoss()(torch.randn(2, 2, 3), torch.randn(2, 3))


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_backends_that_work_everywhere(monkeypatch, name):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, name)
    assert _loss().isfinite()


def test_triton_is_refused_where_there_is_no_kernel(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "TRITON_OPERATIONS", frozenset())
    with pytest.raises(NotImplementedError, match="has no Triton kernel"):
        _loss()


def test_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"'cuda'.*auto, triton, eager"):
        _loss()


def test_import_needs_no_triton_and_is_quick():
    """In a process where triton can't be imported; the time is ours alone, torch is imported before."""
    program = """
import sys, time, torch
sys.modules.pop("triton", None)
loaded = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Refuse())
start = time.perf_counter()
import ear_kernels
print(time.perf_counter() - start)
assert "ear_model" not in sys.modules
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(answer.stdout) < 0.3
