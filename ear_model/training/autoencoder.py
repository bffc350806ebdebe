"""Training a small autoencoder on a tree of images, for data sets that KL-16 is too large or too coarse for.

The loss is the mean absolute error of the reconstruction plus a small KL term. The perceptual and adversarial losses
that the public autoencoder was trained with are left out: they sharpen textures of photographs and need a pretrained
network and a discriminator.
"""

import functools
import glob
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_model import signals
from ear_model.data.batches import Batches
from ear_model.data.images import ImageFolderData
from ear_model.data.prefetch import Prefetcher
from ear_model.draws import seeded_generator
from ear_model.errors import shown
from ear_model.files import remove_temporaries, require_writable, write_atomically, writing
from ear_model.progress import Progress
from ear_model.tensor_files import usable_weights
from ear_model.tokenizers.config import AutoencoderConfig, TokenizerTraining
from ear_model.tokenizers.kl16 import AutoencoderKL, Posterior
from ear_model.tokenizers.latent import AutoencoderTokenizer, save_autoencoder
from ear_model.torch_files import read_torch
from ear_model.training.optimizer_state import checked_moments

GOES_ON = "the same command goes on"
MAX_HELD_OUT = 256
MAX_SCALE_IMAGES = 4096


@dataclass(frozen=True)
class TokenizerReport:
    """How good the trained autoencoder is, on images in -1..1."""

    held_out: int
    """Number of held-out images that the errors are of; 0: too few images, the errors are of training images."""
    squared_error: float
    """Mean squared error of decoding the posterior's mean."""
    squared_error_of_mean: float
    """That of predicting the mean training image for all."""
    latent_scale: float
    """1 / standard deviation of the latents drawn over the training images."""

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio of the reconstruction in dB."""
        return 10 * math.log10(4 / max(self.squared_error, 1e-12))


def train_autoencoder(
    images: Path,
    out: Path,
    config: AutoencoderConfig,
    training: TokenizerTraining,
    *,
    device: torch.device | str = "cpu",
    threads: int = 4,
    allow_empty: bool = False,
    quiet: bool = False,
) -> TokenizerReport:
    """Train an autoencoder and write it, with its latent scale, to ``out``.

    One image in ten, at most 256, is held out for the report. On a CPU the same seed gives the same file, also after
    an interruption, for which OUT.partial is kept until ``out`` is written.

    Args:
        images: tree of images, a folder a class.
        out: ``*.safetensors`` to write; must not exist.
        config: shape of the autoencoder.
        training: how to train it.
        device: where.
        threads: threads that decode images.
        allow_empty: take a tree with folders that hold no images.
        quiet: no progress bar.

    Raises:
        ValueError: a bad tree, images that can't be read, sizes that don't fit, ``out`` that exists or can't be
            written or is being written, an OUT.partial of other settings; a loss that is not finite, with its step.
    """
    device = torch.device(device)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists already; give a new --out, or remove it")
    if config.image_channels != 3:
        raise ValueError(f"image_channels is {config.image_channels}; images are read as RGB, 3 channels")
    if training.image_size % config.downsampling:
        raise ValueError(f"image size is {training.image_size}; it must be a multiple of {config.downsampling}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024")
    everything = ImageFolderData(images, training.image_size, allow_empty=allow_empty)
    with writing(out):
        return _train(everything, out, config, training, device, threads, quiet)


def _train(
    everything: ImageFolderData,
    out: Path,
    config: AutoencoderConfig,
    training: TokenizerTraining,
    device: torch.device,
    threads: int,
    quiet: bool,
) -> TokenizerReport:
    """What :func:`train_autoencoder` does once its arguments are checked, and nobody else writes the file."""
    order = torch.from_numpy(np.random.default_rng(training.seed).permutation(len(everything)))
    held_out = min(len(everything) // 10, MAX_HELD_OUT)
    train, test = everything.select(order[held_out:]), everything.select(order[: held_out or MAX_HELD_OUT])

    steps = AutoencoderSteps(config, training, device)
    model, optimizer = steps.model, steps.optimizer
    partial = out.with_name(out.name + ".partial")
    settings = {
        "model": {**asdict(config), "multipliers": list(config.multipliers)},
        # With or without a graph a step is the same.
        "training": {name: value for name, value in asdict(training).items() if name != "cuda_graph"},
        "images": everything.tree.names_digest(),
    }
    step = _resume(partial, settings, model, optimizer)
    remove_temporaries(out.parent, f"{glob.escape(out.name)}*")
    require_writable(out, needed_bytes=sum(parameter.numel() * 16 for parameter in model.parameters()))
    # Before the prefetcher: what its threads do on the GPU would break a capture.
    steps.capture()

    note = ""
    batches = Batches(train, training.batch_size, training.seed)
    with (
        Progress(training.steps, step, "step", quiet=quiet) as progress,
        Prefetcher(batches, step, device, threads=threads, depth=2 * threads) as prefetcher,
        signals.deferred(),
    ):
        while step < training.steps:
            loss = steps.step(next(prefetcher)[0], step, learning_rate(step, training))
            step += 1
            stop = signals.received()
            keep = (stop or step % training.checkpoint_every == 0) and step < training.steps
            if keep or step % 50 == 0 or step == training.steps:  # the only wait for the device
                if not math.isfinite(float(loss)):
                    raise ValueError(f"step {step}: the loss is {float(loss)}; lower --lr")
                note = f"loss {float(loss):.4f}"
            progress.update(1, note)
            if keep:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state = {"settings": settings, "step": step, **states}
                write_atomically(partial, functools.partial(torch.save, state))
            if stop:
                raise signals.Interrupted(stop, f"stopped after step {step} of {training.steps}; {GOES_ON}")

    # At scale 1 the tokenizer's latents are the network's own.
    tokenizer = AutoencoderTokenizer(model, 1.0)
    shown = train.select(torch.arange(min(len(train), MAX_SCALE_IMAGES)))
    scale = _latent_scale(tokenizer, shown, training.seed)
    report = _report(tokenizer, shown, test, held_out, scale)
    save_autoencoder(out, model, scale)
    partial.unlink(missing_ok=True)
    return report


@torch.no_grad()
def initialise(model: AutoencoderKL) -> None:
    """Start every residual as the identity and the posterior narrow; a plain start spends its first steps on that."""
    for module in model.modules():
        last = getattr(module, "conv2", None) or getattr(module, "proj_out", None)
        if last is not None:
            last.weight.zero_()
            last.bias.zero_()
    # A deviation of 0.05; at 1 the draws would drown the means.
    bias = model.quant_conv.bias
    assert bias is not None
    bias[model.config.latent_channels :] = -6.0


def learning_rate(step: int, training: TokenizerTraining) -> float:
    """Rate of step ``step`` (from 0): linear warm-up over 5 % of the steps, then half a cosine to zero."""
    warmup = max(1, training.steps // 20)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    return training.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training.steps - warmup)))


class Reconstruction(nn.Module):
    """The loss of images and the noise that their latents are drawn with."""

    def __init__(self, autoencoder: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.autoencoder, self.kl_weight = autoencoder, kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Absolute error a pixel plus ``kl_weight`` times the divergence a latent number, a scalar in float32.

        Args:
            images: ``[B, 3, H, W]`` in -1..1.
            noise: standard normal ``[B, c, H / f, W / f]``.
        """
        posterior = Posterior(self.autoencoder.moments(images).float())
        latents = torch.addcmul(posterior.mean, torch.exp(0.5 * posterior.logvar), noise)
        error = F.l1_loss(self.autoencoder.decode(latents).float(), images)
        return error + self.kl_weight * posterior.kl().mean() / noise[0].numel()


