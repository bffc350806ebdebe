"""The one reader of image trees: links, what is no regular file, hidden files, what can't be read, odd names."""

import errno
import os
import socket
import tempfile
from pathlib import Path

import pytest

from ear_model import cli
from ear_model.data.cache import LatentCache
from ear_model.data.image_tree import find_images
from ear_model.data.images import ImageFolderData, load_tree
from tests.model.conftest import write_tree

COUNTS = {"cat": 3, "dog": 3}


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    write_tree(root, COUNTS, size=16)
    return root


def names(tree):
    return [(path, tree.classes[label]) for path, label in zip(tree.paths, tree.labels.tolist(), strict=True)]


PLAIN = [(f"{name}/{index}.png", name) for name in COUNTS for index in range(3)]


@pytest.mark.parametrize(
    "links",
    [
        {"cat/up": ".."},
        {"cat/up": "..", "dog/up": ".."},
        {"cat/self": "."},
        {"cat/dogs": "../dog", "dog/cats": "../cat"},
        {"up": "..", "self": "."},
        {"kitty": "cat", "aardvark": "dog"},
        {"cat/far": "../../..", "dog/farther": "/"},
        {"cat/a": "deeper", "cat/deeper/b": "..", "dog/c": "../cat/deeper"},
    ],
    ids=str,
)
def test_links_within_and_around_a_tree_add_nothing(tree, links, capsys):
    """Every real directory is read once, as a part of the class that it lies in, whatever leads to it."""
    for link, target in links.items():
        (tree / link).parent.mkdir(exist_ok=True)
        (tree / link).symlink_to(target)
    assert names(find_images(tree)) == PLAIN
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(f"{tree / link} (a link to " in said for link in links)


def test_links_that_lead_out_are_followed_once(tree, tmp_path, capsys):
    """Trees made of links: of whole classes, of folders and of files; of two that share images the first in order."""
    outside = tmp_path / "outside"
    write_tree(outside, {"x": 2, "x/below": 1, "y": 1})
    (outside / "x" / "back").symlink_to("..")
    (tree / "bird").symlink_to(outside / "y")
    (tree / "fox").symlink_to(outside / "y")
    (tree / "cat" / "more").symlink_to(outside / "x")
    (tree / "dog" / "more").symlink_to(outside / "x" / "below")
    (tree / "dog" / "9.png").symlink_to(outside / "y" / "0.png")
    (tree / "dog" / "again").symlink_to(outside / "x")
    found = find_images(tree)
    assert found.classes == ("bird", "cat", "dog")
    outer = [("bird/0.png", "bird"), ("cat/more/0.png", "cat"), ("cat/more/1.png", "cat")]
    outer += [("cat/more/below/0.png", "cat"), ("dog/9.png", "dog")]
    assert sorted(names(found)) == sorted([*PLAIN, *outer])
    said = capsys.readouterr().err
    assert all(str(path) in said for path in (tree / "fox", tree / "dog" / "more", tree / "dog" / "again"))


def test_the_command_reads_every_directory_once(tree, tmp_path, capsys):
    for name in COUNTS:
        (tree / name / "up").symlink_to("..")
        (tree / name / "up2").symlink_to("..")
    out = tmp_path / "cache"
    options = ["--tokenizer", "pixels", "--image-size", "16", "--workers", "0", "--out", str(out)]
    assert cli.main(["cache", str(tree), *options]) == 0
    assert "6 images as" in capsys.readouterr().out
    assert LatentCache(out).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_tree_is_the_same_however_it_is_named(tree, tmp_path, monkeypatch):
    """From within, from beside, with a dot in its path, and by a link to it."""
    (tmp_path / "link").symlink_to("tree")
    for where, root in ((tree, "."), (tmp_path, "tree"), (tmp_path, "tree/../tree/"), (tmp_path, tmp_path / "link")):
        monkeypatch.chdir(where)
        found = find_images(root)
        assert names(found) == PLAIN
        assert found.files_digest(0, 6) == find_images(tree).files_digest(0, 6)
        assert all((found.root / path).is_file() for path in found.paths)


def test_only_regular_files_are_read(tree, capsys):
    """A pipe would be waited for, for ever."""
    os.mkfifo(tree / "cat" / "pipe.png")
    os.mkfifo(tree / "cat" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tree)  # the name of a socket is short
        listener.bind("dog/socket.jpg")
        os.chdir(here)
        (tree / "dog" / "null.png").symlink_to("/dev/null")
        (tree / "dog" / "through.png").symlink_to("../cat/pipe.png")
        assert names(find_images(tree)) == PLAIN
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert all(
            name in said for name in ("cat/pipe.png (no regular file)", "socket.jpg", "null.png", "through.png")
        )
        assert len(load_tree(tree, 8).labels) == len(ImageFolderData(tree, 8)) == 6


def test_hidden_and_temporary_files_are_never_read(tree, capsys):
    whole = (tree / "cat" / "0.png").read_bytes()
    for name in (
        "cat/.tmp-12-000007.png",
        "cat/._0.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "dog/x.png~",
        "dog/x.png.part",
    ):
        (tree / name).write_bytes(whole)
    for folder in (".git", ".tmp-1-bird", "cat/.thumbnails", "cat/deeper/.cache"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "0.png").write_bytes(whole)
    (tree / "cat" / ".loop").symlink_to("..")
    assert names(find_images(tree)) == PLAIN
    assert capsys.readouterr().err == ""


