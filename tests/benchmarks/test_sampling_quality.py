"""The benchmark of what sampling options cost, with tiny models: what it counts, scores, combines and refuses."""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import glyph_run, report, sampling_quality
from benchmarks.clocks import HAS_GPU
from benchmarks.sampling_quality import OWN, approximations, combination, evaluations, is_harmless, main
from ear_model.config import SamplingConfig
from ear_model.data.digits import load_digits
from ear_model.data.glyphs import write_tree
from ear_model.data.images import load_tree
from ear_model.ear import EAR
from ear_model.evaluation.config import JudgeConfig
from ear_model.evaluation.digits import evaluate_samples
from ear_model.evaluation.judge import Judge, train_judge
from ear_model.evaluation.judged import JudgedComparison
from ear_model.model.weights import save_weights
from ear_model.plots import to_bytes
from ear_model.presets import RUNS
from ear_model.run_dir import save_config
from ear_model.sampling.images import class_labels, sample_images
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.kl16 import AutoencoderKL
from ear_model.tokenizers.latent import load_latent_tokenizer, save_autoencoder
from tests.model.conftest import TINY, randomise, tiny_run

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the rows are those of a CPU")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _own_alone(monkeypatch):
    """Only the run's own setting is measured."""
    monkeypatch.setattr(sampling_quality, "approximations", lambda own: {})


def write_run(folder, config, model):
    """A run directory of a model, as far as sampling reads it."""
    checkpoint = folder / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    save_config(folder, config)
    save_weights(checkpoint / "ema.safetensors", dict(model.named_parameters()), config.model)
    return folder


@pytest.fixture
def digits(tmp_path):
    own = SamplingConfig(steps=5, guidance=1.5, temperature=0.9)
    return write_run(tmp_path / "digits", replace(tiny_run(), sampling=own), randomise(EAR(TINY)))


@pytest.fixture
def glyphs(tmp_path):
    """What benchmarks.glyph_run leaves, of three classes of 16 pixels: 16 latents of 2 numbers."""
    out = tmp_path / "glyphs"
    shape = AutoencoderConfig(channels=4, multipliers=(1, 1, 1), residual_blocks=1, latent_channels=2, norm_groups=1)
    for split, count in (("train", 20), ("test", 8)):
        write_tree(out / split, count, num_classes=3, size=16, split=split)
    trees = [load_tree(out / split, 16) for split in ("train", "test")]
    train_judge(*trees, JudgeConfig((4, 4, 8, 8), epochs=1, batch_size=20)).save(out / "judge.safetensors")
    save_autoencoder(out / "tokenizer.safetensors", randomise(AutoencoderKL(shape)), 0.5)
    model = replace(TINY, image_size=4, channels=2, patch_size=1, num_classes=3)
    config = replace(RUNS["glyphs64"], model=model, tokenizer="/elsewhere", sampling=SamplingConfig(3, 2.0))
    write_run(out / "run", config, randomise(EAR(model)))
    return out


def words(data, out, *more):
    return ["--data", data, "--num", "12", "--seeds", "2", "--out", str(out), *map(str, more)]


def scored(result, case):
    return next(row["scores"] for row in result["rows"] if row["case"] == case and "scores" in row)


@pytest.mark.parametrize("order", ["random", "halton"])
def test_evaluations_are_what_the_backbone_reads(order):
    model = randomise(EAR(TINY))
    for _ in range(6):
        start = random.choice([0.0, random.random() * 0.6])
        setting = SamplingConfig(
            steps=random.randint(1, 21),
            guidance=random.choice([1.0, 2.0]),
            guidance_from=start,
            guidance_to=random.choice([start + 0.3, 1.0]),
            order=order,
        )
        read = []
        hook = model.backbone.register_forward_hook(lambda module, given, output, read=read: read.append(len(output)))
        model.sample(torch.tensor([3, 8, 8]), **asdict(setting))
        hook.remove()
        assert 3 * evaluations(setting, TINY.num_tokens) == sum(read), setting


def test_approximations():
    steps = [{"steps": count, "order": order} for count in (8, 4, 2) for order in ("random", "halton")]
    interval = [{"guidance_from": 0.1}, {"guidance_from": 0.25}, {"guidance_to": 0.9}]
    assert list(approximations(SamplingConfig(16)).values()) == [{"order": "halton"}, *steps, *interval]
    assert {changes.get("steps") for changes in approximations(SamplingConfig(3)).values()} == {None, 1}


