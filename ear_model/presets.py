"""Models and runs by name."""

from dataclasses import replace
from typing import Any

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, TrainConfig, with_score
from ear_model.score_names import score_entry

EAR_BASE = ModelConfig()
EAR_LARGE = replace(EAR_BASE, width=1024, depth=32, num_heads=16, generator_width=1280, generator_depth=8)
EAR_HUGE = replace(EAR_BASE, width=1280, depth=40, num_heads=16, generator_width=1536, generator_depth=12)
DIGITS = ModelConfig(
    image_size=8,
    channels=1,
    patch_size=2,
    num_classes=10,
    width=96,
    depth=3,
    num_heads=4,
    class_tokens=4,
    dropout=0.0,
    attention_dropout=0.0,
    generator_width=64,
    generator_depth=3,
)

# Latents of 64-pixel images under the tokenizer that `ear train-tokenizer` makes by default (docs/glyphs.md).
GLYPHS = ModelConfig(
    image_size=8,
    channels=8,
    num_classes=48,
    width=384,
    depth=10,
    num_heads=6,
    class_tokens=16,
    dropout=0.0,
    attention_dropout=0.0,
    generator_width=512,
    generator_depth=3,
    num_samples=2,
    masking="cosine",
    position_init="sinusoid",
)

# Pixels of `ear mnist` (docs/mnist.md): a token is 4 x 4 of them in three equal channels.
MNIST = ModelConfig(
    image_size=28,
    channels=3,
    patch_size=4,
    num_classes=10,
    width=128,
    depth=4,
    num_heads=4,
    class_tokens=4,
    dropout=0.0,
    attention_dropout=0.0,
    generator_width=128,
    generator_depth=3,
    num_samples=2,
    masking="cosine",
    position_init="sinusoid",
)

MAR_BASE = replace(EAR_BASE, score="diffusion", backbone="mar", encoder_depth=12, depth=12)
MAR_LARGE = replace(
    MAR_BASE, width=1024, encoder_depth=16, depth=16, num_heads=16, generator_width=1280, generator_depth=8
)
MAR_HUGE = replace(
    MAR_BASE, width=1280, encoder_depth=20, depth=20, num_heads=16, generator_width=1536, generator_depth=12
)

MODELS: dict[str, ModelConfig] = {
    "digits": DIGITS,
    "ear_base": EAR_BASE,
    "ear_large": EAR_LARGE,
    "ear_huge": EAR_HUGE,
    "mar_base": MAR_BASE,
    "mar_large": MAR_LARGE,
    "mar_huge": MAR_HUGE,
    "glyphs": GLYPHS,
    "mnist": MNIST,
}
# What MAR's public runs do and EAR's don't: the head at the full rate and no fine-tuning; guidance by size, and the
# temperature of a diffusion, whose noise is not the generator's.
_MAR_TRAIN: dict[str, Any] = {"generator_lr_scale": 1.0, "finetune_steps": 0, "finetune_tau": 1.0}
MAR_SAMPLING = {
    name: SamplingConfig(guidance=guidance, temperature=1.0)
    for name, guidance in (("mar_base", 2.9), ("mar_large", 3.0), ("mar_huge", 3.2))
}

IMAGENET_IMAGES = 1_281_167
# A batch of 2,048 goes into an epoch 625 times; the rest is left over, as in the public code. 750 epochs, the first
# 100 of them warming up, and 50 of fine-tuning.
_STEPS_PER_EPOCH = IMAGENET_IMAGES // 2048
_IMAGENET = TrainConfig(
    steps=800 * _STEPS_PER_EPOCH,
    warmup_steps=100 * _STEPS_PER_EPOCH,
    finetune_steps=50 * _STEPS_PER_EPOCH,
    log_every=50,
)

