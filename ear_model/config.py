"""Configurations as dataclasses.

Every field can be set on the command line (``ear train digits --train.steps 500``) and is stored in the run
directory and in the metadata of every weight file.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from ear_model.config_checks import check_range, check_types, type_hints
from ear_model.errors import shown
from ear_model.score_names import SCORES, score_entry

# Raised whenever a stored configuration of an older version can't be read as it stands.
FORMAT_VERSION = 3
# Fields that stored configurations may lack, by class: added later, with the value for what was done before.
_ADDED_FIELDS: dict[str, dict[str, Any]] = {
    "ModelConfig": {
        "masking": "truncated_normal",
        "position_init": "normal",
        "score": "energy",
        "order": "masked",
        "components": 16,
        "codebook_size": 1024,
        "backbone": "ear",
        "encoder_depth": 12,
        "diffusion_steps": 1000,
        "kernel": "gaussian",
        "bandwidth": 1.0,
    },
    "RunConfig": {"codebook": ""},
    "TrainConfig": {"min_lr": 0.0},
    "SamplingConfig": {"guidance_from": 0.0, "guidance_to": 1.0, "order": "random", "diffusion_steps": 100},
}

Order = Literal["masked", "causal", "random"]
ORDERS: tuple[str, ...] = get_args(Order)
Config = TypeVar("Config")


def _check_divides(config: Any, name: str, divisor: str) -> None:
    value, part = getattr(config, name), getattr(config, divisor)
    if value % part:
        raise ValueError(f"{name} {value} is not divisible by {divisor} {part}")


@dataclass(frozen=True)
class ModelConfig:
    """The model: data shape, backbone, generator and score. Defaults are the paper's."""

    image_size: int = 16
    """Height and width of the images or latents that the model reads (16 for 256-pixel images under KL-16)."""
    channels: int = 16
    """Channels of the images or latents."""
    patch_size: int = 1
    """Side of the square patch that makes one token."""
    num_classes: int = 1000
    """Number of classes; labels are 0 .. num_classes - 1."""
    width: int = 768
    """Backbone width C."""
    depth: int = 24
    """Backbone blocks."""
    num_heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the backbone's MLP over its own width."""
    class_tokens: int = 64
    """Copies of the class embedding in front of the tokens."""
    dropout: float = 0.1
    """Dropout of the projections in the backbone."""
    attention_dropout: float = 0.1
    """Dropout of the attention weights."""
    generator_width: int = 1024
    """Width W of the MLP generator."""
    generator_depth: int = 6
    """Residual blocks of the MLP generator."""
    noise_dim: int = 64
    """Size of a noise vector (Table 3: 64)."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """Noise distribution: uniform on [-0.5, 0.5) or standard normal (Table 3: uniform)."""
    alpha: float = 1.0
    """Exponent of the energy loss, in (0, 2] (Table 2: 1)."""
    num_samples: int = 4
    """Samples per masked token in training; all pairs are used. Of the diffusion score: noise levels per token."""
    components: int = 16
    """Gaussians of the mixture score."""
    codebook_size: int = 1024
    """Number K of different tokens of the categorical score."""
    min_mask_ratio: float = 0.7
    """Smallest share of masked tokens in training, with truncated_normal."""
    masking: Literal["truncated_normal", "cosine"] = "truncated_normal"
    """Share of masked tokens in training: the paper's, or that of a random moment of decoding in few steps."""
    position_init: Literal["normal", "sinusoid"] = "normal"
    """Start of the learned positions: normal 0.02 as in the paper, or with a 2-D sinusoid added to the tokens'."""
    label_dropout: float = 0.1
    """Share of images whose class is replaced by the null class in training (for guidance)."""
    score: str = "energy"
    """The score that is trained (docs/scores.md)."""
    order: Order = "masked"
    """Bidirectional over masked tokens, or causal over next tokens: row by row, or in one random order for all
    (docs/model.md, "Orders")."""
    backbone: Literal["ear", "mar"] = "ear"
    """One stack of blocks over all tokens, or MAR's: an encoder of the known ones, then a decoder of depth blocks."""
    encoder_depth: int = 12
    """Blocks of the mar backbone's encoder."""
    diffusion_steps: int = 1000
    """Noise levels T of the diffusion score."""
    kernel: Literal["gaussian", "laplace"] = "gaussian"
    """Kernel of the kernel score: exp(-|v|^2 / (2 h^2)) or exp(-|v| / h)."""
    bandwidth: float = 1.0
    """Bandwidth h of that kernel in units of sqrt(D), D numbers of a token; for tokens of about unit variance."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("image_size", "channels", "patch_size", "num_classes", "width", "depth", "num_heads", "class_tokens")
        check_range(self, "at least 1", *sizes, "generator_width", "generator_depth", "noise_dim", "components")
        check_range(self, "at least 1", "encoder_depth", "diffusion_steps")
        check_range(self, "positive", "mlp_ratio")
        check_range(self, "in (0, 2]", "alpha")
        check_range(self, "positive and finite", "bandwidth")
        check_range(self, "at least 1" if self.score == "diffusion" else "at least 2", "num_samples")
        check_range(self, "at least 2", "codebook_size")
        check_range(self, "at most 2^24", "codebook_size")
        check_range(self, "in (0, 1]", "min_mask_ratio")
        check_range(self, "in [0, 1)", "dropout", "attention_dropout", "label_dropout")
        _check_divides(self, "image_size", "patch_size")
        _check_divides(self, "width", "num_heads")
        own = score_entry(self.score).options
        for name, default in _options_of_scores().items():
            if name not in own and getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)}; the {self.score} score has no {name}")
        if self.backbone == "mar" and self.order != "masked":
            raise ValueError(f"order is {self.order!r}; the mar backbone has the order 'masked' alone")
        if self.backbone != "mar" and self.encoder_depth != ModelConfig.encoder_depth:
            raise ValueError(f"encoder_depth is {self.encoder_depth}; the {self.backbone} backbone has no encoder")

    @property
    def num_tokens(self) -> int:
        """L, tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """D, numbers in a token."""
        return self.channels * self.patch_size**2