class AutoencoderSteps:
    """An autoencoder in training: its weights, its optimiser, and one optimiser step after another.

    Args:
        config: shape of the autoencoder.
        training: learning rates, batch and sizes; the seed gives the weights and the noise of every step.
        device: where.
    """

    def __init__(self, config: AutoencoderConfig, training: TokenizerTraining, device: torch.device) -> None:
        self.training, self.device = training, device
        on_gpu = device.type == "cuda"
        torch.manual_seed(training.seed)
        self.model = AutoencoderKL(config).to(device).train()
        initialise(self.model)
        if on_gpu:  # as cuDNN's convolutions in bfloat16 want it
            self.model.to(memory_format=torch.channels_last)
        self._plain = Reconstruction(self.model, training.kl_weight)
        self._captured: Any = None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=on_gpu
        )

    def noise_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        """``[B, c, H / f, W / f]`` of images ``[B, 3, H, W]``."""
        config, (batch, _, height, width) = self.model.config, images.shape
        return batch, config.latent_channels, height // config.downsampling, width // config.downsampling

    def capture(self) -> None:
        """On a GPU, unless ``cuda_graph`` is off: from now on whole batches replay forward and backward as one graph.

        With the weights where they will stay, and while no other thread uses the GPU.
        """
        if self.device.type == "cuda" and self.training.cuda_graph:
            self._capture()

    def _capture(self) -> None:
        size = self.training.image_size
        images = torch.zeros(self.training.batch_size, self.model.config.image_channels, size, size)
        samples = tuple(part.to(self.device) for part in (images, torch.zeros(self.noise_shape(images))))
        # The graph's gradients come from the stream of the capture; autograd waits for it, and would warn of that.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # A module of its own over the same weights: capturing replaces its forward.
        own = Reconstruction(self.model, self.training.kl_weight)
        with self._autocast():
            self._captured = torch.cuda.make_graphed_callables(own, samples)
        self._captured_shape = images.shape

    def _autocast(self) -> torch.autocast:
        # A cast weight must not be kept from one replay to the next.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        )

    def step(self, images: Tensor, step: int, lr: float) -> Tensor:
        """One optimiser step, its noise drawn by the seed and ``step``. A batch of another size than the captured one
        is computed without the graph.

        Args:
            images: ``[B, 3, H, W]`` in -1..1, float32, on the device.
            step: number of the step, from 0.
            lr: learning rate.

        Returns:
            The loss before the step, a scalar in float32 on the device, without waiting for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        draws = seeded_generator(self.training.seed, 1, step, device=self.device)
        noise = torch.empty(self.noise_shape(images), device=self.device).normal_(generator=draws)
        replayed = self._captured is not None and images.shape == self._captured_shape
        with self._autocast():
            loss = (self._captured if replayed else self._plain)(images, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimizer.step()
        # The next replay writes its loss over this one.
        return loss.detach().clone()


def _resume(partial: Path, settings: dict[str, Any], model: AutoencoderKL, optimizer: torch.optim.Optimizer) -> int:
    """Load OUT.partial if it is there; returns the steps done."""
    if not partial.is_file():
        return 0
    state = read_torch(partial)
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise ValueError(f"{partial} is damaged or foreign; remove it to begin anew")
    stored = state["settings"]
    if stored != settings:
        changed = [name for name in settings if stored.get(name) != settings[name]]
        raise ValueError(f"{partial} was begun with another {' and '.join(changed)}; remove it to begin anew")
    step, weights = state.get("step"), state.get("model")
    if type(step) is not int or not 0 <= step < settings["training"]["steps"] or not isinstance(weights, dict):
        raise ValueError(f"{partial}: step is {shown(step)}; it is damaged, remove it to begin anew")
    model.load_state_dict(usable_weights(partial, model.state_dict(), weights))
    names = [name for name, _ in model.named_parameters()]
    checked_moments(state.get("optimizer"), [names], dict(model.named_parameters()), str(partial))
    optimizer.load_state_dict(state["optimizer"])
    return step


def _read(data: ImageFolderData, device: torch.device) -> Iterator[Tensor]:
    """Batches of unflipped images on the device."""
    for part in torch.arange(len(data)).split(64):
        yield data.read(part).to(device)


def _latent_scale(tokenizer: AutoencoderTokenizer, data: ImageFolderData, seed: int) -> float:
    """1 / standard deviation of latents drawn over the images."""
    count, total, squares = 0, 0.0, 0.0
    for step, images in enumerate(_read(data, tokenizer.device)):
        generator = seeded_generator(seed, 2, step, device=tokenizer.device)
        latents = tokenizer.sample_latents(images, generator).double()
        count += latents.numel()
        total += float(latents.sum())
        squares += float(latents.square().sum())
    variance = squares / count - (total / count) ** 2
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(f"the latents have variance {variance}; the training went wrong, lower --lr or --kl-weight")
    return 1 / math.sqrt(variance)


def _report(
    tokenizer: AutoencoderTokenizer, train: ImageFolderData, test: ImageFolderData, held_out: int, scale: float
) -> TokenizerReport:
    """Errors on ``test``, against the mean of the training images."""
    mean = torch.stack([images.double().sum(0) for images in _read(train, tokenizer.device)]).sum(0) / len(train)
    squared, baseline = 0.0, 0.0
    for images in _read(test, tokenizer.device):
        decoded = tokenizer.decode(Posterior(tokenizer.encode(images)).mean)
        squared += float((decoded - images).double().square().mean((1, 2, 3)).sum())
        baseline += float((mean - images).square().mean((1, 2, 3)).sum())
    return TokenizerReport(held_out, squared / len(test), baseline / len(test), scale)
