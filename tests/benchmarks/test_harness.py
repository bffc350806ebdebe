"""A wrong result is never timed, a reason is always given, and what is written is whole."""

import json
import os
import re

import pytest
import torch

from benchmarks import bench_energy_loss, bench_generator, harness
from benchmarks.clocks import HAS_GPU
from benchmarks.harness import COMPILED, EAGER, OURS, Row, Unavailable, check_results, measure


def results_of(found: torch.Tensor):
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    return lambda which: {"out": {"exact": exact, "eager": exact.float()}.get(which, found)}


def test_the_rule_accepts_rounding_and_refuses_more():
    right = torch.linspace(1, 2, 100, dtype=torch.float64).float()
    assert check_results(results_of(right), OURS) <= 1
    with pytest.raises(AssertionError, match="largest error"):
        check_results(results_of(right * 1.00001), OURS)
    check_results(results_of(right * 1.00001), OURS, lambda name, exact: 100.0)
    with pytest.raises(AssertionError, match="NaN"):
        check_results(results_of(right.clone().fill_(float("nan"))), OURS)


def test_a_wrong_result_has_no_time():
    def check() -> float:
        raise AssertionError("off by 3")

    calls = []
    prepare = lambda: [lambda: calls.append(1)]  # noqa: E731
    record = measure(Row("sum", OURS, prepare, check, on_host=True))
    assert record == {"case": "sum", "rival": OURS, "failed": "AssertionError: off by 3"}
    assert not calls
    record = measure(Row("sum", OURS, prepare, lambda: 0.5, on_host=True))
    assert record["error_over_eager"] == 0.5
    assert record["wall_ms"]["p20"] <= record["wall_ms"]["median"] <= record["wall_ms"]["p80"]


@pytest.mark.parametrize("rival", [COMPILED, OURS])
def test_the_energy_losses_check_sees_a_gradient_that_is_off(rival, monkeypatch):
    shape = bench_energy_loss.SMALL_SHAPES[0]
    wrong = lambda *tensors: bench_energy_loss.public_ear(*tensors) * 1.0001  # noqa: E731
    right = bench_energy_loss.loss_function
    bench_energy_loss.check(shape, OURS)
    monkeypatch.setattr(
        bench_energy_loss, "loss_function", lambda shape, which: wrong if which == rival else right(shape, which)
    )
    with pytest.raises(AssertionError, match="loss: largest error"):
        bench_energy_loss.check(shape, rival)


def test_the_energy_losses_check_sees_too_few_draws(monkeypatch):
    """All targets at the mean say nothing of the draws."""
    shape = bench_energy_loss.Shape("CALM", 64, 8, 20, 32, gaussian=True)
    tensors = bench_energy_loss.inputs(shape)
    bench_energy_loss.check_draws(shape, OURS, tensors)
    narrow = lambda x, mean, log_std: bench_energy_loss.public_calm(x, mean, log_std - 1, shape.m)  # noqa: E731
    right = bench_energy_loss.loss_function
    monkeypatch.setattr(
        bench_energy_loss, "loss_function", lambda shape, which: narrow if which == OURS else right(shape, which)
    )
    with pytest.raises(AssertionError):
        bench_energy_loss.check_draws(shape, OURS, tensors)


@pytest.mark.skipif(HAS_GPU, reason="on a GPU the benchmark checks its own sizes")
@pytest.mark.parametrize("pool", [0, 16])
def test_the_generators_check(pool, monkeypatch):
    size = (1, 32)
    assert bench_generator.check.__wrapped__(size, 64, OURS, pool) < 2
    forward = bench_generator.FusedMLPGenerator.forward
    if pool == 0:
        monkeypatch.setattr(
            bench_generator.FusedMLPGenerator, "forward", lambda self, *given, **named: 1.001 * forward(self, *given)
        )
        with pytest.raises(AssertionError, match="out: largest error"):
            bench_generator.check.__wrapped__(size, 64, OURS, pool)


def test_reasons():
    def unavailable():
        raise Unavailable("no disk")

    def broken():
        raise RuntimeError("a compiler's\n long story")

    assert measure(Row("a", OURS, reason="needs a GPU"))["skipped"] == "needs a GPU"
    assert measure(Row("a", OURS, unavailable))["skipped"] == "no disk"
    assert measure(Row("a", OURS, broken))["failed"] == "RuntimeError: a compiler's long story"
    assert measure(Row("a", COMPILED, broken))["skipped"] == "fails to compile: a compiler's long story"


def test_main_writes_every_row_and_says_what_failed(tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    rows = [
        Row("case one", EAGER, lambda: [lambda: None], work={"images": 64}, on_host=True),
        Row("case one", OURS, lambda: [lambda: None], lambda: 0.0, on_host=True),
        Row("case two", EAGER, reason="needs a GPU"),
        Row("case two", OURS, reason="needs a GPU"),
    ]
    assert harness.main(rows, "doc", ["--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert {"device", "torch", "triton", "date", "command", "commit"} <= set(saved["environment"])
    assert [row["rival"] for row in saved["rows"]] == [EAGER, OURS, EAGER, OURS]
    assert saved["rows"][0]["images_per_s"] == pytest.approx(64e3 / saved["rows"][0]["wall_ms"]["median"])
    assert not list(out.parent.glob(".tmp-*"))
    told = capsys.readouterr().out
    assert re.search(r"case two +several +skipped: needs a GPU", told)
    assert re.search(r"case one +ours +\d\.\d{4}", told)

    assert harness.main(rows, "doc", ["--only", "two.*ours", "--out", str(out)]) == 0
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["case two"]
    assert harness.main([Row("a", OURS, lambda: [lambda: 1 / 0])], "doc", []) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_pytest_shows_one_table_of_all_rows(pytester_table):
    assert "what ran, what was skipped and why" in pytester_table
    assert re.search(r"energy loss, EAR 32k +several +skipped: needs a GPU", pytester_table)
    assert re.search(r"energy distance small +ours +[\d.]+ +eager backend", pytester_table)


@pytest.fixture(scope="module")
def pytester_table() -> str:
    import subprocess
    import sys

    if HAS_GPU:
        pytest.skip("a machine without a GPU is what this is about")
    command = ["-m", "pytest", "benchmarks/bench_energy_loss.py", "--benchmark-only", "-q", "-k", "32k or distance"]
    # Among other workers pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    answer = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout
