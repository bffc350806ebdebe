"""Codebooks: nearest codes, k-means with moving averages, their files and `ear train-codebook`."""

import itertools
import json
import math

import pytest
import safetensors.torch
import torch

from ear_model import cli
from ear_model.data.batches import Dataset
from ear_model.data.digits import load_digits
from ear_model.tokenizers import codebook as module
from ear_model.tokenizers.codebook import METADATA_KEY, Codebook, CodebookInfo, load_codebook, nearest_codes
from ear_model.tokenizers.config import CodebookTraining
from ear_model.training.codebook import MovingKMeans, far_tokens, first_codes, report_on, train_codebook
from tests.model.conftest import write_tree


def brute(tokens, codes):
    """Squared distances by differences, in float64."""
    return (tokens.double().unsqueeze(1) - codes.double()).square().sum(-1)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize(("tokens", "codes", "dim"), [(301, 37, 4), (1, 1, 1), (5, 700, 17), (64, 2, 3)])
def test_nearest_codes_are_those_of_brute_force(scale, tokens, codes, dim):
    x, c = torch.randn(tokens, dim) * scale, torch.randn(codes, dim) * scale
    assert torch.equal(nearest_codes(x, c), brute(x, c).argmin(1))
    assert nearest_codes(x[:0], c).shape == (0,)
    assert torch.equal(nearest_codes(x.unsqueeze(1), c), nearest_codes(x, c).unsqueeze(1))


def test_codes_of_mixed_sizes_cost_no_more_than_rounding():
    scales = 10.0 ** torch.randint(-18, 18, (400, 1)).double()
    x, c = (torch.randn(400, 5) * scales).float(), (torch.randn(400, 5) * scales.flip(0)).float()
    distances = brute(x, c)
    found = distances.gather(1, nearest_codes(x, c).unsqueeze(1)).squeeze(1)
    least, nearest = distances.min(1)
    sizes = x.double().square().sum(1) + c.double().square().sum(1)[nearest]
    assert bool((found <= least + 2.0**-47 * sizes).all())


@pytest.mark.parametrize("limit", [1, 100, 2**18])
def test_of_codes_at_one_distance_the_lowest_index_wins(monkeypatch, limit):
    monkeypatch.setitem(module.PAIRS_AT_A_TIME, "cpu", limit)
    # Small integers: every distance is exact, and most are ties.
    x, c = torch.randint(-2, 3, (333, 4)).float(), torch.randint(-2, 3, (50, 4)).float()
    assert torch.equal(nearest_codes(x, c), brute(x, c).argmin(1))
    repeated = torch.randn(30, 6) * 10
    places = torch.randint(30, (200,))
    first = torch.tensor([places.tolist().index(place) for place in places.tolist()])
    assert torch.equal(nearest_codes(repeated[places], repeated[places]), first)
    around = torch.cat([torch.eye(16), -torch.eye(16)])[torch.randperm(32)]
    assert nearest_codes(torch.zeros(3, 16), around).tolist() == [0, 0, 0]


def test_bad_lookups_are_named():
    with pytest.raises(ValueError, match=r"tokens have shape \(3, 2\); they must be \[..., 4\]"):
        nearest_codes(torch.zeros(3, 2), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"codes have shape \(0, 4\)"):
        nearest_codes(torch.zeros(3, 4), torch.zeros(0, 4))
    with pytest.raises(TypeError, match=r"tokens has dtype torch\.int64"):
        nearest_codes(torch.zeros(3, 4).long(), torch.zeros(5, 4))
    assert nearest_codes(torch.tensor([[math.nan, 0.0], [math.inf, 0.0]]), torch.randn(5, 2)).tolist() == [0, 0]


