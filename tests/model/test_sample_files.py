"""`ear sample` writing many files: interrupted, killed, shared among processes, refused."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model import cli, files
from ear_model.config import ModelConfig
from ear_model.ear import EAR
from ear_model.files import DirectoryLock
from ear_model.presets import DIGITS
from ear_model.run_dir import save_config
from ear_model.sampling import tree
from ear_model.training import checkpoint
from tests.conftest import SESSION_SEED
from tests.model.conftest import TINY, tiny_run

ROOT = Path(__file__).parents[2]


def write_run(run: Path, config: ModelConfig = TINY) -> Path:
    """A run of a model whose images all differ; the same in every call of a session."""
    torch.manual_seed(SESSION_SEED)
    model = EAR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    run.mkdir()
    save_config(run, dataclasses.replace(tiny_run(), model=config))
    checkpoint.save_checkpoint(run, 1, model, dict(model.named_parameters()), {})
    return run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def command(run: Path, num: int, *options: object) -> list[str]:
    return ["sample", str(run), "--num", str(num), "--device", "cpu", *map(str, options)]


def pngs(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/*.png"))}


def check_whole(out: Path, num: int) -> None:
    """Exactly ``num`` distinct images, as many of each class, and nothing else."""
    images = pngs(out)
    assert sorted(int(Path(name).stem) for name in images) == list(range(num))
    assert len(set(images.values())) == num
    assert Counter(name.split("/")[0] for name in images) == {f"{label:04d}": num // 10 for label in range(10)}
    others = {path.name for path in out.rglob("*") if path.is_file()} - {Path(name).name for name in images}
    assert others == {"sampling.json"}


def check_npz(npz: Path, out: Path, num: int) -> None:
    with np.load(npz) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1"]
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((num, 8, 8, 3), np.uint8, np.int64)
    for name in pngs(out):
        label, index = (int(part) for part in re.findall(r"\d+", name))
        assert labels[index] == label
        assert np.array_equal(pixels[index], np.asarray(Image.open(out / name)))


def test_tree_and_npz_are_whole_and_balanced(run, tmp_path, capsys):
    out, npz = tmp_path / "new" / "images", tmp_path / "other" / "a[1].npz"
    options = command(run, 20, "--images-out", out, "--npz", npz, "--batch-size", 6)
    assert cli.main(options) == 0
    assert re.fullmatch(
        rf"20 images, 20 of them new, in .* s: {out} and {re.escape(str(npz))}\n", capsys.readouterr().out
    )
    check_whole(out, 20)
    check_npz(npz, out, 20)
    assert Image.open(next(out.glob("*/*.png"))).mode == "RGB"
    assert sorted(path.name for path in npz.parent.iterdir()) == ["a[1].npz", "a[1].npz.json"]
    settings = json.loads((out / "sampling.json").read_text())
    assert settings.pop("run") == str(run)
    assert settings.pop("tokenizer") == ""
    assert settings == json.loads((tmp_path / "other" / "a[1].npz.json").read_text())
    assert settings["precision"] == "fp32"
    assert len(settings["weights_sha256"]) == 64
    # Neither the batch size nor what is there already changes an image, or the file of all.
    before, whole = pngs(out), npz.read_bytes()
    for name in list(before)[3::7]:
        (out / name).unlink()
    half = out / list(before)[1]
    half.write_bytes(half.read_bytes()[:-20])  # as a power cut leaves it
    npz.unlink()
    for leftover in (
        out / "0003" / ".tmp-1-000006.png",
        out / ".tmp-1-sampling.json",
        npz.parent / f".tmp-1-{npz.name}",
    ):
        leftover.write_bytes(b"killed")
    assert cli.main([*options, "--batch-size", "auto"]) == 0
    assert "20 images, 4 of them new" in capsys.readouterr().out
    check_whole(out, 20)
    assert (pngs(out), npz.read_bytes()) == (before, whole)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert cli.main(options) == 0
    assert "20 images, 0 of them new" in capsys.readouterr().out


def test_an_npz_alone_goes_on(run, tmp_path, capsys, monkeypatch):
    whole, npz = tmp_path / "whole.npz", tmp_path / "images.npz"
    assert cli.main(command(run, 30, "--npz", whole)) == 0
    written = []

    def failing(path, pixels):
        if len(written) == 13:
            raise OSError(28, "No space left on device")
        written.append(path)
        files.save_picture(path, pixels)

    options = command(run, 30, "--npz", npz, "--batch-size", 4)
    monkeypatch.setattr(tree, "save_picture", failing)
    assert cli.main(options) == 1
    words = "No space left on device; images of --images-out and --npz are kept, the same command goes on"
    assert capsys.readouterr().err == f"ear: error: {words}\n"
    parts = tmp_path / "images.npz.parts"
    assert len(pngs(parts)) == 13
    assert not npz.exists()
    monkeypatch.undo()
    assert cli.main(options) == 0
    assert "30 images, 17 of them new" in capsys.readouterr().out
    assert npz.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("images")) == [
        "images.npz",
        "images.npz.json",
    ]
    assert cli.main(options) == 0
    assert "30 images, 0 of them new" in capsys.readouterr().out
    assert cli.main([*options, "--steps", "3"]) == 1
    assert "holds another set of sampled images (steps is 4 there, 3 here)" in capsys.readouterr().err
    (tmp_path / "images.npz.json").unlink()
    assert cli.main(options) == 1
    assert "exists and is no set of sampled images" in capsys.readouterr().err


def test_what_differs_is_named(run, tmp_path, capsys):
    out = tmp_path / "images"
    options = command(run, 10, "--images-out", out, "--steps", 2)
    assert cli.main(options) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    capsys.readouterr()
    for more, named in (
        (["--seed", 2**80], f"(seed is 0 there, {2**80} here)"),
        (["--guidance", 1.5, "--temperature", 0.1], "(guidance is 3.0 there, 1.5 here, temperature is 0.7 there"),
        (["--classes", 3, 4], "(classes is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] there, [3, 4] here)"),
        (["--precision", "bf16"], '(precision is "fp32" there, "bf16" here)'),
        (["--raw-weights"], '(weights_sha256 is "'),
    ):
        if more == ["--raw-weights"]:
            other = EAR(TINY)
            checkpoint.save_checkpoint(run, 2, other, dict(other.named_parameters()), {})
        assert cli.main([*options, *map(str, more)]) == 1
        error = capsys.readouterr().err
        assert f"{out} holds another set of sampled images {named}" in error
        assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    assert cli.main([*options[:-4], "--images-out", str(run)]) == 1
    assert "is no set of sampled images (it has no sampling.json)" in capsys.readouterr().err


def test_a_second_process_is_refused(run, tmp_path, capsys):
    out = tmp_path / "images"
    out.mkdir()
    with DirectoryLock(out) as lock:
        for _ in range(2):
            assert cli.main(command(run, 10, "--images-out", out)) == 1
            error = capsys.readouterr().err
            assert error == f"ear: error: process {os.getpid()} is writing in {out}; wait for it, or end it\n"
            lock.share()
        assert not list(out.iterdir())
    assert cli.main(command(run, 10, "--images-out", out)) == 0
    check_whole(out, 10)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--seed", "1.5"], "seed"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1, or auto"),
        (["--batch-size", "much"], "much"),
        (["--precision", "fp7"], "precision is 'fp7'"),
        (["--precision", "fp8"], "precision is 'fp8'; it needs a GPU"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--guidance", "inf"], "guidance is inf"),
        (["--steps", "0"], "steps is 0"),
        (["--classes"], "no classes were given"),
        (["--classes", "-1"], "class -1 is out of range"),
        (["--num", "-5"], "num is -5"),
        (["--images-out", "/proc/none/images"], "can't write in /proc/none/images"),
        (["--npz", "/proc/none/a.npz"], "can't write in /proc/none"),
        (["--npz", "/tmp"], "/tmp is a directory; give the name of a file"),
        (["--out", "a.png", "--npz", "a.npz"], "give one kind"),
    ],
)
def test_bad_options_are_one_line(run, options, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not {"--images-out", "--npz"} & set(options):
        options = [*options, "--images-out", "images"]
    assert cli.main(["sample", str(run), *options, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("options", [["--num", "5000"], []])
def test_pictures_are_small_and_of_one_process(run, options, monkeypatch, capsys):
    named = "num is 5000; a picture holds 4096 images: give --images-out or --npz"
    if not options:
        named = "4 processes can't share one picture"
        monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["sample", str(run), *options]) == 1
    assert named in capsys.readouterr().err


def test_what_is_unusual_works(run, tmp_path, capsys):
    for number, options in enumerate((["--steps", 40], ["--steps", 1], ["--guidance", 1.0000001], ["--classes", 3])):
        out = tmp_path / str(number)
        assert cli.main(command(run, 3, "--images-out", out, *options)) == 0
        assert len(set(pngs(out).values())) == 3
    assert {name.split("/")[0] for name in pngs(tmp_path / "3")} == {"0003"}
    assert cli.main(command(run, 3, "--classes", 3)) == 0
    assert "3 images of classes [3]" in capsys.readouterr().out


# One image at a time, in many steps: there is time to kill a process between two files.
SLOWLY = ("--batch-size", 1, "--steps", 16, "--guidance", 2)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Forked from a server that has imported what the command needs: a start of it takes no seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [__name__, "tyro", "tqdm", "ear_model.commands.sample", "ear_model.training.distributed"]
)


def run_command(options: list[str]) -> None:
    torch.set_num_threads(1)
    sys.exit(cli.main(options))


def kill_and_go_on(options: list[str], parts: Path, num: int, kills: int) -> None:
    """Start the command, kill it at a random moment after some images more, and at last let it end."""
    chosen = random.Random(SESSION_SEED)
    killed = 0
    for left in range(kills, 0, -1):
        here = len(list(parts.glob("*/*.png")))
        wanted = here + chosen.randint(1, max(1, 2 * (num - here) // (left + 1)))
        process = CONTEXT.Process(target=run_command, args=(options,))
        process.start()
        while len(list(parts.glob("*/*.png"))) < min(wanted, num) and process.is_alive():
            time.sleep(0.001)
        time.sleep(chosen.random() * 0.1)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= kills // 2, "most ended before they were killed"
    process = CONTEXT.Process(target=run_command, args=(options,))
    process.start()
    process.join(600)
    assert process.exitcode == 0


@pytest.mark.slow
def test_killed_and_started_again(run, tmp_path):
    out = tmp_path / "images"
    options = command(run, 60, "--images-out", out, "--npz", tmp_path / "images.npz", *SLOWLY)
    kill_and_go_on(options, out, 60, kills=4)
    check_whole(out, 60)
    check_npz(tmp_path / "images.npz", out, 60)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert cli.main(command(run, 60, "--images-out", tmp_path / "at once", "--steps", 16, "--guidance", 2)) == 0
    assert differing(pngs(out), pngs(tmp_path / "at once")) <= 1


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_images_through_many_kills(tmp_path):
    """Ends with exactly 1,000 distinct, class-balanced files; an .npz alone, whose parts are removed at last."""
    run = write_run(tmp_path / "run", DIGITS)
    out, npz = tmp_path / "images", tmp_path / "images.npz"
    kill_and_go_on(command(run, 1000, "--images-out", out, *SLOWLY), out, 1000, kills=100)
    check_whole(out, 1000)
    kill_and_go_on(command(run, 1000, "--npz", npz, *SLOWLY), tmp_path / "images.npz.parts", 1000, kills=40)
    check_npz(npz, out, 1000)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert not (tmp_path / "images.npz.parts").exists()


def differing(images: dict[str, bytes], others: dict[str, bytes]) -> int:
    """Grey levels that two sets of PNGs differ by at most."""
    assert images.keys() == others.keys()
    pairs = (
        [np.asarray(Image.open(io.BytesIO(found[name]))).astype(int) for found in (images, others)] for name in images
    )
    return max(int(np.abs(one - other).max()) for one, other in pairs)


def torchrun(*options: str) -> subprocess.Popen:
    # The two dashes: torchrun would take --num for an abbreviation of its own options.
    return start("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--", "ear_model.cli", *options)


@pytest.mark.slow
def test_two_processes_write_what_one_does(run, tmp_path):
    """Also when one of them is killed, and when a single process goes on with what two left."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(command(run, 60, "--images-out", one, "--npz", tmp_path / "one.npz", *SLOWLY)) == 0
    options = command(run, 60, "--images-out", two, "--npz", tmp_path / "two.npz", *SLOWLY)
    job = torchrun(*options)
    while len(list(two.glob("*/[!.]*.png"))) < 6:  # not the temporary ones, which go
        assert job.poll() is None, job.communicate()[1][-2000:]
        time.sleep(0.01)
    victim = next(pid for pid in workers(job) if rank_of(pid) == SESSION_SEED % 2)
    os.kill(victim, signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    assert f'File "{ROOT}' not in errors  # torchrun's own traceback is there, none of ours
    assert len(list(two.glob("*/[!.]*.png"))) < 60
    assert not (tmp_path / "two.npz").exists()
    job = torchrun(*options)
    output, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors[-2000:]
    assert output.count("60 images") == 1
    check_whole(two, 60)
    check_npz(tmp_path / "two.npz", two, 60)
    assert differing(pngs(one), pngs(two)) <= 1
    for name in list(pngs(two))[::9]:
        (two / name).unlink()
    assert cli.main(options) == 0
    assert differing(pngs(one), pngs(two)) <= 1
    assert (tmp_path / "two.npz").stat().st_size == (tmp_path / "one.npz").stat().st_size


@pytest.mark.slow
def test_two_processes_report_an_error_once(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for options in (["--images-out", tmp_path / "other"], ["--images-out", tmp_path / "new", "--steps", 0]):
        job = torchrun(*command(run, 10, *options))
        _, errors = job.communicate(timeout=120)
        assert job.returncode != 0
        assert errors.count("ear: error:") == 1
    assert not (tmp_path / "new").exists()


def workers(job: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]


def rank_of(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), -1)