def test_digits(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling_quality, "PARTS", (2,))
    monkeypatch.setattr(sampling_quality, "FROM", (0.1,))
    out = tmp_path / "new" / "result.json"
    assert main(words("digits", out, "--run", digits)) == 0
    result = json.loads(out.read_text())
    rows = {(row["case"], row["rival"]): row for row in result["rows"]}
    half = "2 steps, halton order"
    assert {OWN, "halton order", half, "guidance from 0.1", "guidance to 0.9"} < {case for case, _ in rows}
    assert rows[half, "fp32"]["evaluations_saved"] == pytest.approx(0.6)

    # The scores are those of ear evaluate on the images of these seeds.
    model, labels = EAR.from_pretrained(digits), class_labels(range(10), 12, 10)
    train, held_out = load_digits()
    own_setting = SamplingConfig(5, 1.5, temperature=0.9)
    for case, setting in ((OWN, own_setting), (half, replace(own_setting, steps=2, order="halton"))):
        for seed in range(2):
            images = sample_images(model, labels, seed=seed, **asdict(setting))
            wanted = evaluate_samples(images, labels, train, held_out, setting)
            found = {name: score["seeds"][seed] for name, score in scored(result, case).items()}
            assert found["accuracy"] == wanted.class_consistency
            assert found["energy_distance"] == pytest.approx(wanted.energy_distance, rel=1e-4)
            assert found["frechet_distance"] > 0
    assert result["real"]["accuracy"] == wanted.classifier_test_accuracy
    assert result["real"]["energy_distance"] == pytest.approx(wanted.energy_distance_floor)
    own = scored(result, OWN)["frechet_distance"]
    assert 0 < result["real"]["frechet_distance"] < own["mean"]
    assert own["spread"] == pytest.approx(abs(own["seeds"][0] - own["seeds"][1]) / 2**0.5)

    printed = capsys.readouterr().out
    report.main([str(out)])
    table = capsys.readouterr().out
    assert table in printed
    assert "digits, 6 training steps on unknown; 12 samples, 2 seeds;" in table
    assert table.splitlines()[-1].startswith("| real images |  |  | 0.99")


