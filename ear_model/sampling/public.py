"""Sampling of a model of the public EAR code by our engine, in the place of its ``sample_tokens``.

:func:`ear_kernels.accelerate` finds this by the entry point ``ear_kernels.accelerate``. Nothing of the public code is
imported: a model has the attributes that its checkpoints name, and ``sample_tokens``, ``sample_orders`` and
``unpatchify``.
"""

import functools
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import Draws
from ear_model.sampling.engine import Engines

NAMES = (
    *("sample_tokens", "sample_orders", "unpatchify", "class_emb", "fake_latent", "z_proj", "mask_token"),
    *("decoder_norm", "decoder_pos_embed_learned", "decoder_blocks", "scoreloss", "buffer_size"),
)


class _Draws(Draws):
    """The public code's draws, number for number: orders by numpy, noise step by step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def orders(self, images: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        return self._model.sample_orders(images).to(device)


class _Backbone:
    """What the engine reads of a backbone; a negative label is the null class."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed_classes(self, labels_B: Tensor) -> Tensor:
        known = self._model.class_emb(labels_B.clamp(min=0))
        return torch.where(labels_B.unsqueeze(1) < 0, self._model.fake_latent, known)

    def null_class(self, batch: int) -> Tensor:
        return self._model.fake_latent.expand(batch, -1)

    def modules(self) -> Any:
        return self._model.decoder_blocks.modules()


class _Score:
    """What the engine calls of a score."""

    def __init__(self, scoreloss: Any) -> None:
        self._scoreloss = scoreloss

    def parameters(self) -> Any:
        return self._scoreloss.net.parameters()

    def modules(self) -> Any:
        return self._scoreloss.net.modules()

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws) -> Tensor:
        rows = math.prod(shape), int(self._scoreloss.noise_channels)
        return (torch.rand(rows, dtype=like.dtype, device=like.device) - 0.5).view(*shape, -1)

    def sample(
        self, hidden_RC: Tensor, null_hidden_RC: Tensor | None, guidance: Any, temperature: float, noise_RE: Tensor
    ) -> Tensor:
        if null_hidden_RC is not None:
            hidden_RC = guidance * hidden_RC + (1 - guidance) * null_hidden_RC
        return self._scoreloss.net(hidden_RC, noise_RE, temperature).float()


class PublicModel:
    """A public model as the engine sees one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.backbone, self.score, self.tokenizer = _Backbone(model), _Score(model.scoreloss), self
        position, first = model.decoder_pos_embed_learned, model.decoder_blocks[0]
        tokens, classes = position.shape[1] - int(model.buffer_size), model.class_emb.num_embeddings
        self.config = ModelConfig(
            image_size=math.isqrt(tokens), channels=model.z_proj.in_features, num_classes=classes,
            width=position.shape[2], depth=len(model.decoder_blocks), num_heads=first.attn.num_heads,
            class_tokens=int(model.buffer_size), noise_dim=int(model.scoreloss.noise_channels),
        )  # fmt: skip

    def parameters(self) -> Any:
        return self._model.parameters()

    def sample(self, *arguments: Any, **options: Any) -> Tensor:
        return self._model.sample_tokens(*arguments, **options)

    def decode(self, tokens_BLD: Tensor) -> Tensor:
        """Latents ``[B, channels, H, W]`` of tokens."""
        return self._model.unpatchify(tokens_BLD)


def swap(model: Any) -> str | None:
    """Give a public EAR model our ``sample_tokens``; returns what it does, None if this is no such model."""
    if not all(hasattr(model, name) for name in NAMES):
        return None
    engines, public = Engines(), model.sample_tokens

    @functools.wraps(public)
    def sample_tokens(
        self: Any,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        view, device = PublicModel(self), self.mask_token.device
        wanted = torch.full((bsz,), -1, device=device) if labels is None else labels.to(device).long()
        known = cfg_schedule in ("linear", "constant") and len(wanted) == bsz
        if self.training or not known or not engines.takes(view, wanted):
            return public(bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress)
        setting = SamplingConfig(num_iter, float(cfg), cfg_schedule, float(temperature))  # type: ignore[arg-type]
        precision = "auto" if torch.is_autocast_enabled("cuda") else "fp32"
        with torch.no_grad():
            options: dict[str, Any] = {"precision": precision, "progress": _bar() if progress else None}
            return view.decode(engines.decode(view, wanted, setting, _Draws(self), **options))

    model.sample_tokens = MethodType(sample_tokens, model)
    return "the steps as CUDA graphs"


def _bar() -> Callable:
    from tqdm import tqdm

    return tqdm
