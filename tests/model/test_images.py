"""Trees of images, and the centre crop."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model.data import images
from ear_model.data.batches import Batches
from ear_model.data.image_tree import find_images
from ear_model.data.images import ImageFolderData, UnreadableImageError, centre_crop, open_image, read_image
from tests.model.conftest import write_tree


def test_classes_and_images_are_sorted(tmp_path):
    write_tree(tmp_path, {"b": 3, "a": 2})
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "deeper" / "x.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.png").write_text("in no class")
    tree = find_images(tmp_path)
    assert tree.classes == ("a", "b")
    assert tree.paths == ("a/1.png", "a/deeper/x.PNG", "b/0.png", "b/1.png", "b/2.png")
    assert tree.labels.tolist() == [0, 0, 1, 1, 1]


def test_trees_that_are_none(tmp_path):
    for path, match in ((tmp_path / "none", "not a directory"), (tmp_path, "no folders")):
        with pytest.raises(ValueError, match=match):
            find_images(path)
    write_tree(tmp_path, {"a": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no files"):
        find_images(tmp_path)


def test_digests_notice_changes(tmp_path):
    write_tree(tmp_path, {"a": 3})
    tree = find_images(tmp_path)
    names, files = tree.names_digest(), tree.files_digest(0, 3)
    assert find_images(tmp_path).files_digest(0, 3) == files
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert tree.files_digest(0, 3) != files
    assert tree.files_digest(0, 1) == find_images(tmp_path).files_digest(0, 1)
    assert find_images(tmp_path).names_digest() == names
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "4.png")
    assert find_images(tmp_path).names_digest() != names


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (300, 129), (20, 30), (257, 31)])
def test_centre_crop_is_adms(size):
    """Against its steps taken one by one on arrays, where a box filter of two is a mean of pairs."""
    target = 32
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = np.asarray(centre_crop(Image.fromarray(pixels), target)).astype(float)
    assert found.shape == (target, target, 3)
    halved = pixels
    while min(halved.shape[:2]) >= 2 * target:
        height, width = halved.shape[0] // 2, halved.shape[1] // 2
        if halved.shape[0] % 2 == 0 and halved.shape[1] % 2 == 0:
            mean = halved.reshape(height, 2, width, 2, 3).astype(float).mean((1, 3))
            halved = np.floor(mean + 0.5).astype(np.uint8)
        else:  # an odd side: the box is a little wider than two pixels
            halved = np.asarray(Image.fromarray(halved).resize((width, height), Image.Resampling.BOX))
    scale = target / min(halved.shape[:2])
    shape = (round(halved.shape[1] * scale), round(halved.shape[0] * scale))
    resized = np.asarray(Image.fromarray(halved).resize(shape, Image.Resampling.BICUBIC)).astype(float)
    top, left = (resized.shape[0] - target) // 2, (resized.shape[1] - target) // 2
    assert np.abs(found - resized[top : top + target, left : left + target]).max() <= 2


def test_modes_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png", 8)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(grey).expand(3, 8, 8))
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 8)[0].min() == 200


def test_unreadable_images_are_named(tmp_path):
    write_tree(tmp_path, {"a": 1})
    whole = tmp_path / "a" / "0.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("cut.png", "text.png", "deep.png", "none.png"):
        with pytest.raises(UnreadableImageError, match=name):
            read_image(tmp_path / name, 8)


ORIENTATION = 0x0112


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_the_orientation_tag_is_applied(tag, suffix, tmp_path):
    """A picture stored turned or mirrored, as cameras do, is read upright: by what the tag's text says of row 0 and
    column 0 of the stored picture."""
    upright = np.full((24, 40, 3), 30, dtype=np.uint8)
    upright[:8, :16], upright[:8, 24:], upright[16:, :16] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}
    columns = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    stored = upright.transpose(1, 0, 2) if tag > 4 else upright
    if rows[tag] in ("bottom", "right"):
        stored = stored[::-1]
    if columns[tag] in ("right", "bottom"):
        stored = stored[:, ::-1]
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    path = tmp_path / f"image.{suffix}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    found = np.asarray(open_image(path)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (12 if suffix == "jpg" else 0)


def test_damaged_metadata_turns_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for tags in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        Image.fromarray(pixels).save(tmp_path / "image.png", exif=tags)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image.png")), pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = 77
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "image.png")), pixels)


def png(width, height, rows, depth=8, colour=2):
    """A PNG file of any header and any rows."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_modes_of_every_kind(tmp_path):
    """Palettes, CMYK, 16-bit colour, two-level images, animations: their colours, first frame, and no warning."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    palette = image.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    palette.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    colours = np.asarray(palette.convert("RGB"))
    deep = rng.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "deep.png").write_bytes(png(8, 8, rows, depth=16))
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    image.convert("1").save(tmp_path / "levels.png")
    image.convert("LA").save(tmp_path / "grey.png")
    other = Image.fromarray(255 - pixels)
    image.save(tmp_path / "moving.png", save_all=True, append_images=[other])
    image.save(tmp_path / "moving.webp", save_all=True, append_images=[other], lossless=True)
    image.save(tmp_path / "pages.tiff", save_all=True, append_images=[other])
    levels, grey = (np.asarray(image.convert(mode).convert("RGB")) for mode in ("1", "L"))
    expected = {"palette.png": colours, "deep.png": deep >> 8, "cmyk.tiff": pixels, "levels.png": levels}
    expected |= {"grey.png": grey, "moving.png": pixels, "moving.webp": pixels, "pages.tiff": pixels}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, colours in expected.items():
            np.testing.assert_array_equal(read_image(tmp_path / name, 8).permute(1, 2, 0).numpy(), colours, name)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 9_000), (40, 5_000)])
def test_long_images_take_memory_by_the_crop(shape, tmp_path, monkeypatch):
    """1 x 20,000 pixels enlarged whole to a short side of 256 are 1.3 billion; the middle alone is what is kept."""
    pixels = np.random.default_rng(2).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "long.png")
    resize, areas = Image.Image.resize, []

    def counted(self, size, *arguments, **options):
        areas.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    found = read_image(tmp_path / "long.png", 256).permute(1, 2, 0).numpy()
    assert max(areas) <= 256 * 256
    monkeypatch.undo()
    assert found.std() > 10


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (3, 501), (700, 20), (37, 2_000)])
def test_long_images_are_what_enlarging_all_of_them_gives(shape):
    pixels = np.random.default_rng(3).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
    image, scale = Image.fromarray(pixels), 32 / min(shape)
    size = tuple(round(side * scale) for side in shape)
    assert max(size) > 8 * 32
    left, top = ((side - 32) // 2 for side in size)
    expected = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    found = centre_crop(image, 32)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_decompression_bombs_are_refused(tmp_path, capsys):
    """Small files of huge images: one line that names them, before they are decoded."""
    for name, size in (("great.png", (9_500, 9_500)), ("huge.png", (60_000, 60_000))):
        (tmp_path / name).write_bytes(png(*size, b"", depth=1, colour=0))
        with pytest.raises(UnreadableImageError, match=rf"{name} \(.*pixels"):
            read_image(tmp_path / name, 16)
    assert capsys.readouterr().err == ""


def test_large_photographs_are_decoded_to_half_their_sides(tmp_path, monkeypatch):
    pixels = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    whole = read_image(tmp_path / "photo.jpg", 16).float()
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 96 // 4)
    assert open_image(tmp_path / "photo.jpg").size == (48, 32)
    assert (read_image(tmp_path / "photo.jpg", 16).float() - whole).abs().mean() < 6
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 96 // 5)
    with pytest.raises(UnreadableImageError, match="pixels"):
        read_image(tmp_path / "photo.jpg", 16)


def test_what_is_no_image_is_not_handed_to_other_programs(tmp_path):
    """Pillow has Ghostscript draw PostScript, whatever the file's name."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "page.png").write_bytes(page)
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {"page.png": "cannot identify", "empty.png": "it is empty", "pipe.png": "no regular file"}
    for name, reason in {**cases, "none.png": "No such file"}.items():
        with pytest.raises(UnreadableImageError, match=rf"{name} \(.*{reason}"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "ppm", "tiff"])
