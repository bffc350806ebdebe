"""The judge and its scores, against closed forms, brute force and images for which the answers are known."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg

from ear_model import cli
from ear_model.config import SamplingConfig
from ear_model.data import glyphs
from ear_model.data.images import LabelledImages, load_tree, split_classes
from ear_model.evaluation.config import JudgeConfig
from ear_model.evaluation.judge import Judge, train_judge
from ear_model.evaluation.judged import (
    JudgedComparison,
    _flat,
    feature_statistics,
    frechet_distance,
    nearest_distances,
)
from ear_model.evaluation.precision_recall import precision_recall

SMALL = JudgeConfig(channels=(8, 16, 32, 32), epochs=8, batch_size=32, lr=1e-2)


def striped(per_class: int, generator: torch.Generator) -> LabelledImages:
    """Three classes of 16x16 images that a person tells apart: rows, columns, plain; each with random noise."""
    labels = torch.arange(3 * per_class) % 3
    rows = (torch.arange(16) // 4 % 2).float()
    patterns = torch.stack([rows[:, None].expand(16, 16), rows[None, :].expand(16, 16), torch.full((16, 16), 0.5)])
    noise = torch.rand(len(labels), 3, 16, 16, generator=generator)
    images = (patterns[labels].unsqueeze(1) * 120 + noise * 130).to(torch.uint8)
    return LabelledImages(images, labels, ("columns", "plain", "rows"))


@pytest.fixture(scope="module")
def trees() -> tuple[LabelledImages, LabelledImages]:
    generator = torch.Generator().manual_seed(0)
    return striped(60, generator), striped(60, generator)


@pytest.fixture(scope="module")
def judge(trees) -> Judge:
    return train_judge(*trees, SMALL)


def test_it_learns_is_deterministic_and_survives_a_file(judge, trees, tmp_path):
    train, held_out = trees
    assert judge.accuracy > 0.95
    assert judge.num_held_out == 180
    again = train_judge(train, held_out, SMALL)
    features, predicted = judge.classify(held_out.images)
    assert features.shape == (180, 32)
    assert torch.equal(again.classify(held_out.images)[0], features)
    path = tmp_path / "judge.safetensors"
    judge.save(path)
    loaded = Judge.load(path)
    assert torch.equal(loaded.classify(held_out.images)[0], features)
    assert torch.equal(loaded.classify(held_out.images, batch_size=7)[1], predicted)
    for name in ("class_names", "image_size", "config", "accuracy", "num_held_out"):
        assert getattr(loaded, name) == getattr(judge, name)


def test_training_leaves_the_random_state_alone(trees):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_judge(*trees, JudgeConfig(channels=(2, 2, 2, 2), epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_frechet_distance_has_its_closed_forms():
    random = np.random.default_rng(1)
    mean_a, mean_b = random.normal(size=(2, 5))
    spread_a, spread_b = np.diag([1.0, 4, 9, 0, 2]), np.diag([4.0, 1, 9, 1, 0])
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(np.diag(spread_a)) - np.sqrt(np.diag(spread_b))) ** 2).sum()
    assert frechet_distance(mean_a, spread_a, mean_b, spread_b) == pytest.approx(expected)
    a, b = random.normal(size=(2, 40, 5)) @ random.normal(size=(5, 5))
    statistics_a, statistics_b = feature_statistics(a), feature_statistics(b)
    root = linalg.sqrtm(statistics_a[1] @ statistics_b[1]).real
    expected = ((statistics_a[0] - statistics_b[0]) ** 2).sum()
    expected += np.trace(statistics_a[1] + statistics_b[1] - 2 * root)
    assert frechet_distance(*statistics_a, *statistics_b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*statistics_a, *statistics_a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(mean_a, spread_a, mean_b[:4], spread_b)


def test_splits_take_the_same_of_every_class():
    labels = torch.randint(0, 4, (200,))
    labels[:12] = torch.arange(12) % 4
    first, others = split_classes(labels, 3, seed=0)
    assert labels[first].bincount().tolist() == [3, 3, 3, 3]
    assert sorted([*first.tolist(), *others.tolist()]) == list(range(200))


def test_nearest_is_brute_force():
    points, others = torch.randn(9, 3), torch.randn(14, 3)
    expected = [min((a - b).norm().item() for b in others) for a in points]
    torch.testing.assert_close(nearest_distances(points, others, chunk=4), torch.tensor(expected))


def chosen(images, per_class):
    return split_classes(images.labels, per_class, 0)[0]


def test_scores_of_samples_whose_quality_is_known(judge, trees):
    train, real = trees
    setting = SamplingConfig(4, 1.0, "linear", 1.0)
    fresh = striped(40, torch.Generator().manual_seed(9))
    comparison = JudgedComparison(judge, real, 120, train=train)
    assert comparison.per_class == 30

    good = comparison.score(fresh.images, fresh.labels, setting)
    assert good.num_samples == 120
    assert good.num_compared == 90
    assert good.accuracy > 0.95
    assert abs(good.energy_distance_features_floor) < 0.2
    assert abs(good.energy_distance_features - good.energy_distance_features_floor) < 0.2
    assert good.share_below_closest_real < 0.1
    assert set(good.accuracy_per_class) == set(real.class_names)
    weights = torch.full((3,), 1 / 3).tolist()
    mean = sum(w * share for w, share in zip(weights, good.accuracy_per_class.values(), strict=True))
    assert mean == pytest.approx(good.accuracy)

    assert (good.precision, good.recall) == precision_recall(
        *(judge.classify(images)[0] for images in (fresh.images[chosen(fresh, 30)], real.images[chosen(real, 30)]))
    )
    assert min(good.precision, good.recall, good.precision_real, good.recall_real) > 0.5

    wrong = comparison.score(fresh.images, (fresh.labels + 1) % 3, setting)
    assert wrong.accuracy < 0.1
    one_class = fresh.images[fresh.labels == 0].repeat(3, 1, 1, 1)
    collapsed = comparison.score(one_class, torch.arange(120) % 3, setting)
    assert collapsed.accuracy < 0.5
    assert collapsed.recall < 0.6 * good.recall
    assert collapsed.energy_distance_features > 5 * abs(good.energy_distance_features) + 0.5
    assert collapsed.energy_distance_pixels > good.energy_distance_pixels + 0.5
    assert collapsed.frechet_distance > 5 * good.frechet_distance
    copies = comparison.score(train.images[:120], train.labels[:120], setting)
    assert copies.nearest_train_samples < 0.05 * good.nearest_train_samples
    assert copies.share_below_closest_real == 1
    unsearched = JudgedComparison(judge, real, 120).score(fresh.images, fresh.labels, setting)
    assert unsearched.nearest_train_samples is None
    assert unsearched.num_train == 0


def test_large_images_are_compared_averaged_down():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pixels = _flat(images).view(2, 3, 32, 32)
    expected = images[1, 2, 6:8, 10:12].float().mean() / 127.5 - 1
    torch.testing.assert_close(pixels[1, 2, 3, 5], expected)
    torch.testing.assert_close(_flat(images[..., :16, :16])[0, 0], images[0, 0, 0, 0] / 127.5 - 1)


def test_images_of_a_tree(tmp_path):
    glyphs.write_tree(tmp_path / "tree", 4, num_classes=2, size=16)
    tree = load_tree(tmp_path / "tree", 16)
    assert tree.class_names == ("digit_1", "digit_2")
    np.testing.assert_array_equal(tree.images[5].permute(1, 2, 0).numpy(), glyphs.render_glyph(1, 1, size=16))
    assert load_tree(tmp_path / "tree", 8).images.shape == (8, 3, 8, 8)
    assert load_tree(tmp_path / "tree", 16, max_per_class=2).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tree: tree / "nowhere", "nowhere"),
        (lambda tree: tree / "digit_1", "is no image tree"),
        (lambda tree: (tree / "digit_1" / "000001.png").write_bytes(b"no picture") and tree, "000001.png"),
    ],
)
def test_trees_that_are_none_are_named(damage, named, tmp_path, capsys):
    glyphs.write_tree(tmp_path / "tree", 2, num_classes=2, size=16)
    out = tmp_path / "judge.safetensors"
    assert cli.main(["train-judge", str(damage(tmp_path / "tree")), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_files_that_are_no_judge_are_refused(judge, tmp_path, tiny_model):
    from ear_model.model.weights import save_weights

    path = tmp_path / "judge.safetensors"
    with pytest.raises(ValueError, match="is not there"):
        Judge.load(path)
    judge.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated"):
        Judge.load(path)
    save_weights(path, dict(tiny_model.named_parameters()), tiny_model.config)
    with pytest.raises(ValueError, match="is no judge"):
        Judge.load(path)


def test_what_does_not_fit_is_named(judge, trees):
    train, real = trees
    with pytest.raises(ValueError, match="this judge reads uint8"):
        judge.classify(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    other = LabelledImages(real.images, real.labels, ("a", "b", "c"))
    with pytest.raises(ValueError, match="must be the same"):
        train_judge(train, LabelledImages(real.images, real.labels, ("a", "b")), SMALL)
    with pytest.raises(ValueError, match="the judge was trained on 3"):
        JudgedComparison(judge, other, 30)
    with pytest.raises(ValueError, match="num is 2"):
        JudgedComparison(judge, real, 2)
    with pytest.raises(ValueError, match="channels"):
        JudgeConfig(channels=(1, 2, 3))
    with pytest.raises(ValueError, match="epochs is 0"):
        JudgeConfig(epochs=0)


def test_the_command(tmp_path, capsys):
    tree = tmp_path / "tree"
    glyphs.write_tree(tree, 10, num_classes=2, size=16)
    out = tmp_path / "judge.safetensors"
    options = ["--epochs", "2", "--channels", "4", "4", "4", "4", "--batch-size", "8", "--device", "cpu"]
    assert cli.main(["train-judge", str(tree), "--out", str(out), *options]) == 0
    assert "18 training images of 2 classes; accuracy on 2 held-out images" in capsys.readouterr().out
    judge = Judge.load(out)
    assert judge.config == JudgeConfig(channels=(4, 4, 4, 4), epochs=2, batch_size=8)
    assert json.dumps(judge.class_names) == '["digit_1", "digit_2"]'
