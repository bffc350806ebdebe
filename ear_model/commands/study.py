"""``ear study``: one of the paper's findings, asked again with small runs."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.config_checks import check_range
from ear_model.errors import words_of
from ear_model.files import DirectoryLock, require_writable


@dataclass(frozen=True)
class StudyCommand:
    """Train the runs of a study side by side, score their samples, and write its page, plot and table."""

    name: tyro.conf.Positional[str]
    """The study; `ear study list` lists them."""
    out: Path = Path("studies")
    """Directory of the runs, OUT/<study>/<arm>/<seed>; the same call goes on after an interruption."""
    report: Path = Path("docs/studies")
    """Directory of the page, the plot, the results and the table of all studies, which are rewritten."""
    seeds: int = 3
    """Runs of every arm, with the seeds 0, 1, ..."""
    num: int = 1000
    """Samples that a setting is scored on."""
    quick: bool = False
    """Very short runs in OUT/<study>-quick, which show that all works and tell nothing."""
    devices: tuple[str, ...] = ("auto",)
    """auto (a GPU if there is one), cpu, cuda, cuda:1; several share the runs."""
    at_once: int = 0
    """Runs side by side on each device; 0 is one a core on a CPU and six on a GPU."""
    estimate: bool = False
    """Print how many runs there are and how long they take, and stop."""

    def __post_init__(self) -> None:
        check_range(self, "from 1 to 1024", "seeds")
        check_range(self, "from 0 to 1024", "at_once")
        check_range(self, "at least 1", "num")


AT_ONCE_ON_A_GPU = 6


def run(arguments: list[str]) -> int:
    """The command; returns the exit status.

    Raises:
        ValueError: what can't be studied. RunError: a run failed.
    """
    from ear_model.studies.catalogue import STUDIES

    if arguments[:1] == ["list"]:
        for study in STUDIES.values():
            print(f"{study.name:12s} {study.source}: {study.claim} ({len(study.arms)} arms)")
        return 0
    command = parse_command(StudyCommand, arguments, "ear study")
    if command.name not in STUDIES:
        raise ValueError(f"unknown study {command.name!r}; use one of {', '.join(STUDIES)}, or list")
    from ear_model.devices import resolve_device
    from ear_model.studies import pages, runner

    study = STUDIES[command.name]
    devices = [str(resolve_device(device)) for device in command.devices]
    at_once = command.at_once or ((os.cpu_count() or 1) if devices == ["cpu"] else AT_ONCE_ON_A_GPU)
    folder = command.out / (f"{study.name}-quick" if command.quick else study.name)
    jobs = runner.jobs_of(study, folder.absolute(), command.seeds, command.num, quick=command.quick)
    waiting = [job for job in jobs if job.result() is None]
    beside = at_once * len(devices)
    left = runner.seconds(waiting, devices[0]) / min(beside, max(1, len(waiting)))
    print(
        f"{study.name}: {len(jobs)} runs of {len(study.arms)} arms, {len(waiting)} to do, {beside} at once on "
        f"{', '.join(devices)}: about {left / 60:.1f} minutes of training, and sampling",
        flush=True,
    )
    if command.estimate:
        return 0
    # What would stop the page after hours of runs, before them.
    for directory in (command.report, folder):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"can't make {directory}: {words_of(error)}") from error
    require_writable(command.report / f"{study.name}.md")
    with DirectoryLock(folder):
        runner.prepare(jobs)
        runner.run_jobs(jobs, devices, at_once)
    results = [found for job in jobs if (found := job.result()) is not None]
    options = ["--seeds", str(command.seeds), *(["--num", str(command.num)] if command.num != 1000 else [])]
    words = shlex.join(["ear", "study", study.name, *options, *(["--quick"] if command.quick else [])])
    page = pages.write(study, results, words, command.report, quick=command.quick)
    print(page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    print(f"page: {page}   results: {page.with_suffix('.json')}")
    return 0