def test_all_that_can_not_be_listed_is_named_at_once(tree, tmp_path, monkeypatch, capsys):
    """Folders without permission and links that lead nowhere: an error before any work, not fewer images."""
    for folder in ("cat/locked", "dog/deeper/locked"):
        write_tree(tree, {folder: 1})
    (tree / "dog" / "gone.png").symlink_to("nowhere.png")
    (tree / "dog" / "unmounted").symlink_to("/nowhere/images")
    (tree / "cat" / "ouroboros").symlink_to("ouroboros")
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    out = tmp_path / "cache"
    assert cli.main(["cache", str(tree), "--tokenizer", "pixels", "--image-size", "16", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "5 folders or links can't be read" in said
    for named in ("cat/locked (Permission denied)", "dog/deeper/locked (Permission denied)", "dog/gone.png (No such"):
        assert named in said
    assert "dog/unmounted (No such" in said
    assert "cat/ouroboros (Too many levels" in said
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights in a child")
def test_a_folder_of_mode_000_is_an_error():
    """As the system says it, to somebody who is not root."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own are root's alone
        root = Path(name)
        root.chmod(0o755)
        write_tree(root, {**COUNTS, "cat/locked": 1})
        (root / "cat" / "locked").chmod(0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(65534)
                find_images(root)
            except ValueError as error:
                status = 0 if "cat/locked (Permission denied)" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_names_of_every_kind(tree, tmp_path):
    """Names that differ by case are two, file names that are not UTF-8 are files; a class of such a name is refused,
    as no manifest can hold it."""
    whole = (tree / "cat" / "0.png").read_bytes()
    odd = os.fsdecode(b"\xff\xfe.png")
    for name in ("A.png", "a.png", "line\nbreak.PNG", odd):
        (tree / "cat" / name).write_bytes(whole)
    (tree / "Cat").mkdir()
    (tree / "Cat" / "0.png").write_bytes(whole)
    found = find_images(tree)
    assert found.classes == ("Cat", "cat", "dog")
    assert {f"cat/{name}" for name in ("A.png", "a.png", "line\nbreak.PNG", odd)} < set(found.paths)
    assert len(found.names_digest()) == len(found.files_digest(0, len(found))) == 64
    out = tmp_path / "cache"
    options = ["--tokenizer", "pixels", "--image-size", "16", "--workers", "0", "--out", str(out)]
    assert cli.main(["cache", str(tree), *options]) == 0
    assert len(LatentCache(out)) == 11
    (tree / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(ValueError, match="not UTF-8"):
        find_images(tree)


def test_empty_classes_only_if_asked_for(tree, tmp_path, capsys):
    """`--allow-empty` keeps a folder's label; a tree without any image stays an error."""
    (tree / "bird" / "deeper").mkdir(parents=True)
    out = tmp_path / "cache"
    options = ["--tokenizer", "pixels", "--image-size", "16", "--workers", "0", "--out", str(out)]
    assert cli.main(["cache", str(tree), *options]) == 1
    assert "bird has no files of" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["cache", str(tree), *options, "--allow-empty"]) == 0
    cache = LatentCache(out)
    assert cache.classes == ("bird", "cat", "dog")
    assert cache.labels.tolist() == [1, 1, 1, 2, 2, 2]
    (tmp_path / "hollow" / "bird").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no files"):
        find_images(tmp_path / "hollow", allow_empty=True)


TINY_JUDGE = "--channels 4 4 4 4 --epochs 1 --batch-size 8 --image-size 16 --device cpu"
TINY_TOKENIZER = (
    "--image-size 8 --steps 2 --batch-size 4 --workers 2 --device cpu --model.channels 32 --model.multipliers 1 1 "
    "--model.residual-blocks 1 --model.latent-channels 4"
)


def commands(tree, tmp_path):
    yield ["train-judge", str(tree), "--out", str(tmp_path / "judge.safetensors"), *TINY_JUDGE.split()]
    yield ["train-tokenizer", str(tree), "--out", str(tmp_path / "small.safetensors"), *TINY_TOKENIZER.split()]


def test_tokenizer_and_judge_take_empty_classes_too(tree, tmp_path, capsys):
    """And remove what killed ones left where they write."""
    (tree / "bird").mkdir()
    for name in ("judge.safetensors", "small.safetensors", "small.safetensors.partial"):
        (tmp_path / f".tmp-7-{name}").write_bytes(b"half")
    for command in commands(tree, tmp_path):
        assert cli.main(command) == 1
        assert "bird has no files of" in capsys.readouterr().err
        assert cli.main([*command, "--allow-empty"]) == 0
    assert not list(tmp_path.glob(".tmp-*"))


def test_tokenizer_and_judge_name_all_images_that_can_not_be_read(tree, tmp_path, capsys):
    bad = ("cat/0.png", "dog/0.png", "dog/2.png")
    for name in bad:
        (tree / name).write_bytes((tree / name).read_bytes()[:60])
    judge, tokenizer = commands(tree, tmp_path)
    size = judge.index("--image-size")
    for command in (judge, judge[:size] + judge[size + 2 :], tokenizer):
        assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("ear: error: 3 images can't be read: ")
        assert all(name in said for name in bad)