@pytest.mark.usefixtures("_own_alone")
def test_without_a_run_the_digits_are_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNS, "digits", replace(tiny_run(), sampling=SamplingConfig(2, 1.0)))
    monkeypatch.setattr(sampling_quality.tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "result.json"
    assert main(words("digits", out)) == 0
    result = json.loads(out.read_text())
    assert (result["trained_on"], result["config"]["train"]["steps"]) == ("cpu", 6)
    assert scored(result, OWN)["energy_distance"]["mean"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.usefixtures("_own_alone")
@pytest.mark.parametrize("trained_here", [False, True])
def test_glyphs_are_judged(glyphs, tmp_path, monkeypatch, trained_here):
    given = []

    def glyph_run_main(arguments):
        given.append(arguments[1:])
        glyphs.rename(arguments[0])

    monkeypatch.setattr(glyph_run, "main", glyph_run_main)
    tokenizer = load_latent_tokenizer(glyphs / "tokenizer.safetensors")
    model, setting = EAR.from_pretrained(glyphs / "run"), SamplingConfig(3, 2.0)
    judge, real = Judge.load(glyphs / "judge.safetensors"), load_tree(glyphs / "test", 16)
    judge.save(tmp_path / "other.safetensors")
    more = ("--judge", tmp_path / "other.safetensors") if trained_here else ("--run", glyphs)
    out = tmp_path / "result.json"
    assert main(words("glyphs", out, *more)) == 0
    # Of 48 classes 12 samples need one of each: two real images a class.
    assert given == ([["--real", "2", "--judge", str(tmp_path / "other.safetensors")]] if trained_here else [])

    labels, comparison = class_labels(range(3), 12, 3), JudgedComparison(judge, real, 12)
    result = json.loads(out.read_text())
    for seed in range(2):
        latents = sample_images(model, labels, seed=seed, **asdict(setting))
        wanted = comparison.score(to_bytes(tokenizer.decode(latents)), labels, setting)
        found = [score["seeds"][seed] for score in scored(result, OWN).values()]
        distances = (wanted.energy_distance_features, wanted.frechet_distance)
        assert found == [wanted.accuracy, *(pytest.approx(value, rel=1e-3, abs=1e-5) for value in distances)]
    floors = [wanted.energy_distance_features_floor, wanted.frechet_distance_floor]
    assert list(result["real"].values()) == pytest.approx([wanted.accuracy_real, *floors])


def test_on_a_gpu_images_have_a_time_and_approximations_are_in_bf16(digits, tmp_path, monkeypatch, capsys):
    """A CPU in a GPU's place, which has bf16 but no FP8."""
    monkeypatch.setattr(sampling_quality, "HAS_GPU", True)
    monkeypatch.setattr(sampling_quality, "PRECISIONS", ("bf16", "fp32", "fp8"))
    monkeypatch.setattr(sampling_quality.torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(sampling_quality, "approximations", lambda own: {"short": {"steps": 1}})
    out = tmp_path / "result.json"
    assert main(words("digits", out, "--run", digits)) == 0
    own, single, eighth, short = json.loads(out.read_text())["rows"]
    assert [row["rival"] for row in (own, single, eighth, short)] == ["bf16", "fp32", "fp8", "bf16"]
    assert eighth["skipped"] == "needs a GPU of compute capability 9"
    assert all(0 < min(row["image_ms"]["seeds"]) <= row["image_ms"]["median"] for row in (own, single, short))
    difference = own["scores"]["frechet_distance"]["mean"] - single["scores"]["frechet_distance"]["mean"]
    assert 0 < abs(difference) < 0.1 * own["scores"]["frechet_distance"]["mean"]
    printed = capsys.readouterr().out
    assert f"| {OWN} | fp8 |  | skipped: needs a GPU of compute capability 9 |  |  |" in printed
    lines = printed.splitlines()
    assert lines[-7].endswith("| accuracy | energy distance | Frechet distance | ms an image |")
    assert lines[-5].endswith(f"| {report.rounded(own['image_ms']['median'])} |")


def record(case, changes, count, accuracy=0.9, energy=1.0, frechet=10.0, spread=0.0):
    means = {"accuracy": accuracy, "energy_distance": energy, "frechet_distance": frechet}
    scores = {name: {"mean": mean, "spread": spread} for name, mean in means.items()}
    return {"case": case, "rival": "fp32", "changes": changes, "evaluations": count, "scores": scores}


@pytest.mark.parametrize(
    ("scores", "harmless"),
    [
        ({}, True),
        ({"accuracy": 0.892, "energy": 1.04, "frechet": 10.4}, True),
        ({"accuracy": 0.99, "energy": 0.1, "frechet": 1.0}, True),
        ({"accuracy": 0.89}, False),
        ({"energy": 1.06}, False),
        ({"frechet": 10.6}, False),
        ({"energy": 1.06, "spread": 0.04}, True),
    ],
)
def test_harm_is_a_score_that_is_worse_by_more_than_is_tolerated(scores, harmless):
    assert is_harmless(record("", {}, 4, **scores), record(OWN, {}, 8)) == harmless


def test_the_largest_harmless_saving_of_each_kind_is_combined():
    own = record(OWN, {}, 32)
    fewer = [
        record("a", {"steps": 8, "order": "random"}, 16),
        record("b", {"steps": 4, "order": "random"}, 8, energy=1.01),
        record("c", {"steps": 4, "order": "halton"}, 8),
        record("d", {"steps": 2, "order": "halton"}, 4, accuracy=0.5),
    ]
    interval = [record("e", {"guidance_from": 0.1}, 30), record("f", {"guidance_from": 0.25}, 28, frechet=20.0)]
    wanted = {"steps": 4, "order": "halton", "guidance_from": 0.1}
    skipped = {"case": OWN, "rival": "bf16", "skipped": "needs a GPU"}
    assert combination([own, skipped, *fewer, *interval], "fp32") == wanted
    assert combination([own, *fewer], "fp32") == {}  # measured already
    assert combination([skipped, *fewer, *interval], "fp32") == {}  # nothing to compare with


@pytest.mark.usefixtures("_own_alone")
def test_scores_that_are_not_finite_are_a_failure(digits, tmp_path, monkeypatch, capsys):
    right = sampling_quality.DigitsScores.__call__

    def wrong(self, images, labels):
        scores = right(self, images, labels)
        return scores if len(images) > 12 else scores | {"frechet_distance": float("nan")}

    monkeypatch.setattr(sampling_quality.DigitsScores, "__call__", wrong)
    assert main(words("digits", tmp_path / "result.json", "--run", digits)) == 1
    assert "failed: ValueError: scores are [nan, nan]; they must be finite" in capsys.readouterr().out


def test_what_can_not_be_done_is_one_line_before_any_work(digits, glyphs, tmp_path, monkeypatch):
    def refused(data, *more):
        with pytest.raises(SystemExit) as error:
            main(words(data, out, *more))
        assert not out.exists()
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    out = tmp_path / "result.json"
    monkeypatch.setattr(sampling_quality, "records_of", lambda study: pytest.fail("it began"))
    assert "seeds is 0; it must be at least 1" in refused("digits", "--run", digits, "--seeds", 0)
    assert "num is 9; each of 10 classes needs a sample" in refused("digits", "--run", digits, "--num", 9)
    assert "num is 2; a judge of 3 classes" in refused("glyphs", "--run", glyphs, "--num", 2)
    assert "is not a directory" in refused("digits", "--run", tmp_path / "none")
    assert "has no run/; give OUT of" in refused("glyphs", "--run", digits)
    assert "is a run on data 'cache'; --data is digits" in refused("digits", "--run", glyphs / "run")
    (glyphs / "judge.safetensors").unlink()
    assert "judge.safetensors is not there" in refused("glyphs", "--run", glyphs)
    out = digits / "config.json" / "result.json"
    assert "config.json" in refused("digits", "--run", digits)