def clusters(count, dim, images=600):
    """Centres forty deviations apart and images [images, dim, 1, 1] around them, as many of each."""
    centres = torch.cartesian_prod(*[torch.arange(4.0)] * dim)[torch.randperm(4**dim)[:count]] * 40
    return centres, Dataset(
        (centres.repeat(images // count + 1, 1)[:images] + torch.randn(images, dim)).view(images, dim, 1, 1),
        torch.zeros(images, dtype=torch.int64),
    )


def test_separate_clusters_are_found():
    centres, data = clusters(12, 3)
    settings = CodebookTraining(size=12, steps=200, batch_size=100, decay=0.9)
    codebook, report = train_codebook(data, 1, settings, source="clusters", quiet=True)
    distances, _ = brute(centres, codebook.vectors).min(1)
    # 50 images a cluster: every number of a mean is within 6 deviations of 1 / sqrt(50), but once in 10^7 runs.
    assert distances.max() < 3 * 6**2 / 50
    assert report.dead == 0
    assert report.perplexity == pytest.approx(12, rel=0.02)
    assert report.distortion == pytest.approx(1, abs=0.2)
    assert codebook.info == CodebookInfo(3, 1, 1, "clusters", 0, report.distortion)


def test_dead_codes_come_back_where_they_are_needed():
    centres, data = clusters(10, 2)
    tokens = data.images.flatten(1)
    # One code begins where tokens are; the others are far from all.
    means = MovingKMeans(torch.cat([centres[:1], 1e6 + torch.randn(9, 2)]), 0.9)
    generator = torch.Generator().manual_seed(1)
    before = report_on(means.codes_KD, tokens, 0)
    revived = 0
    for _ in range(12):
        for _ in range(10):
            means.step(tokens[torch.randperm(600)[:200]])
        revived += means.revive(tokens, generator)
    after = report_on(means.codes_KD, tokens, 0)
    assert (before.dead, after.dead) == (9, 0)
    assert revived >= 9
    assert after.distortion < 0.5 * before.distortion


def test_distortion_falls_step_by_step_within_noise():
    tokens = torch.randn(2000, 3)
    means = MovingKMeans(first_codes(tokens, 20, 0), 0.8)
    found = [report_on(means.codes_KD, tokens, 0).distortion]
    for _ in range(15):
        for _ in range(5):
            means.step(tokens[torch.randperm(2000)[:500]])
        found.append(report_on(means.codes_KD, tokens, 0).distortion)
    assert all(later < 1.03 * earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] < 0.95 * found[0]


def test_first_codes_are_different_tokens_as_long_as_there_are_any():
    tokens = torch.randint(0, 3, (500, 2)).float()
    codes = first_codes(tokens, 9, 3)
    assert len(codes.unique(dim=0)) == 9
    assert far_tokens(tokens, codes, 5, torch.Generator()).shape == (0, 2)
    more = first_codes(tokens, 12, 3)
    assert more.shape == (12, 2)
    assert len(more.unique(dim=0)) == 9


def test_same_seed_same_codes_and_it_stops_when_it_stalls():
    _, data = clusters(12, 3)
    settings = CodebookTraining(size=16, steps=1000, batch_size=32)
    first, report = train_codebook(data, 1, settings, quiet=True)
    again, _ = train_codebook(data, 1, settings, quiet=True)
    assert torch.equal(first.vectors, again.vectors)
    assert report.steps <= 500
    assert 0 < report.distortion < 0.01 * report.distortion_of_mean
    assert 1 < report.perplexity <= 16
    other, _ = train_codebook(data, 1, CodebookTraining(16, 5, 32, seed=1), quiet=True)
    assert not torch.equal(first.vectors, other.vectors)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch": 3}, "patch_size is 3; the data are 8 x 8"),
        ({"patch": 0}, "patch_size is 0"),
        ({"size": 100_000}, "size is 100000; the data have 21552 tokens"),
        ({"broken": True}, "hold values that are not finite"),
    ],
)
def test_data_that_give_no_codebook_are_named(change, named):
    data = load_digits()[0]
    if change.get("broken"):
        data.images[5] = math.nan
    with pytest.raises(ValueError, match=named):
        train_codebook(data, change.get("patch", 2), CodebookTraining(change.get("size", 16)), quiet=True)


def made(path, **changes):
    vectors = changes.pop("vectors", torch.randn(6, 4))
    codebook = Codebook(vectors, CodebookInfo(**{"channels": 1, "patch_size": 2, "image_size": 8, **changes}))
    codebook.save(path)
    return codebook


