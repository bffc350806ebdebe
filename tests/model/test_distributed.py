"""Two real processes started by torchrun (gloo, CPU) against one: gradients, curves, resuming, failures."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ear_model import cli
from ear_model.draws import mixed_seed
from ear_model.run_dir import checkpoint_steps, load_config, read_metrics
from ear_model.training import checkpoint, distributed
from ear_model.training.randomness import CommonDraws
from ear_model.training.trainer import Trainer
from tests.model import distributed_worker

ROOT = Path(__file__).parents[2]


def _torchrun(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process, timeout=240):
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, errors = process.communicate(timeout=60)
        pytest.fail(f"the job hangs: {errors[-2000:]}")
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Reports of the two processes of tests/model/distributed_worker.py, and their directory."""
    out = tmp_path_factory.mktemp("two")
    status, _, errors = _finish(_torchrun("-m", "tests.model.distributed_worker", str(out)))
    assert status == 0, errors[-4000:]
    return [json.loads((out / f"report-{rank}.json").read_text()) for rank in range(2)], out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same of this process alone."""
    out = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = (distributed_worker.train, distributed_worker.draws, distributed_worker.statistics)
    report = {part.__name__: part(out) for part in parts}
    torch.set_num_threads(threads)
    return report, out


def test_loss_curves_are_those_of_one_process(one, two):
    """Without dropout all draws are common, so only float32 rounding differs: 1e-7 here, 1e-4 allowed.

    In bfloat16 a batch of another size is rounded otherwise in the matrix products: 5e-4 here, 5e-3 allowed.
    """
    for name, expected in one[0]["train"]["curves"].items():
        tolerance = 5e-3 if "bf16" in name else 1e-4
        for report in two[0]:
            assert report["train"]["curves"][name] == pytest.approx(expected, rel=tolerance), name
        # The curve falls by far more than what is allowed between the two.
        assert expected[-1] < 0.8 * expected[0]


@pytest.mark.parametrize("kind", ["ddp accumulated", "fsdp accumulated"])
def test_gradients_are_those_of_one_process(one, two, kind):
    expected = torch.load(one[1] / f"gradients {kind}-0.pt")
    largest = max(gradient.abs().max() for gradient in expected.values())
    for rank in range(2):
        actual = torch.load(two[1] / f"gradients {kind}-{rank}.pt")
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=float(1e-5 * largest), msg=name)
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "res_blocks" in name)


def test_weights_and_averages_are_alike_on_all_processes(two):
    reports, out = two
    for name in reports[0]["train"]["curves"]:
        for kind in ("weights", "averages"):
            a, b = (torch.load(out / name / f"{kind}-{rank}.pt") for rank in range(2))
            assert distributed_worker.same(a, b), (name, kind)
        assert all(report["train"][f"averaged {name}"] for report in reports)


def test_a_checkpoint_does_not_show_how_it_was_written(one, two):
    """DDP, FSDP and a single process write the same tensors; the first two bit for bit the same values."""
    paths = [root / name for root in (one[1], two[1]) for name in ("ddp", "fsdp")]
    checkpoints = [checkpoint.load_checkpoint(path) for path in paths]
    for saved in checkpoints:
        assert saved.trainer_state["step"] == 6
        for index, moments in checkpoints[0].trainer_state["optimizer"]["state"].items():
            for key, moment in moments.items():
                own = saved.trainer_state["optimizer"]["state"][index][key]
                assert type(own) is torch.Tensor
                assert own.shape == moment.shape
        for kind in ("weights", "averages"):
            tensors, expected = getattr(saved, kind), getattr(checkpoints[0], kind)
            assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
    ddp, fsdp = checkpoints[2:]
    assert distributed_worker.same(ddp.weights, fsdp.weights)
    assert distributed_worker.same(ddp.averages, fsdp.averages)
    assert len(ddp.trainer_state["process_rng"]) == 2


def test_resume_under_either_kind_is_bit_for_bit(two):
    for report in two[0]:
        second_half = report["train"]["curves"]["ddp"][6:]
        for kind in ("ddp to ddp", "ddp to fsdp", "fsdp to fsdp", "fsdp to ddp"):
            step, losses, same_weights = report["resume"][kind]
            assert (step, losses, same_weights) == (12, second_half, True), kind
        assert report["resume"]["dropout"] == [12, True]


def test_two_processes_go_on_as_one(one, two, tmp_path):
    """A checkpoint of two processes, resumed by one: data, draws and moments carry over, the curve goes on."""
    for name in ("ddp", "fsdp"):
        trainer = Trainer(distributed_worker.case(parallel=name), two[1] / name, resume=True, device="cpu")
        assert trainer.step == 6
        losses = distributed_worker.curve(trainer, 6)
        assert losses == pytest.approx(one[0]["train"]["curves"][name][6:], rel=1e-4)


def test_common_draws_are_slices_and_own_draws_differ(one, two):
    expected, reports = one[0]["draws"], [report["draws"] for report in two[0]]
    common = [report["common"] for report in reports]
    assert common[0]["counts"] == common[1]["counts"] == expected["common"]["counts"]
    batches = zip(*(iter(expected["common"]["orders"]),) * 16, strict=True)
    halves = [zip(*(iter(report["orders"]),) * 8, strict=True) for report in common]
    for whole, first, second in zip(batches, *halves, strict=True):
        assert [*first, *second] == list(whole)
    own = [report["own"] for report in reports]
    assert own[0]["counts"] == own[1]["counts"]
    assert len(set(own[0]["counts"])) > 1
    alike = sum(a == b for a, b in zip(own[0]["orders"], own[1]["orders"], strict=True))
    assert alike == 0


def test_loss_with_dropout_agrees_statistically(one, two):
    """Other draws, same distribution: mean loss of steps 101 to 200 on one process and on two.

    Over five seeds of one process this mean is 1.40 with a standard deviation of 0.017; 0.1 is allowed. The loss of
    step 1 is 3.3.
    """
    assert two[0][0]["statistics"] == two[0][1]["statistics"]
    assert two[0][0]["statistics"] == pytest.approx(one[0]["statistics"], abs=0.1)
    assert one[0]["statistics"] < 2.5


def test_an_error_on_one_process_is_an_error_on_all(two):
    reports, out = two
    assert reports[0]["failures"] == reports[1]["failures"]
    failures = reports[0]["failures"]
    assert "step 8: loss nan" in failures["nan"]
    assert "the checkpoint of step 6 is kept" in failures["nan"]
    assert checkpoint_steps(out / "nan") == [6]
    assert "9 images can't be divided among 2 processes" in failures["batch"][0]
    assert "multiple of 32" in failures["accumulate"][0]
    assert failures["one"][0].startswith("process 1: ")
    assert "exists already" in failures["one"][0]
    assert not any(failures[name][1] for name in ("batch", "accumulate", "one")), "something was written"


def test_metrics_are_of_the_whole_batch(two):
    """The run with the poisoned step logged its first steps: means over both processes, written once."""
    metrics = read_metrics(two[1] / "nan")
    assert [line["step"] for line in metrics] == [3, 6]
    curve = two[0][0]["train"]["curves"]["ddp"]
    assert metrics[0]["loss"] == pytest.approx(sum(curve[:3]) / 3, rel=1e-6)


def _worker_pids(torchrun):
    """Processes that a torchrun started, by RANK."""
    pids = {}
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            pids |= {int(word[5:]): int(child) for word in environment if word.startswith(b"RANK=")}
    return pids


OPTIONS = {
    "--device": "cpu",
    "--train.steps": "60",
    "--train.batch-size": "16",
    "--train.checkpoint-every": "5",
    "--train.log-every": "5",
    "--train.lr": "3e-3",
    "--model.depth": "1",
    "--model.width": "32",
    "--model.generator-depth": "1",
    "--sampling.steps": "2",
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers under /proc")
def test_a_killed_process_ends_the_job_and_one_process_finishes_it(tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    job = _torchrun("-m", "ear_model.train", "digits", "--out", str(killed), *itertools.chain(*OPTIONS.items()))
    deadline = time.monotonic() + 120
    while not checkpoint_steps(killed):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        assert job.poll() is None, "the job ended before its first checkpoint"
        time.sleep(0.002)
    os.kill(_worker_pids(job)[1], signal.SIGKILL)
    begun = time.monotonic()
    status, output, errors = _finish(job, timeout=60)
    assert status != 0
    assert time.monotonic() - begun < 30
    assert output.count("2 processes on cpu (ddp)") == 1
    lines = [line for line in errors.splitlines() if line.startswith("ear: error")]
    assert len(lines) <= 1  # the other process, unless torchrun ended it first
    assert all("process 0 lost another process of the job" in line for line in lines)
    assert "SIGKILL" in errors
    step = checkpoint_steps(killed)[-1]
    assert 5 <= step < 60
    assert checkpoint.load_checkpoint(killed).trainer_state["step"] == step

    assert cli.main(["train", "digits", "--out", str(killed), "--resume", "--device", "cpu"]) == 0
    assert f"from step {step}" in capsys.readouterr().out
    assert (killed / "samples.png").is_file()
    Trainer(load_config(killed), whole, device="cpu").run(quiet=True)
    a, b = ([line["loss"] for line in read_metrics(run)] for run in (killed, whole))
    assert len(a) == 12
    assert a == pytest.approx(b, rel=1e-3)  # 60 steps of rounding on one and on two processes
    assert b[-1] < 0.9 * b[0]


def test_a_hanging_process_ends_the_job(tmp_path):
    """A process that is alive but does not take part: the time limit, 10 minutes, is set to 3 seconds."""
    begun = time.monotonic()
    status, _, _ = _finish(_torchrun("-m", "tests.model.distributed_worker", str(tmp_path), "hang"), timeout=100)
    assert status != 0
    assert time.monotonic() - begun < 90
    told = (tmp_path / "hang.txt").read_text()
    assert told.startswith("process 0 lost another process of the job")
    assert told.endswith("training stopped, the checkpoint of step 6 is kept")
    assert checkpoint.load_checkpoint(tmp_path / "hang").trainer_state["step"] == 6


def test_errors_of_a_job_are_told_once(tmp_path):
    """Before the first step, with nothing written; and a loss that is not finite, on all processes together."""
    out = tmp_path / "run"
    small = {**OPTIONS, "--train.lr": "1e36", "--train.checkpoint-every": "1", "--out": str(out)}
    for options, message in (
        ({**small, "--train.batch-size": "33"}, "33 images can't be divided among 2 processes"),
        (small, "step 2: loss nan, gradient norm nan; training stopped, the checkpoint of step 1 is kept"),
    ):
        assert not out.exists()
        job = _torchrun("-m", "ear_model.train", "digits", *itertools.chain(*options.items()))
        status, _, errors = _finish(job)
        assert status != 0
        lines = [line for line in errors.splitlines() if line.startswith("ear: error")]
        assert len(lines) == 1
        assert message in lines[0]
    assert checkpoint_steps(out) == [1]


def test_another_number_of_processes_draws_anew_with_dropout(two):
    """One process goes on with a run of two that has dropout: seeded by seed, rank and step, not by repeating."""
    config = distributed_worker.with_dropout(distributed_worker.case())
    trainer = Trainer(config, two[1] / "dropout", resume=True, device="cpu")
    state = torch.get_rng_state()
    torch.manual_seed(mixed_seed(config.train.seed, 0, 6))
    assert trainer.step == 6
    assert torch.equal(state, torch.get_rng_state())


def test_a_single_process_needs_no_group(tmp_path):
    with distributed.process_group("cpu"):
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        trainer = Trainer(distributed_worker.case(parallel="fsdp"), tmp_path / "run", device="cpu")
    assert trainer.replica is trainer.model
    assert math.isfinite(trainer.train_step()[0])
    with pytest.raises(OSError, match="disk"), distributed.all_or_none():
        raise OSError("disk")


def test_common_draws_of_every_form(monkeypatch):
    """A draw gives the rows of this process, of the one generator; torch's own generators are left alone."""
    torch.manual_seed(3)
    whole = torch.rand(6, 5)
    normal = torch.randn(4)
    scalar = torch.rand((), dtype=torch.float64)
    for rank in range(2):
        torch.manual_seed(3)
        draws = CommonDraws(torch.device("cpu"))
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        before = torch.get_rng_state()
        own = draws.rand(3, 5)
        assert torch.equal(own, whole[3 * rank : 3 * rank + 3])
        assert own.untyped_storage().nbytes() == own.numel() * 4
        assert torch.equal(draws.randn(2), normal[2 * rank : 2 * rank + 2])
        assert draws.fraction() == scalar
        assert torch.equal(torch.get_rng_state(), before)


def test_no_gemm_workspace_unless_the_environment_says_otherwise(monkeypatch) -> None:
    for variable in ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        monkeypatch.delenv("CUBLASLT_WORKSPACE_SIZE")
        monkeypatch.setenv(variable, "4096")
        distributed.leave_out_gemm_workspace()
        assert os.environ[variable] == "4096"
        monkeypatch.delenv(variable)
        assert not {"CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"} & set(os.environ)
    distributed.leave_out_gemm_workspace()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["CUBLASLT_WORKSPACE_SIZE"]) == (":0:0", "0")


def test_expandable_segments_unless_the_environment_says_otherwise(monkeypatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as inner:
        inner.setenv("PYTORCH_ALLOC_CONF", "backend:native")
        distributed.prefer_expandable_segments()
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is taken away again after the test
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    distributed.prefer_expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
