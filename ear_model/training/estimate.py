"""What a run will take, found without data or GPU (``ear train ... --dry-run``)."""

import math
from dataclasses import dataclass

import torch

from ear_model.config import ModelConfig, RunConfig
from ear_model.ear import EAR
from ear_model.presets import MODELS
from ear_model.score_names import score_entry

H200_BF16_FLOPS = 989e12  # dense tensor-core FLOP/s of the data sheet
H200_MEMORY_GB = 141.0
# Below this share of the measured model's FLOPs an image, launching kernels takes longer than running them.
# The glyphs, at 0.021, reached 0.6 of the speed so scaled on an H100.
SMALL = 0.03
# Weights, gradients, two AdamW moments and the moving average, all float32.
BYTES_PER_PARAMETER = 20


@dataclass(frozen=True)
class MeasuredStep:
    """A training step that was measured on one H200. To add one: run the benchmark, then a line in ``MEASURED``."""

    model: str
    """Name in ``ear_model.config.MODELS``."""
    milliseconds: float
    """Of a whole step: forward, backward, clip, AdamW, EMA."""
    images: int
    """Images of that step."""
    peak_gb: float
    """torch.cuda.max_memory_reserved() / 1e9: what CUDA graphs keep between their kernels counts nowhere else."""
    source: str
    """The committed result, and what ran."""


_STEP = "benchmarks/results/train_step_h200_2026-11-24.json, medians"
MEASURED = (
    MeasuredStep("ear_base", 80.0, 64, 18.8, _STEP),
    MeasuredStep("ear_large", 162.1, 64, 33.5, _STEP),
    MeasuredStep("ear_huge", 318.1, 64, 56.4, _STEP),
)


def mean_mask_ratio(minimum: float, masking: str = "truncated_normal") -> float:
    """Mean of training's mask ratio, a normal of mean 1 and deviation 0.25 truncated to [minimum, 1].

    With ``masking`` "cosine" it is 2/pi (:func:`ear_model.masking.draw_num_masked`).
    """
    if masking == "cosine":
        return 2 / math.pi
    if minimum == 1:
        return 1.0
    low = (minimum - 1) / 0.25
    density = (math.exp(-low * low / 2) - 1) / math.sqrt(2 * math.pi)
    return 1 + 0.25 * density / (0.5 - 0.5 * (1 + math.erf(low / math.sqrt(2))))


def training_flops(config: ModelConfig, rows_per_noise: int = 1) -> float:
    """Floating-point operations of the matrix products that training takes for one image: forward and backward.

    A multiply-add counts 2, the backward pass twice the forward one. The mean number of masked tokens goes through
    the generator, once for each of ``num_samples`` samples; its modulation runs once for ``rows_per_noise`` rows. A
    score without such a generator says itself what it multiplies for a token.
    """
    tokens, width = config.num_tokens, config.width
    positions = config.class_tokens + tokens - (config.order != "masked")  # a causal order's last token is no input
    block = (4 + 2 * config.mlp_ratio) * width**2 * positions + 2 * positions**2 * width
    backbone = config.depth * block + tokens * config.token_dim * width

    masked = _predicted_tokens(config)
    if not _has_generator(config):
        return 2 * 3 * (backbone + masked * _meta_model(config).score.multiply_adds())
    rows, hidden = masked * config.num_samples, config.generator_width
    conditions = rows / rows_per_noise
    generator = masked * width * hidden + conditions * config.noise_dim * hidden
    generator += config.generator_depth * (rows * 2 + conditions * 3) * hidden**2
    generator += conditions * 2 * hidden**2 + rows * hidden * config.token_dim
    return 2 * 3 * (backbone + generator)


def _predicted_tokens(config: ModelConfig) -> float:
    """Tokens of an image that a training step predicts, on average."""
    if config.order != "masked":
        return config.num_tokens
    return config.num_tokens * mean_mask_ratio(config.min_mask_ratio, config.masking)


def _has_generator(config: ModelConfig) -> bool:
    """Whether the score's head is the MLP generator of section 4.2, with noise for its condition."""
    return {"generator_depth", "noise_dim"} <= set(score_entry(config.score).options)


def _activation_units(config: ModelConfig) -> float:
    """A number that grows as the memory which one image's activations take: values kept for the backward pass, with
    about 17 per token, width and backbone block, and 8 per row, width and generator block."""
    backbone = 17 * (config.class_tokens + config.num_tokens) * config.width * config.depth
    masked = _predicted_tokens(config)
    if not _has_generator(config):
        return backbone + masked * _meta_model(config).score.kept_numbers()
    return backbone + 8 * masked * config.num_samples * config.generator_width * config.generator_depth


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, counted without allocating it."""
    return sum(parameter.numel() for parameter in _meta_model(config).parameters())


def _meta_model(config: ModelConfig) -> EAR:
    with torch.device("meta"):
        return EAR(config)


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate_run` found; times and memory are estimates, and :meth:`report` says from what."""

    config: RunConfig
    gpus: int
    num_images: int | None
    """Images of an epoch, if known."""
    parameters: int
    flops_per_image: float
    """Training FLOPs of one image."""
    images_per_second: float
    """Of one GPU."""
    peak_gb: float
    """Of one GPU, at ``micro_batch`` images."""
    micro_batch: int
    """Images at a time on one GPU: the batch over GPUs and accumulated parts."""
    basis: MeasuredStep
    """The measurement behind it."""
    is_measured: bool
    """Whether that is of this very model."""

    @property
    def gpu_days(self) -> float:
        """All images of the run on one GPU, in days."""
        train = self.config.train
        return train.steps * train.batch_size / self.images_per_second / 86_400

    @property
    def utilisation(self) -> float:
        """Share of an H200's dense bf16 peak (MFU)."""
        return self.images_per_second * self.flops_per_image / H200_BF16_FLOPS

    def report(self) -> str:
        """Everything as a few lines of text."""
        model, train, basis = self.config.model, self.config.train, self.basis
        basis_model = MODELS[basis.model]
        images = train.steps * train.batch_size
        epochs = f" = {images / self.num_images:,.1f} epochs of {self.num_images:,}" if self.num_images else ""
        lines = [
            f"model       {self.parameters:,} parameters, {model.num_tokens} tokens of {model.token_dim} numbers",
            f"steps       {train.steps:,} of {train.batch_size:,} images{epochs}",
        ]
        if train.finetune_steps:
            lines.append(
                f"            the last {train.finetune_steps:,} with "
                + (f"tau {train.finetune_tau:g} and " if train.finetune_tau != 1 else "")
                + f"learning rate {train.finetune_lr:g}"
            )
        measured = f"{basis.milliseconds} ms for {basis.images} images of {basis.model} on one H200 ({basis.source})"
        how = "measured" if self.is_measured else "scaled by FLOPs, at equal utilisation, from"
        if model.score != basis_model.score:
            how = f"the {model.score} score was not measured; {how}"
        if self.flops_per_image < SMALL * training_flops(basis_model):
            how = "an upper bound that so small a model won't reach; " + how
        lines += [
            f"speed       about {self.images_per_second:,.0f} images/s a GPU"
            + (
                f", {self.gpus * self.images_per_second:,.0f} if {self.gpus} scale perfectly" if self.gpus > 1 else ""
            ),
            f"            {self.flops_per_image / 1e9:,.0f} GFLOP an image, {self.utilisation:.0%} of an H200's "
            f"{H200_BF16_FLOPS / 1e12:.0f} TFLOP/s; {how}: {measured}",
            f"memory      about {self.peak_gb:,.1f} GB a GPU at {self.micro_batch} images at a time "
            f"({train.batch_size} / {self.gpus} GPUs / {train.accumulate} accumulated)" + self._advice(),
            f"time        {self.gpu_days:,.3g} GPU-days, {24 * self.gpu_days / self.gpus:,.3g} hours on {self.gpus} "
            f"{'GPU' if self.gpus == 1 else 'GPUs'}",
        ]
        return "\n".join(lines)

    def _advice(self) -> str:
        if self.peak_gb <= H200_MEMORY_GB:
            return ""
        fixed = self.parameters * BYTES_PER_PARAMETER / 1e9
        an_image = (self.peak_gb - fixed) / self.micro_batch
        whole = self.micro_batch * self.config.train.accumulate
        for parts in range(1, whole + 1):
            if whole % parts == 0 and fixed + an_image * whole / parts <= 0.9 * H200_MEMORY_GB:
                return f"; more than the {H200_MEMORY_GB:.0f} GB of an H200: --train.accumulate {parts} fits"
        return f"; more than the {H200_MEMORY_GB:.0f} GB of an H200, with one image too"


def estimate_run(config: RunConfig, gpus: int = 1, num_images: int | None = None) -> Estimate:
    """Steps, speed, memory and time of a run.

    A model in ``MEASURED`` takes its time; another one that of the measured model nearest in FLOPs, scaled by FLOPs.
    Memory is 20 bytes a parameter and activations scaled likewise by their number. More GPUs are taken to scale
    perfectly.

    Args:
        config: the run.
        gpus: number of GPUs.
        num_images: images of an epoch, to print epochs.

    Raises:
        ValueError: a number of GPUs that is not positive or does not divide the batch.
    """
    train, model = config.train, config.model
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; it must be at least 1")
    if (train.batch_size // train.accumulate) % gpus:
        raise ValueError(
            f"batch_size {train.batch_size} in {train.accumulate} accumulated parts is not divisible by {gpus} GPUs"
        )
    flops = training_flops(model, train.rows_per_noise)
    basis = min(MEASURED, key=lambda step: abs(math.log(training_flops(MODELS[step.model]) / flops)))
    basis_model = MODELS[basis.model]
    basis_flops = training_flops(basis_model)
    scale = _activation_units(model) / _activation_units(basis_model)
    basis_activations_gb = basis.peak_gb - count_parameters(basis_model) * BYTES_PER_PARAMETER / 1e9
    micro_batch = train.batch_size // train.accumulate // gpus
    parameters = count_parameters(model)
    return Estimate(
        config=config,
        gpus=gpus,
        num_images=num_images,
        parameters=parameters,
        flops_per_image=flops,
        images_per_second=basis.images / (basis.milliseconds / 1e3) * basis_flops / flops,
        peak_gb=parameters * BYTES_PER_PARAMETER / 1e9 + basis_activations_gb * scale * micro_batch / basis.images,
        micro_batch=micro_batch,
        basis=basis,
        is_measured=model.score == basis_model.score and math.isclose(flops, basis_flops, rel_tol=1e-3),
    )
