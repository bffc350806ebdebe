"""``ear study``: jobs that go on, what is told of results, the page and the table, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ear_model import cli
from ear_model.errors import RunError
from ear_model.files import write_json
from ear_model.run_dir import METRICS_FILE, checkpoint_steps
from ear_model.studies import catalogue, job, pages, runner
from ear_model.studies.study import Arm, Findings, Plot, Study

SMALL = {"depth": 1, "width": 16, "num_heads": 2, "class_tokens": 1}
GENERATOR = {"generator_width": 16, "generator_depth": 1}


def small_run(score="energy", steps=4, checkpoint_every=2, **model):
    run = catalogue.run_of(score, **SMALL, **(GENERATOR if score == "energy" else {}), **model)
    train = replace(
        run.train, steps=steps, warmup_steps=1, batch_size=8, checkpoint_every=checkpoint_every, log_every=1
    )
    return replace(run, train=train)


def small_study(**arms) -> Study:
    made = [
        Arm(name, run, catalogue.settings_of(replace(run, sampling=replace(run.sampling, steps=2)), (1.0, 2.0)), x)
        for x, (name, run) in enumerate((arms or {"one": small_run(), "other": small_run(alpha=1.5)}).items(), 1)
    ]
    return Study("small", "Table 0", "a claim.", tuple(made), Plot("arm", "x"), catalogue._better("one", "other"))


def result(arm: str, seed: int, *distances: float, consistency: float = 0.9) -> dict:
    score = {"class_consistency": consistency, "ms_per_image": 1.0}
    score |= {"energy_distance_floor": 0.0, "classifier_test_accuracy": 0.99}
    scores = [{**score, "energy_distance": distance} for distance in distances]
    return {"arm": arm, "seed": seed, "scores": scores, "loss": 1.0, "environment": {}}


def test_every_study_is_sound():
    """Arms are folders, differ, and can be trained; every verdict reads what its runs give."""
    assert len(catalogue.STUDIES) >= 10
    for study in catalogue.STUDIES.values():
        names = [arm.name for arm in study.arms]
        assert len(set(names)) == len(names)
        assert len({arm.run for arm in study.arms}) == len(names), study.name
        assert all(name.replace("-", "").replace(".", "").isalnum() for name in names)
        results = [
            result(arm.name, seed, *(1 + 0.1 * number + 0.01 * seed for number, _ in enumerate(arm.settings)))
            for arm in study.arms
            for seed in range(3)
        ]
        word, reasons = study.verdict(Findings(study, results))
        assert word in ("reproduces", "does not reproduce", "cannot be told at this size")
        # The reasons hold numbers of these results, whose distances are from 1 to 1.8.
        assert "1.01" in reasons or "1.1" in reasons, reasons


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [([1.0, 1.1], [2.0, 2.1], -1), ([2.0, 2.1], [1.0, 1.1], 1), ([1.0, 2.0], [1.4, 1.7], 0), ([1.0], [2.0], 0)],
)
def test_only_a_difference_beyond_the_spread_is_told(one, other, order):
    study = small_study()
    results = [result("one", seed, value) for seed, value in enumerate(one)]
    results += [result("other", seed, value) for seed, value in enumerate(other)]
    found = Findings(study, results)
    assert found.order("one", "other") == order
    words = {-1: "reproduces", 1: "does not reproduce", 0: "cannot be told at this size"}
    assert study.verdict(found)[0] == words[order]


def test_a_setting_is_chosen_and_divergence_counts():
    study = small_study()
    results = [result("one", seed, 3.0, 1.0 + seed / 10) for seed in range(3)]
    results += [result("other", 0), result("other", 1), result("other", 2)]
    found = Findings(study, results)
    assert found.best("one") == 1
    assert found.values("one", "energy_distance") == [1.0, 1.1, 1.2]
    assert found.mean("one", "energy_distance") == pytest.approx(1.1)
    assert found.diverged("other") == 3
    assert found.order("one", "other") == -1
    assert found.order("other", "one") == 1


def test_a_study_is_run_written_and_not_run_again(tmp_path, monkeypatch):
    """Energy and categorical, which makes its codebook; then the same call does nothing but write."""
    study = small_study(one=small_run(), other=small_run("categorical", codebook_size=8))
    jobs = runner.jobs_of(study, tmp_path / "runs", 1, 20)
    assert runner.seconds(jobs, "cpu") > 0
    runner.prepare(jobs)
    runner.run_jobs(jobs, ["cpu"], 2)
    results = [each.result() for each in jobs]
    for each in results:
        assert each["diverged"] == ""
        assert len(each["scores"]) == 2
        assert 0 <= each["scores"][0]["class_consistency"] <= 1
        assert each["parameters"] > 0
        assert each["environment"]["device"] == "cpu"
    monkeypatch.setattr(runner, "_start", lambda *given: pytest.fail("a finished run was started"))
    runner.run_jobs(jobs, ["cpu"], 2)
    page = pages.write(study, results, "ear study small", tmp_path / "report", quick=False)
    first, *rest = page.read_text().splitlines()
    assert first == "# Table 0, small: cannot be told at this size"
    assert "    ear study small" in rest
    assert all(len(line) <= 120 for line in rest if not line.startswith("|"))
    stored = json.loads((tmp_path / "report" / "small.json").read_text())
    assert stored["runs"] == results
    assert (tmp_path / "report" / "small.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "report" / "README.md").read_text()
    assert "| [small](small.md) | Table 0 | a claim. | cannot be told at this size |" in table
    quick = pages.write(study, results, "ear study small --quick", tmp_path / "report", quick=True)
    assert "quick runs" in quick.read_text()


def test_folders_of_other_runs_are_refused(tmp_path):
    study = small_study()
    runner.prepare(runner.jobs_of(study, tmp_path, 1, 20))
    with pytest.raises(ValueError, match="num"):
        runner.prepare(runner.jobs_of(study, tmp_path, 1, 30))


def test_a_run_that_diverges_is_a_result(tmp_path):
    run = small_run(steps=6)
    folder = tmp_path / "arm" / "0"
    folder.mkdir(parents=True)
    run = replace(run, train=replace(run.train, lr=1e30, clip=1e30, warmup_steps=0))
    write_json(folder / job.JOB_FILE, job.description(run, [run.sampling], 10))
    job.do(folder, "cpu")
    found = json.loads((folder / job.RESULT_FILE).read_text())
    assert "step" in found["diverged"]
    assert found["scores"] == []


def test_a_failed_run_is_named_and_the_others_are_finished(tmp_path):
    study = small_study()
    jobs = runner.jobs_of(study, tmp_path, 1, 20)
    runner.prepare(jobs)
    (jobs[0].folder / job.JOB_FILE).write_text("{}")
    with pytest.raises(RunError, match=r"the run one of seed 0 ended with status 1: .*log\.txt"):
        runner.run_jobs(jobs, ["cpu"], 2)
    assert jobs[1].result() is not None


def test_a_signal_ends_the_runs_after_a_checkpoint(tmp_path):
    """SIGTERM to the study: its runs keep what they have, nothing is left behind, and the same call goes on."""
    program = (
        "import sys; from tests.model import test_study as t; from ear_model import signals;"
        "from ear_model.studies import runner; from pathlib import Path\n"
        "run = t.small_run(steps=100000, checkpoint_every=100000)\n"
        "jobs = runner.jobs_of(t.small_study(one=run), Path(sys.argv[1]), 1, 20)\n"
        "runner.prepare(jobs)\n"
        "with signals.caught():\n    runner.run_jobs(jobs, ['cpu'], 1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.DEVNULL)
    run_dir, until = tmp_path / "one" / "0" / "run", time.monotonic() + 60
    metrics = run_dir / METRICS_FILE
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    assert not checkpoint_steps(run_dir)  # so that the one below is the signal's
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert children
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert checkpoint_steps(run_dir)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tabel"], "unknown study 'tabel'; use one of scores,"),
        (["alpha", "--seeds", "0"], "seeds is 0; it must be from 1 to 1024"),
        (["alpha", "--num", "0"], "num is 0; it must be at least 1"),
        (["alpha", "--devices", "tpu"], "tpu"),
        (["guidance", "--quick", "--devices", "cpu", "--report", "/dev/null/pages"], "can't make /dev/null/pages"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert cli.main(["study", *arguments, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_list_names_all(capsys):
    assert cli.main(["study", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(catalogue.STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rate", "pairs"])
def test_quick_studies_end_to_end(name, tmp_path, capsys, monkeypatch):
    """As the command line runs them; fewer settings and samples."""
    study = catalogue.STUDIES[name]
    arms = tuple(replace(arm, settings=arm.settings[:1]) for arm in study.arms[:2])
    monkeypatch.setitem(catalogue.STUDIES, name, replace(study, arms=arms, verdict=catalogue._least_at(arms[0].name)))
    report = tmp_path / "report"
    options = ["--quick", "--seeds", "1", "--num", "20", "--devices", "cpu"]
    assert cli.main(["study", name, *options, "--out", str(tmp_path / "runs"), "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert f"{name}: 2 runs of 2 arms, 2 to do" in said
    assert (report / f"{name}.md").is_file()
    assert (tmp_path / "runs" / f"{name}-quick").is_dir()
    assert cli.main(["study", name, *options, "--out", str(tmp_path / "runs"), "--report", str(report)]) == 0
    assert "0 to do" in capsys.readouterr().out
