"""`ear cache`: interrupted, shared among processes, and given what it can't use."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from ear_model import cli
from ear_model.data import cache_format, cache_writer
from ear_model.data.cache import LatentCache
from ear_model.errors import RunError
from ear_model.files import DirectoryLock
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.kl16 import AutoencoderKL
from ear_model.tokenizers.latent import save_autoencoder
from tests.model.conftest import randomise, write_tree
from tests.model.test_cache import write

CONFIG = AutoencoderConfig(channels=32, multipliers=(1, 1), residual_blocks=1, latent_channels=4)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    write_tree(root, {"ant": 5, "bee": 4, "cat": 2}, size=16)
    return root


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "small.safetensors"
    save_autoencoder(path, randomise(AutoencoderKL(CONFIG)), 0.5)
    return path


def shards(cache):
    return sorted(path.name for path in cache.glob("shard-*"))


def test_killed_and_run_again(tmp_path, capsys):
    """SIGKILL in the middle: whole shards stay as they are, the rest is written, the result is the same."""
    tree = tmp_path / "tree"
    write_tree(tree, {"a": 80, "b": 80}, size=16)
    weights = tmp_path / "small.safetensors"
    save_autoencoder(weights, randomise(AutoencoderKL(CONFIG)), 0.5)
    options = ["--tokenizer", "autoencoder", "--weights", weights, "--image-size", "16", "--shard-size", "10"]
    command = [*map(str, [tree, *options, "--batch-size", "2", "--device", "cpu"])]

    killed = tmp_path / "killed"
    arguments = ["cache", *command, "--out", str(killed)]
    program = [sys.executable, "-m", "ear_model.cli", *arguments, "--workers", "1"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((killed / "build").glob("shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = [path.stem for path in (killed / "build").glob("shard-*")]
    assert 3 <= len(finished) < 16
    with pytest.raises(ValueError, match=r"is not finished .* run its `ear cache` command again"):
        LatentCache(killed)
    before = {name: (killed / f"{name}.safetensors").stat().st_mtime_ns for name in finished}
    (killed / ".tmp-1-shard-00015.safetensors").write_bytes(b"left by the killed run")
    assert cli.main([*arguments, "--workers", "0"]) == 0
    assert "160 images as moments (2, 8, 8, 8) of fp16 in 16 shards" in capsys.readouterr().out
    for name, changed in before.items():
        assert (killed / f"{name}.safetensors").stat().st_mtime_ns == changed
    assert not list(killed.glob(".tmp-*"))
    write(tree, tmp_path / "straight", weights, shard_size=10, batch_size=2)
    pair = [cache_format.load_manifest(out) for out in (killed, tmp_path / "straight")]
    assert [s.sha256 for s in pair[0].shards] == [s.sha256 for s in pair[1].shards]
    assert pair[0] == pair[1]


def test_again_is_nothing_and_missing_shards_come_back(tree, tmp_path):
    out = tmp_path / "cache"
    manifest = write(tree, out)
    times = {name: (out / name).stat().st_mtime_ns for name in shards(out)}
    assert write(tree, out) == manifest
    assert times == {name: (out / name).stat().st_mtime_ns for name in shards(out)}
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks"):
        LatentCache(out)
    assert write(tree, out) == manifest
    LatentCache(out)


def test_changed_options_and_trees_are_refused(tree, weights, tmp_path):
    out = tmp_path / "cache"
    write(tree, out, weights)
    for changes, match in [
        ({"image_size": 8}, "image_size 16, now 8"),
        ({"dtype": "fp32"}, "dtype 'fp16', now 'fp32'"),
        ({"flips": False}, "flips True, now False"),
        ({"shard_size": 5}, "shard_size 4, now 5"),
    ]:
        with pytest.raises(ValueError, match=rf"begun with other options \(.*{match}"):
            write(tree, out, weights, **changes)
    other = tmp_path / "other.safetensors"
    save_autoencoder(other, randomise(AutoencoderKL(CONFIG)), 0.5)
    with pytest.raises(ValueError, match="weights_sha256"):
        write(tree, out, other)
    os.utime(tree / "bee" / "2.png", ns=(1, 1))
    with pytest.raises(ValueError, match=r"images of shard 1 .* were changed since it was written"):
        write(tree, out, weights)
    (tree / "bee" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"another tree: .* \(11 images then, 10 now\)"):
        write(tree, out, weights)
    LatentCache(out)  # still whole


def test_unreadable_images_are_named_and_can_be_replaced(tree, tmp_path):
    out = tmp_path / "cache"
    good = (tree / "ant" / "1.png").read_bytes()
    for name in ("ant/1.png", "cat/0.png"):
        (tree / name).write_bytes(good[:50])
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"2 images can't be read: .*ant/1.png.*; .*cat/0.png") as error:
            write(tree, out, workers=workers)
        assert "bee" not in str(error.value)
        assert shards(out) == ["shard-00001.safetensors"]
    for name in ("ant/1.png", "cat/0.png"):
        (tree / name).write_bytes(good)
    write(tree, out)
    assert len(LatentCache(out)) == 11


def test_many_unreadable_images_are_listed_in_a_file(tmp_path):
    """All of them at once, after the shards without them: the message names 20."""
    root, out = tmp_path / "tree", tmp_path / "cache"
    write_tree(root, {"ant": 30, "bee": 8}, size=16)
    bad = [root / "ant" / f"{index}.png" for index in range(25)]
    for path in bad:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"25 images can't be read: .*; and 5 more \(all of them are in") as error:
        write(root, out)
    listing = out / "build" / "unreadable-0.txt"
    assert str(listing) in str(error.value)
    assert sorted(listing.read_text().split("\n")[:-1]) == sorted(f"{path} (it is empty)" for path in bad)
    assert shards(out) == ["shard-00008.safetensors", "shard-00009.safetensors"]
    for path in bad:
        path.write_bytes((root / "bee" / "0.png").read_bytes())
    write(root, out)
    assert not listing.exists()
    assert len(LatentCache(out)) == 38


def test_images_that_vanish_are_named(tree, tmp_path, monkeypatch):
    """Removed, or made a folder, after the tree was listed: the other shards are written."""
    out, find = tmp_path / "cache", cache_writer.find_images

    def then_removed(root, **options):
        found = find(root, **options)
        (root / "ant" / "1.png").unlink()
        (root / "cat" / "0.png").unlink()
        (root / "cat" / "0.png").mkdir()
        return found

    monkeypatch.setattr(cache_writer, "find_images", then_removed)
    with pytest.raises(ValueError, match=r"2 images can't be read: .*1.png \(No such file.*0.png \(it is no regular"):
        write(tree, out)
    assert shards(out) == ["shard-00001.safetensors"]


def test_another_process_is_kept_out(tree, tmp_path, capsys):
    """The directory is locked while it is written, by whole jobs or by processes of one, and free afterwards."""
    out = tmp_path / "cache"
    write(tree, out)
    options = ["--tokenizer", "pixels", "--image-size", "16", "--shard-size", "4", "--workers", "0"]
    with DirectoryLock(out):
        assert cli.main(["cache", str(tree), *options, "--out", str(out)]) == 1
        assert "is writing in" in capsys.readouterr().err
        assert write(tree, out, rank=1, world_size=2) is not None  # has a lock of its own
    with DirectoryLock(out / "build" / "process-1"), pytest.raises(ValueError, match="is writing in"):
        write(tree, out, rank=1, world_size=2)
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="begun with other options"):
        write(tree, out, flips=False)
    (tree / "bee" / "1.png").write_bytes(b"")
    (out / "build" / "shard-00001.json").unlink()
    with pytest.raises(ValueError, match="can't be read"):
        write(tree, out)
    with DirectoryLock(out):  # neither error has left it locked
        pass


def test_leftovers_of_killed_runs_are_removed(tree, tmp_path):
    out = tmp_path / "cache"
    write(tree, out)
    left = [".tmp-7-shard-00009.safetensors", ".tmp-7-manifest.json", "build/.tmp-7-shard-00000.json"]
    for name in left:
        (out / name).write_bytes(b"half")
    assert len(LatentCache(out)) == 11  # never read
    write(tree, out)
    assert not list(out.rglob(".tmp-*"))
    (out / left[0]).write_bytes(b"half")
    (out / left[2]).write_bytes(b"half")
    write(tree, out, rank=1, world_size=2)
    assert not list(out.rglob(".tmp-*"))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks /proc for child processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number, tmp_path):
    """Also where they wait to hand over images that nobody will take."""
    tree = tmp_path / "tree"
    write_tree(tree, {"a": 300}, size=16)
    options = ["--tokenizer", "pixels", "--image-size", "16", "--workers", "2", "--batch-size", "1"]
    options += ["--shard-size", "1", "--out", str(tmp_path / "cache")]
    program = [sys.executable, "-m", "ear_model.cli", "cache", str(tree), *options]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache" / "build").glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    assert len(workers) >= 2
    process.send_signal(number)
    process.wait(60)
    deadline = time.monotonic() + 4  # torch's own workers look for their parent every 5 seconds
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))


def test_a_killed_worker_is_one_line(tree, tmp_path, monkeypatch):
    """Such as by a machine without memory: what is kept is said, and the lock is given up."""
    out = tmp_path / "cache"
    read = cache_writer.read_image

    def killed(path, size):
        if path.name == "3.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, size)

    with monkeypatch.context() as patched:
        patched.setattr(cache_writer, "read_image", killed)
        with pytest.raises(RunError, match=r"process that decodes images was killed.*whole shards are kept"):
            write(tree, out, workers=1)
    assert len(write(tree, out)) == 11


def test_processes_share_the_shards(tree, weights, tmp_path):
    out = tmp_path / "cache"
    assert write(tree, out, weights, rank=1, world_size=2) is None
    assert shards(out) == ["shard-00001.safetensors"]
    manifest = write(tree, out, weights, rank=0, world_size=2)
    assert manifest is not None
    straight = write(tree, tmp_path / "straight", weights)
    assert manifest == straight
    with pytest.raises(ValueError, match=r"rank is 2; it must be in 0\.\.1"):
        write(tree, out, weights, rank=2, world_size=2)


def test_moments_that_half_precision_can_not_hold(tree, tmp_path):
    model = AutoencoderKL(CONFIG)
    with torch.no_grad():
        model.quant_conv.bias.fill_(1e5)
    weights = tmp_path / "large.safetensors"
    save_autoencoder(weights, model, 1.0)
    with pytest.raises(ValueError, match=r"not finite in fp16 .* use --dtype fp32"):
        write(tree, tmp_path / "cache", weights)
    write(tree, tmp_path / "full", weights, dtype="fp32")
    stored = safetensors.torch.load_file(tmp_path / "full" / "shard-00000.safetensors")
    assert stored["moments"][:, :, :4].min() > 9e4


def test_command(tree, weights, tmp_path, capsys):
    out = tmp_path / "cache"
    arguments = ["cache", str(tree), "--tokenizer", "autoencoder", "--weights", str(weights), "--image-size", "16"]
    assert cli.main([*arguments, "--out", str(out), "--dtype", "fp32", "--no-flips", "--workers", "0"]) == 0
    assert "11 images as moments (1, 8, 8, 8) of fp32 in 1 shards" in capsys.readouterr().out
    assert LatentCache(out).manifest.weights == "small.safetensors"
    shutil.rmtree(out)
    bad = [
        (["--tokenizer", "pixels"], "pixels need no weights"),
        (["--tokenizer", "kl16"], "is another autoencoder than KL-16"),
        (["--weights", str(tmp_path / "none.ckpt")], "are not there"),
        (["--image-size", "15"], "image size is 15; this tokenizer needs a multiple of 2"),
        (["--workers", "-1"], "workers is -1"),
        (["--shard-size", "0"], "shard_size is 0"),
        (["--dtype", "fp8"], "fp8"),
        (["--device", "tpu9"], "device 'tpu9'"),
    ]
    for options, named in bad:
        assert cli.main([*arguments, "--out", str(out), *options]) == 1
        captured = capsys.readouterr()
        assert named in captured.err
        assert captured.err.count("\n") == 1
        assert not out.exists()
    assert cli.main(["cache", str(tree), "--out", str(out)]) == 1
    assert "needs --weights" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(tree)]) == 1
    assert "is no cache that was begun" in capsys.readouterr().err
    assert cli.main(["cache", str(tmp_path / "none"), "--tokenizer", "pixels", "--out", str(out)]) == 1
    assert "none is not a directory" in capsys.readouterr().err
