"""The glyphs: determinism, what a picture must show, the image tree, and its errors."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ear_model import cli
from ear_model.data import glyphs


def test_an_image_depends_on_seed_split_class_and_index_alone():
    image = glyphs.render_glyph(7, 5, seed=3, size=32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, glyphs.render_glyph(7, 5, seed=3, size=32))
    others = [
        glyphs.render_glyph(7, 6, seed=3, size=32),
        glyphs.render_glyph(8, 5, seed=3, size=32),
        glyphs.render_glyph(7, 5, seed=4, size=32),
        glyphs.render_glyph(7, 5, seed=3, size=32, split="test"),
    ]
    assert all((image != other).any() for other in others)


def test_a_tree_is_its_images_on_any_number_of_processes(tmp_path):
    for workers in (1, 2, 2**40):
        assert glyphs.write_tree(tmp_path / str(workers), 102, num_classes=2, size=8, seed=2, workers=workers) == 204
    for label, index in ((0, 0), (0, 99), (1, 100), (1, 101)):
        paths = [
            tmp_path / str(workers) / glyphs.CLASS_NAMES[label] / f"{index:06d}.png" for workers in (1, 2, 2**40)
        ]
        assert len({path.read_bytes() for path in paths}) == 1
        single = glyphs.render_glyph(label, index, seed=2, size=8)
        np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), single)


def test_every_character_has_ink_in_every_font():
    """Each (font, character) draws something of its own: no empty glyph and no box for a missing one."""
    stencils = {
        (font, character): glyphs._stencil(character, font)
        for font in glyphs.FONTS
        for character in glyphs.CHARACTERS
    }
    for font in glyphs.FONTS:
        drawings = Counter(stencils[font, character].tobytes() for character in glyphs.CHARACTERS)
        assert max(drawings.values()) == 1, font
    assert min(np.asarray(stencil).max() for stencil in stencils.values()) == 255


def test_characters_stay_inside_and_stand_out():
    luma_differences = []
    for index in range(150):
        random = np.random.default_rng((0, 0, index % 48, index))
        coverage = glyphs._coverage(random, glyphs.CHARACTERS[index % 48], 64)
        border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert border.max() == 0
        rows = np.flatnonzero(coverage.max(axis=1) > 0.5)
        columns = np.flatnonzero(coverage.max(axis=0) > 0.5)
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 20 <= longer <= 58, index
        ink, first, second = glyphs._colours(random)
        luma_differences += [abs(glyphs._LUMA @ (ink - first)), abs(glyphs._LUMA @ (ink - second))]
        mixture = glyphs._background(random, 64)
        assert mixture.min() >= 0
        assert mixture.max() <= 1
    assert min(luma_differences) >= 80


def test_class_names_are_the_sorted_directories():
    assert len(set(glyphs.CHARACTERS)) == len(glyphs.CLASS_NAMES) == 48
    assert list(glyphs.CLASS_NAMES) == sorted(glyphs.CLASS_NAMES)
    assert len({name.lower() for name in glyphs.CLASS_NAMES}) == 48


def test_the_command_writes_completes_and_refuses(tmp_path, capsys):
    tree = tmp_path / "tree"
    options = ["glyphs", "--out", str(tree), "--classes", "3", "--size", "16", "--workers", "1"]
    assert cli.main([*options, "--num-per-class", "2"]) == 0
    files = sorted(tree.glob("*/*.png"))
    assert [path.parent.name for path in files[::2]] == list(glyphs.CLASS_NAMES[:3])
    np.testing.assert_array_equal(np.asarray(Image.open(files[-1])), glyphs.render_glyph(2, 1, size=16))
    whole = {path: path.read_bytes() for path in files}
    stamp = files[0].stat().st_mtime_ns
    files[1].write_bytes(whole[files[1]][:-20])  # what a crash of the machine may leave
    files[2].unlink()
    assert cli.main([*options, "--num-per-class", "3"]) == 0
    assert "9 images of 3 classes, 5 drawn now" in capsys.readouterr().out
    assert len(list(tree.glob("*/*.png"))) == 9
    assert {path: path.read_bytes() for path in files} == whole
    assert files[0].stat().st_mtime_ns == stamp
    assert not list(tree.rglob(".tmp-*"))
    assert json.loads((tree / glyphs.MANIFEST).read_text())["characters"] == "123"
    assert cli.main([*options, "--num-per-class", "2", "--seed", "1"]) == 1
    assert "holds another glyph tree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--classes", "63"], "classes is 63; it must be in 1..48"),
        (["--size", "4"], "size is 4"),
        (["--seed", "-1"], "seed is -1"),
        (["--num-per-class", "0"], "num_per_class is 0"),
        (["--workers", "-2"], "workers is -2"),
        (["--workers", "1025"], "workers is 1025; it must be from 0 to 1024"),
        (["--split", "validation"], "validation"),
    ],
)
def test_bad_options_leave_nothing(options, named, tmp_path, capsys):
    out = tmp_path / "tree"
    given = ["--num-per-class", "1"] if "--num-per-class" not in options else []
    assert cli.main(["glyphs", "--out", str(out), *given, *options]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_a_directory_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    assert cli.main(["glyphs", "--out", str(tmp_path), "--num-per-class", "1"]) == 1
    assert "is no glyph tree" in capsys.readouterr().err


def test_a_font_that_is_not_shipped_is_named():
    with pytest.raises(ValueError, match="does not ship the font Comic"):
        glyphs.font_file("Comic")
    with pytest.raises(ValueError, match="has no glyph for 123"):
        glyphs.font_file("STIXSizOneSymReg")
