"""What --dry-run reckons: against the paper, counted operations, and the measurement behind it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ear_model import cli
from ear_model.config import ModelConfig
from ear_model.ear import EAR
from ear_model.model.masking import draw_num_masked
from ear_model.presets import EAR_BASE, EAR_HUGE, EAR_LARGE, RUNS
from ear_model.training import estimate
from ear_model.training.estimate import estimate_run, mean_mask_ratio, training_flops


@pytest.mark.parametrize(
    ("model", "parameters"), [(EAR_BASE, 205_608_720), (EAR_LARGE, 474_755_088), (EAR_HUGE, 937_314_576)]
)
def test_parameters_are_the_papers(model, parameters):
    assert estimate.count_parameters(model) == parameters


@pytest.mark.parametrize("num_samples", [2, 4])
def test_flops_are_those_that_run(num_samples):
    config = ModelConfig(
        image_size=8,
        channels=4,
        patch_size=2,
        num_classes=5,
        width=48,
        depth=3,
        num_heads=4,
        class_tokens=8,
        generator_width=40,
        generator_depth=2,
        noise_dim=24,
        num_samples=num_samples,
        min_mask_ratio=1.0,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = EAR(config).train()

    # The CPU's attention is counted by some versions of torch (2.15) and not by others (2.14).
    def attention(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 4]))
    assert counter.get_total_flops() / 3 == pytest.approx(training_flops(config) / 3, rel=0.01)


def test_a_noise_pool_saves_modulation_only():
    saved = training_flops(EAR_BASE) - training_flops(EAR_BASE, rows_per_noise=4)
    rows = 256 * mean_mask_ratio(0.7) * 4
    modulation = rows * (6 * 3 * 1024**2 + 2 * 1024**2 + 64 * 1024)
    assert saved == pytest.approx(6 * 0.75 * modulation, rel=1e-9)


def test_mean_mask_ratio_is_that_of_training():
    assert mean_mask_ratio(0.7) == pytest.approx(0.867, abs=5e-4)
    assert mean_mask_ratio(1.0) == 1.0
    drawn = [draw_num_masked(1000, 0.4) / 1000 for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean_mask_ratio(0.4), abs=0.012)
    drawn = [draw_num_masked(1000, 0.4, "cosine") / 1000 for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean_mask_ratio(0.4, "cosine"), abs=0.02)
    ratio = training_flops(replace(EAR_BASE, masking="cosine")) / training_flops(EAR_BASE)
    assert 2 / 3.1416 / 0.867 < ratio < 1


def test_the_measured_model_is_given_its_measurement():
    step = estimate.MEASURED[0]
    train = replace(RUNS["imagenet256"].train, accumulate=2048 // step.images)
    result = estimate_run(replace(RUNS["imagenet256"], train=train), 1, 1_281_167)
    assert result.is_measured
    assert result.micro_batch == step.images
    assert result.peak_gb == pytest.approx(step.peak_gb)
    assert result.images_per_second == pytest.approx(step.images / step.milliseconds * 1e3)
    seconds = 500_000 * 2048 / result.images_per_second
    assert result.gpu_days == pytest.approx(seconds / 86_400)
    assert 0.05 < result.utilisation < 1


def test_other_models_scale_by_flops():
    deep = replace(EAR_BASE, depth=36)
    base, large = (estimate_run(replace(RUNS["imagenet256"], model=model)) for model in (EAR_BASE, deep))
    assert base.is_measured
    assert not large.is_measured
    assert large.utilisation == pytest.approx(base.utilisation)
    assert base.images_per_second / 2 < large.images_per_second < base.images_per_second
    assert large.peak_gb > base.peak_gb


def test_the_command_needs_no_data_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "imagenet256", "--model", "ear_large", "--dry-run", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    for words in (
        "474,755,088 parameters, 256 tokens of 16",
        "500,000 of 2,048 images = 799.3 epochs of 1,281,167",
        "31,250 with tau 0.99 and learning rate 0.00056",
        "measured:",
        "at 256 images at a time",
        "GPU-days",
    ):
        assert words in text, text
    assert cli.main(["train", "imagenet512", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("scaled by FLOPs", "--train.accumulate 16 fits"):
        assert words in text, text
    assert cli.main(["train", "digits", "--dry-run"]) == 0
    assert "an upper bound" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--gpus", "0"], "gpus is 0"),
        (["--gpus", "3"], "not divisible by 3 GPUs"),
        (["--model", "ear_tiny"], "unknown preset 'ear_tiny'"),
        (["--model"], "--model needs a name"),
    ],
)
def test_bad_options_are_one_line(options, named, capsys):
    assert cli.main(["train", "imagenet256", "--dry-run", *options]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