RUNS: dict[str, RunConfig] = {
    "digits": RunConfig(
        data="digits",
        model=DIGITS,
        train=TrainConfig(
            steps=2600, batch_size=64, lr=3e-3, schedule="cosine", warmup_steps=100, ema=0.99, checkpoint_every=260
        ),
        sampling=SamplingConfig(steps=16, guidance=2.0, temperature=0.7),
    ),
    "glyphs64": RunConfig(
        data="cache",
        model=GLYPHS,
        train=TrainConfig(
            steps=20_000,
            batch_size=512,
            lr=1e-3,
            generator_lr_scale=0.5,
            schedule="cosine",
            warmup_steps=500,
            ema=0.999,
        ),
        sampling=SamplingConfig(steps=64, guidance=2.0, temperature=0.8),
    ),
    "mnist": RunConfig(
        data="cache",
        model=MNIST,
        train=TrainConfig(
            steps=4000, batch_size=64, lr=2e-3, schedule="cosine", warmup_steps=200, ema=0.995, checkpoint_every=400
        ),
        sampling=SamplingConfig(steps=49, guidance=2.0, temperature=0.8),
    ),
    "imagenet256": RunConfig(data="cache", model=EAR_BASE, train=_IMAGENET),
    "imagenet512": RunConfig(
        data="cache", model=replace(EAR_BASE, image_size=32), train=_IMAGENET, sampling=SamplingConfig(guidance=4.0)
    ),
}

# What a run with another score takes, by preset and score: fields of ModelConfig, fields of SamplingConfig. What is
# not here is the preset's own. Of fewer diffusion steps than a model was trained with the first multiplies the error
# of the predicted noise (1000 and 100: by 316), which a net as small as that of the digits does not bear.
SCORE_SETTINGS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "digits": {
        "diffusion": ({"diffusion_steps": 100}, {"guidance": 2.0, "temperature": 1.0}),
        "mixture": ({}, {"guidance": 1.5, "temperature": 1.0}),
        "gaussian": ({}, {"guidance": 2.0, "temperature": 0.3}),
        "categorical": ({"codebook_size": 512}, {"guidance": 1.5, "temperature": 0.8}),
    },
}

# Images of an epoch of those runs' data; the glyphs are those of docs/glyphs.md.
EPOCH_IMAGES = {
    "digits": 1347,
    "mnist": 4000,
    "glyphs64": 192_000,
    "imagenet256": IMAGENET_IMAGES,
    "imagenet512": IMAGENET_IMAGES,
}


def model_config(name: str) -> ModelConfig:
    """The model preset of that name. Raises ValueError for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"unknown preset {name!r}; use one of {', '.join(MODELS)}")
    return MODELS[name]


def with_model(run: RunConfig, name: str) -> RunConfig:
    """A run with the model preset of that name, with the run's own image size, channels, patches and classes.

    A preset of MAR brings its training and sampling along.

    Raises:
        ValueError: an unknown name.
    """
    data_fields = ("image_size", "channels", "patch_size", "num_classes")
    data_shape = {field_name: getattr(run.model, field_name) for field_name in data_fields}
    model = replace(model_config(name), **data_shape)
    if name not in MAR_SAMPLING:
        return replace(run, model=model)
    return replace(run, model=model, train=replace(run.train, **_MAR_TRAIN), sampling=MAR_SAMPLING[name])


def with_score_and_order(preset: str, run: RunConfig, score: str | None, order: str | None) -> RunConfig:
    """A run of a preset with the score and order of those names; None keeps its own.

    A score without the generator is trained at the backbone's learning rate, one other than energy without tau. It is
    made and sampled as ``SCORE_SETTINGS`` says.

    Raises:
        ValueError: unknown names.
    """
    if score not in (None, run.model.score):
        assert score is not None
        has_generator = "noise_dim" in score_entry(score).options
        scale = run.train.generator_lr_scale if has_generator else 1.0
        train = replace(run.train, generator_lr_scale=scale, finetune_tau=1.0)
        model_fields, sampling_fields = SCORE_SETTINGS.get(preset, {}).get(score, ({}, {}))
        model = replace(with_score(run.model, score), **model_fields)
        sampling = replace(run.sampling, **sampling_fields)
        run = replace(run, model=model, train=train, sampling=sampling)
    if order is not None:
        changed: dict[str, Any] = {"order": order}
        run = replace(run, model=replace(run.model, **changed))
    return run