def test_files_come_back_whole(tmp_path):
    path = tmp_path / "codes.safetensors"
    codebook = made(path, data="a cache", seed=3, distortion=0.25)
    found = load_codebook(path)
    assert torch.equal(found.vectors, codebook.vectors)
    assert found.info == codebook.info
    first = path.read_bytes()
    codebook.save(path)
    assert path.read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "codes.safetensors"

    def refused(named):
        with pytest.raises(ValueError, match=named) as caught:
            load_codebook(path)
        assert "\n" not in str(caught.value)

    refused("is not there; `ear train-codebook` makes one")
    made(path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("truncated")
    info = {"version": 1, "channels": 1, "patch_size": 2, "image_size": 8, "data": "", "seed": 0, "distortion": 0.1}

    def write(tensors, metadata):
        safetensors.torch.save_file(tensors, path, metadata)

    def described(**changes):
        return {METADATA_KEY: json.dumps({**info, **changes})}

    good = {"codebook": torch.randn(6, 4)}
    write(good, {})
    refused("is no codebook of `ear train-codebook`")
    write({"other": good["codebook"]}, described())
    refused("is no codebook of `ear train-codebook`")
    for tensor, named in [
        (good["codebook"].double(), "float64; it must be float32"),
        (torch.randn(6, 5), r"\(6, 5\); it must be \[K, 4\]"),
        (torch.randn(1, 4), "K at least 2"),
        (torch.tensor([[math.inf] * 4] * 2), "NaN or infinite"),
    ]:
        write({"codebook": tensor}, described())
        refused(named)
    changes = [
        *({"version": 2}, {"version": None}, {"channels": "1"}, {"channels": 0}, {"seed": -1}, {"more": 1}),
        *({"distortion": -1.0}, {"distortion": "low"}, {"data": 3}, {"patch_size": True}),
    ]
    for change in changes:
        write(good, described(**change))
        refused("is no codebook that we know")
    for text in ("[]", "3", "{", '{"version": 1}'):
        write(good, {METADATA_KEY: text})
        refused("codes.safetensors")
    write(good, described())
    load_codebook(path)


def test_command_on_the_digits_and_on_a_cache(tmp_path, capsys):
    out = tmp_path / "new" / "digits.safetensors"
    command = ["train-codebook", "digits", "--out", str(out), "--size", "8", "--steps", "3", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "8 codes of 4 numbers; squared error a number 0." in capsys.readouterr().out
    found = load_codebook(out)
    assert found.vectors.shape == (8, 4)
    assert (found.info.channels, found.info.patch_size, found.info.image_size) == (1, 2, 8)
    assert cli.main(command) == 1
    assert "exists already; give a new --out" in capsys.readouterr().err

    tree, cache, codes = tmp_path / "tree", tmp_path / "cache", tmp_path / "codes.safetensors"
    write_tree(tree, {"a": 5, "b": 4}, size=8)
    pixels = ["--tokenizer", "pixels", "--image-size", "8", "--workers", "0", "--device", "cpu"]
    assert cli.main(["cache", str(tree), "--out", str(cache), *pixels]) == 0
    options = ["--size", "16", "--steps", "3", "--batch-size", "4", "--patch-size", "4", "--device", "cpu"]
    assert cli.main(["train-codebook", str(cache), "--out", str(codes), *options]) == 0
    assert load_codebook(codes).info.token_dim == 48
    tokens = Codebook(load_codebook(codes).vectors, load_codebook(codes).info).vectors
    assert float(tokens.abs().max()) <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["digits", "--out", "codes.pt"], "codes.pt must end in .safetensors"),
        (["nowhere", "--out", "codes.safetensors"], "nowhere is not a directory"),
        (["digits", "--out", "codes.safetensors", "--size", "1"], "size is 1; it must be at least 2"),
        (["digits", "--out", "codes.safetensors", "--decay", "1"], "decay is 1.0; it must be in [0, 1)"),
        (["digits", "--out", "codes.safetensors", "--patch-size", "5"], "patch_size is 5"),
    ],
)
def test_bad_options_are_one_line(options, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train-codebook", *options, "--device", "cpu"]) != 0
    words = capsys.readouterr().err
    assert named in words
    assert len(words.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