@functools.cache
def _options_of_scores() -> dict[str, Any]:
    """Fields of ModelConfig that are not of every score, with their defaults."""
    names = {name for entry in SCORES.values() for name in entry.options}
    return {entry.name: entry.default for entry in dataclasses.fields(ModelConfig) if entry.name in names}


def with_score(config: ModelConfig, score: str) -> ModelConfig:
    """The model with another score; what only other scores read is what it is by default.

    Raises:
        ValueError: an unknown score.
    """
    own = score_entry(score).options
    others = {name: default for name, default in _options_of_scores().items() if name not in own}
    return dataclasses.replace(config, score=score, **others)


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled when the command line does not say otherwise."""

    steps: int = 64
    """Decoding steps; a causal model takes one token a step, whatever this is."""
    guidance: float = 3.0
    """Guidance scale; 1 is none."""
    guidance_schedule: Literal["linear", "constant"] = "linear"
    """How the guidance scale grows over the steps."""
    temperature: float = 0.7
    """Factor on the generator's noise shift; below 1 trades diversity for accuracy."""
    guidance_from: float = 0.0
    """Share of known tokens from which guidance is applied; before it the null class is not computed."""
    guidance_to: float = 1.0
    """Share of known tokens up to which guidance is applied."""
    order: Literal["random", "halton"] = "random"
    """Order of the tokens: uniformly random, or one that keeps tokens of a step apart (docs/sampling.md). A causal
    model has its own, and takes "random" here."""
    diffusion_steps: int = 100
    """Steps of the diffusion score from noise to a token, evenly spaced over those of its training."""

    def guides(self, left: int, num_tokens: int) -> bool:
        """Whether there is guidance in a step that begins with ``left`` of the tokens masked."""
        return self.guidance != 1 and self.guidance_from <= 1 - left / num_tokens < self.guidance_to

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "at least 1", "steps", "diffusion_steps")
        check_range(self, "at least 0 and finite", "guidance", "temperature", "guidance_from")
        check_range(self, "positive and finite", "guidance_to")
        if self.guidance_from >= self.guidance_to:
            raise ValueError(
                f"guidance_from is {self.guidance_from}; it must be below guidance_to, {self.guidance_to}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the length of the run (docs/model.md, "Optimiser"); the paper's where it gives one."""

    steps: int = 500_000
    """Optimiser steps."""
    batch_size: int = 2048
    """Images per optimiser step, over all accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is split into; their gradients are averaged."""
    lr: float = 8e-4
    """Peak learning rate."""
    generator_lr_scale: float = 0.25
    """Factor on the generator's learning rate (the paper's lambda)."""
    parameter_groups: Literal["paper", "public"] = "paper"
    """'paper': the whole generator gets the scaled rate; 'public': its biases and norms keep the full rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 62_500
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Learning rate that the cosine schedule ends at."""
    weight_decay: float = 0.02
    """AdamW weight decay of the backbone's matrices and embeddings."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    clip: float = 3.0
    """Largest gradient norm."""
    ema: float = 0.9999
    """Decay of the moving average of the weights, per optimiser step."""
    tau: float = 1.0
    """Weight of the diversity term of the energy loss."""
    finetune_steps: int = 0
    """Last steps, trained with finetune_tau and finetune_lr (section 4.3)."""
    finetune_tau: float = 0.99
    """tau of the fine-tuning steps."""
    finetune_lr: float = 5.6e-4
    """Constant learning rate of the fine-tuning steps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """'auto' is bf16 autocast on a GPU and fp32 on a CPU."""
    compile: bool = False
    """torch.compile of the backbone's blocks in place of our kernels (docs/performance.md)."""
    cuda_graphs: bool = True
    """Replay blocks, generator and loss as CUDA graphs; in bf16, with heads up to 80, without compile or fsdp."""
    loss_chunks: int = 1
    """Parts of the masked tokens that the generator takes one after another; saves memory (not with fsdp)."""
    rows_per_noise: int = 1
    """Rows that share a noise vector (docs/noise_pool.md); 1 is independent noise, as in the paper."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several processes: a whole model each (ddp), or its parts spread over them (fsdp)."""
    seed: int = 0
    """Seed of weights, data order, masks and noise."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every")
        check_range(self, "at least 1", *counts, "loss_chunks", "rows_per_noise")
        check_range(self, "positive", "lr", "finetune_lr", "generator_lr_scale", "clip")
        check_range(self, "at least 0", "warmup_steps", "finetune_steps", "weight_decay", "seed", "min_lr")
        check_range(self, "in [0, 1)", "beta1", "beta2", "ema")
        check_range(self, "in (0, 1]", "tau", "finetune_tau")
        _check_divides(self, "batch_size", "accumulate")
        if self.finetune_steps > self.steps:
            raise ValueError(f"finetune_steps is {self.finetune_steps}; it must not exceed steps, {self.steps}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must not exceed lr, {self.lr}")

    def is_finetuning(self, step: int) -> bool:
        """Whether step (from 0) belongs to the tau fine-tuning phase at the end of the run."""
        return step >= self.steps - self.finetune_steps

    def tau_of(self, step: int) -> float:
        """Weight of the loss's diversity term in step ``step`` (from 0)."""
        return self.finetune_tau if self.is_finetuning(step) else self.tau


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    data: Literal["digits", "cache", "npz"] = "digits"
    """Data set: scikit-learn's digits, a cache of `ear cache`, or a cache of the public EAR and MAR code."""
    data_path: str = ""
    """Directory of the cache; unused for the digits."""
    tokenizer: str = ""
    """Weights of the tokenizer that decodes samples to pixels; empty if the model reads pixels."""
    codebook: str = ""
    """File of `ear train-codebook` that the categorical score starts with; its checkpoints hold the codebook."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to sample by default."""

    def __post_init__(self) -> None:
        check_types(self)
        check_training(self.model, self.train)
        check_sampling(self.model, self.sampling)


# Fields of TrainConfig that are not of every score, with the value that asks for nothing.
_OFF = {"tau": 1.0, "finetune_tau": 1.0, "loss_chunks": 1, "rows_per_noise": 1}


def check_training(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming option and score, unless what is asked of the training is for this score."""
    asked = [name for name, off in _OFF.items() if getattr(train, name) != off]
    if not train.finetune_steps:
        asked = [name for name in asked if name != "finetune_tau"]
    for name in asked:
        if name not in score_entry(model.score).train_options:
            raise ValueError(
                f"{name} is {getattr(train, name)}; the {model.score} score has no {name} (leave it at {_OFF[name]})"
            )


def check_sampling(model: ModelConfig, sampling: SamplingConfig) -> None:
    """Raise ValueError, naming option and score, unless the options of sampling are for this score."""
    defaults, own = SamplingConfig(), score_entry(model.score).sampling_options
    for name in sorted({name for entry in SCORES.values() for name in entry.sampling_options} - set(own)):
        if getattr(sampling, name) != getattr(defaults, name):
            raise ValueError(f"{name} is {getattr(sampling, name)}; the {model.score} score has no {name}")
    if model.score == "diffusion" and sampling.diffusion_steps > model.diffusion_steps:
        raise ValueError(
            f"diffusion_steps is {sampling.diffusion_steps}; it must not exceed the model's, {model.diffusion_steps}"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain numbers, strings and dicts, with the format version."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """The configuration that :func:`to_dict` wrote.

    Args:
        cls: the dataclass.
        values: the dict, with ``format_version``.
        where: the file it came from, for messages.

    Raises:
        ValueError: another version's configuration, missing or unknown fields, values out of range. A field that is
            younger than the file may be missing; it then has the value that stands for what was done before it.
    """
    values = dict(values) if isinstance(values, dict) else {}
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: configuration of format version {version}; this program reads version {FORMAT_VERSION}"
        )
    return _build(cls, values, where)


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {shown(values)} is no configuration of {cls.__name__}")
    values = {**_ADDED_FIELDS.get(cls.__name__, {}), **values}
    known = {entry.name for entry in dataclasses.fields(cls)}
    if set(values) != known:
        unknown, missing = sorted(map(str, set(values) - known)), sorted(known - set(values))
        raise ValueError(
            f"{where}: {cls.__name__} of another version (unknown fields {unknown}, missing fields {missing})"
        )
    hints = type_hints(cls)
    parts = {name: value for name, value in values.items() if dataclasses.is_dataclass(hints[name])}
    built = {name: _build(hints[name], value, where) for name, value in parts.items()}
    try:
        return cls(**{**values, **built})
    except TypeError as error:
        raise ValueError(f"{where}: {cls.__name__} holds a value of the wrong type ({error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {cls.__name__}: {error}") from error
