"""The benchmark of accelerate(): what it times on a CPU, and that a slower row fails."""

import pytest
import torch

from benchmarks import bench_accelerate as bench


@pytest.mark.parametrize("name", bench.PUBLIC_MODELS)
@pytest.mark.parametrize("kind", ["training", "sampling"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_calls_run(name, kind, accelerated):
    call = bench.make_call(name, kind, 2, accelerated=accelerated)
    for _ in range(2):
        found = call()
        assert found.isfinite().all()
        assert found.ndim == (1 if kind == "training" else 4)


@pytest.mark.parametrize("name", bench.PUBLIC_MODELS)
@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_wrong_results_are_not_timed(name, kind, monkeypatch):
    assert bench.check(name, kind) <= bench.TOLERATED

    def wrong(model):
        with torch.no_grad():
            next(iter(model.decoder_blocks)).attn.proj.weight.mul_(1.5)

    monkeypatch.setattr(bench, "accelerate", wrong)
    monkeypatch.setattr(bench, "swap", lambda model: None)
    with pytest.raises(AssertionError, match="differ by"):
        bench.check(name, kind)


def test_a_slower_row_fails():
    public = {"first_ms": 10.0, "wall_ms": {"median": 5.0}}
    for wall, fails in ((2.5, False), (5.0, False), (5.1, False), (5.2, True), (9.0, True)):
        found = bench.judged({"first_ms": 20.0, "wall_ms": {"median": wall}}, public)
        assert ("failed" in found) == fails
        assert found["speedup"] == pytest.approx(5 / wall)


def test_every_model_has_training_and_all_batches():
    cases = [row.case for row in bench.make_rows()]
    for name in bench.PUBLIC_MODELS:
        assert len({case for case in cases if case.startswith(name)}) == 1 + len(bench.BATCHES)
    assert len(cases) == 2 * len(set(cases))
