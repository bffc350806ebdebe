"""The sweeps at tiny sizes in Triton's interpreter: candidates run, and one that is wrong is refused."""

from itertools import islice
from unittest.mock import patch

import pytest
import torch

from benchmarks import sweep
from benchmarks.clocks import HAS_GPU
from ear_kernels import functional

pytestmark = pytest.mark.skipif(HAS_GPU, reason="on a GPU the sweeps have real sizes and take minutes")


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_candidates_are_checked_and_timed(name):
    first = next(iter(sweep.SWEEPS[name]()))
    records = list(islice(first.records(), 3))
    assert [record.get("failed") for record in records] == [None] * len(records)
    assert records[0]["choice"] == "the table's"
    assert len(records) > 1
    assert all(record["ms"] > 0 and record["sweep"] == first.name for record in records)


def test_a_candidate_that_is_wrong_has_no_time():
    right = functional.adaln_modulate

    def wrong(*given: torch.Tensor) -> torch.Tensor:
        return right(*given) * (1.01 if given[0].dtype == sweep.LOW else 1)

    first = next(iter(sweep.adaln()))
    choices = {"wrong": lambda: patch.object(functional, "adaln_modulate", wrong)}
    records = list(sweep.Sweep(first.name, first.kernels, first.run, choices).records())
    assert "ms" in records[0]
    assert "largest error" in records[1]["failed"]
    assert "ms" not in records[1]