def test_damaged_images_are_read_or_named(suffix, tmp_path):
    """Cut off anywhere, bits turned over, bytes of another kind: an image or one error, no other and no wait."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))
    pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"exif": exif} if suffix in ("jpg", "png", "webp", "tiff") else {}
    Image.fromarray(pixels).save(whole, format={"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    path, refused = tmp_path / f"image.{suffix}", 0
    for trial in range(150):
        damaged = bytearray(whole.getvalue())
        if trial % 3 == 0:
            del damaged[rng.integers(len(damaged)) :]
        elif trial % 3 == 1:
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] ^= 1 << rng.integers(8)
        else:
            place = rng.integers(len(damaged))
            damaged[place : place + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        try:
            image = read_image(path, 8)
        except UnreadableImageError:
            refused += 1
        else:
            assert tuple(image.shape) == (3, 8, 8)
    assert refused > 20


def test_image_folder_is_training_data(tmp_path):
    write_tree(tmp_path, {"a": 4, "b": 5}, size=8)
    data = ImageFolderData(tmp_path, 8)
    assert (len(data), data.image_shape, data.num_classes) == (9, (3, 8, 8), 2)
    images, labels = Batches(data, 9, seed=1)[0]
    again, _ = Batches(data, 9, seed=1)[0]
    assert torch.equal(images, again)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 5
    assert images.min() >= -1
    assert images.max() <= 1
    still, order = data.read(torch.arange(9)), labels.argsort(stable=True)
    for image, label in zip(images[order], labels[order], strict=True):
        kinds = [torch.equal(image, mirror) for each in still for mirror in (each, each.flip(2))]
        assert sum(kinds) == 1  # every one is an image or its mirror image
        assert (kinds.index(True) >= 8) == bool(label)
    unflipped = ImageFolderData(tmp_path, 8, flips=False)
    assert torch.equal(unflipped.gather(torch.arange(9), torch.Generator())[0], still)
    raw = np.asarray(Image.open(tmp_path / "a" / "0.png")).astype(np.float32)
    np.testing.assert_allclose(still[0].permute(1, 2, 0).numpy(), raw / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="image size is 0"):
        ImageFolderData(tmp_path, 0)
