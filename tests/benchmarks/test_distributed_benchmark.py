"""The distributed benchmark's own path, on two CPU processes with a tiny model."""

import pytest

from benchmarks import bench_distributed
from benchmarks.clocks import HAS_GPU


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="there the benchmark itself runs, on two GPUs")
def test_two_processes_learn_as_one_and_one_goes_on_with_what_two_saved():
    for found in (bench_distributed.same_curves(), bench_distributed.same_resumed()):
        assert 0 <= found["differences"]["ddp-fp32"] < 1e-3
    assert len(bench_distributed.launch("curves", 1)["ddp-fp32"]) == bench_distributed.STEPS
    assert len(bench_distributed.launch("resume", 1)["ddp-fp32"]) == bench_distributed.STEPS // 2


def test_curves_that_differ_fail():
    curve = {"ddp-fp32": [3.0, 2.0, 1.0]}
    assert bench_distributed.compare({"ddp-fp32": [2.0, 1.0]}, curve)["differences"]["ddp-fp32"] == 0
    with pytest.raises(AssertionError, match=r"ddp-fp32: losses differ by 1\.0e-02"):
        bench_distributed.compare({"ddp-fp32": [3.0, 2.0, 1.01]}, curve)
