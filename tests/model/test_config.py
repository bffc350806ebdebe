"""Configurations: checks, round trip, other versions."""

import json
from dataclasses import fields, replace

import pytest

from ear_model.config import ModelConfig, RunConfig, TrainConfig, from_dict, to_dict
from ear_model.presets import MODELS, RUNS, with_model


@pytest.mark.parametrize("config", [*MODELS.values(), *RUNS.values()])
def test_round_trip_through_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config))), "here") == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(format_version=99), "version 99"),
        (lambda d: d.pop("format_version"), "version None"),
        (lambda d: d["model"].update(colour=1), "colour"),
        (lambda d: d["model"].pop("width"), "width"),
        (lambda d: d.update(model=3), "3 is no configuration"),
        (lambda d: d["model"].update(width=-1), "width is -1"),
        (lambda d: d["model"].update(width="wide"), "wrong type"),
    ],
)
def test_foreign_configurations_are_refused(change, named):
    stored = to_dict(RUNS["digits"])
    change(stored)
    with pytest.raises(ValueError, match=named):
        from_dict(RunConfig, stored, "config.json")


def test_a_run_from_before_a_field_is_what_it_was():
    stored = to_dict(RUNS["glyphs64"])
    assert stored["model"].pop("masking") == "cosine"
    assert stored["model"].pop("position_init") == "sinusoid"
    model = replace(RUNS["glyphs64"].model, masking="truncated_normal", position_init="normal")
    assert from_dict(RunConfig, stored, "config.json") == replace(RUNS["glyphs64"], model=model)
    del stored["model"]["min_mask_ratio"]
    with pytest.raises(ValueError, match=r"config.json: ModelConfig.*missing fields \['min_mask_ratio'\]"):
        from_dict(RunConfig, stored, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 2.5),
        ("num_samples", 1),
        ("patch_size", 3),
        ("num_heads", 5),
        ("dropout", 1.0),
        ("min_mask_ratio", 0.0),
        ("noise", "cauchy"),
        ("image_size", 0),
        ("masking", "uniform"),
        ("position_init", "zeros"),
    ],
)
def test_bad_model_values_are_named(field, value):
    with pytest.raises(ValueError, match=str(value)):
        replace(MODELS["digits"], **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("accumulate", 3), ("lr", 0.0), ("ema", 1.0), ("tau", 1.1), ("finetune_steps", 600_000)],
)
def test_bad_training_values_are_named(field, value):
    with pytest.raises(ValueError, match=str(value)):
        replace(TrainConfig(), **{field: value})


def test_paper_defaults():
    """docs/model.md, "Backbone", "Masking" and "Optimiser"."""
    model, train = ModelConfig(), TrainConfig()
    assert (model.dropout, model.attention_dropout, model.label_dropout, model.noise_dim) == (0.1, 0.1, 0.1, 64)
    assert (train.beta1, train.beta2, train.weight_decay, train.clip, train.ema) == (0.9, 0.95, 0.02, 3.0, 0.9999)
    assert (train.lr, train.generator_lr_scale, train.finetune_tau, train.batch_size) == (8e-4, 0.25, 0.99, 2048)
    assert train.finetune_lr == pytest.approx(7e-5 * 2048 / 256)


@pytest.mark.parametrize(("name", "latents", "guidance"), [("imagenet256", 16, 3.0), ("imagenet512", 32, 4.0)])
def test_imagenet_recipes_are_the_papers(name, latents, guidance):
    """750 + 50 epochs, the last with tau 0.99 and lr 7e-5 * batch / 256; L = 256 or 1024 latents."""
    run = RUNS[name]
    assert run.model == replace(MODELS["ear_base"], image_size=latents)
    assert (run.train.batch_size, run.train.lr, run.train.ema, run.train.schedule) == (2048, 8e-4, 0.9999, "constant")
    assert (run.train.finetune_tau, run.train.tau) == (0.99, 1.0)
    assert run.train.finetune_lr == pytest.approx(7e-5 * 2048 / 256)
    epoch = 1_281_167 // run.train.batch_size
    assert (run.train.steps, run.train.warmup_steps, run.train.finetune_steps) == (
        800 * epoch,
        100 * epoch,
        50 * epoch,
    )
    sampling = run.sampling
    assert (sampling.steps, sampling.guidance, sampling.temperature, run.data) == (64, guidance, 0.7, "cache")


def test_another_model_keeps_the_data():
    run = with_model(RUNS["imagenet512"], "ear_huge")
    assert run.model == replace(MODELS["ear_huge"], image_size=32)
    assert run.train == RUNS["imagenet512"].train
    assert with_model(RUNS["glyphs64"], "ear_base").model.token_dim == 8
    with pytest.raises(ValueError, match="unknown preset 'ear_tiny'"):
        with_model(run, "ear_tiny")


def test_glyph_recipe_has_the_glyphs_classes_and_the_tokenizer_s_latents():
    from ear_model.data.glyphs import CHARACTERS
    from ear_model.tokenizers.config import SMALL, TokenizerTraining

    model = RUNS["glyphs64"].model
    assert model.num_classes == len(CHARACTERS)
    assert model.channels == SMALL.latent_channels
    assert model.image_size * SMALL.downsampling == TokenizerTraining().image_size


def test_every_field_is_documented():
    """The command line shows the string below a field as its help."""
    import inspect

    from ear_model import config as module

    source = inspect.getsource(module)
    for cls in (ModelConfig, TrainConfig, module.SamplingConfig, RunConfig):
        body = source.split(f"class {cls.__name__}")[1].split("@dataclass")[0]
        for field in fields(cls):
            after = body.split(f"\n    {field.name}: ")[1].split("\n")[1]
            assert after.strip().startswith('"""'), f"{cls.__name__}.{field.name}"
