"""Sampling of a model of the public EAR code by our engine, in the place of its ``sample_tokens``.

:func:`ear_kernels.accelerate` finds this by the entry point ``ear_kernels.accelerate``. Nothing of the public code is
imported: a model has the attributes that its checkpoints name, and ``sample_tokens``, ``sample_orders`` and
``unpatchify``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ear_kernels.public_models import plain_head
from ear_kernels.runtime.plain import is_replaced, replace_method
from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.model.masking import unmasking_schedule
from ear_model.sampling.engine import Engines
from ear_model.scores import EnergyScore

NAMES = (
    *("sample_tokens", "sample_orders", "unpatchify", "class_emb", "fake_latent", "z_proj", "mask_token"),
    *("decoder_norm", "decoder_pos_embed_learned", "decoder_blocks", "scoreloss", "buffer_size"),
)


class _Draws(Draws):
    """The public code's draws, number for number: orders by numpy; noise step by step, by place in the image."""

    def __init__(self, model: Any, steps: int) -> None:
        super().__init__()
        self._model, self._steps = model, steps

    def orders(self, images: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        orders_BL = self._model.sample_orders(images).to(device)
        # Within a step any order gives the same images; this one meets the noise as there.
        parts = [orders_BL[:, keep:left].sort(1).values for left, keep in unmasking_schedule(tokens, self._steps)]
        return torch.cat(parts[::-1], 1)


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


class _Score(EnergyScore):
    """Our energy score over the parameters of a public one."""

    def __init__(self, scoreloss: Any, config: ModelConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
        own = dict(scoreloss.net.named_parameters(remove_duplicate=False))
        for path, module in self.generator.named_modules():
            for name in module._parameters:
                module._parameters[name] = own[f"{path}.{name}" if path else name]
        self.eval()

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        rows = math.prod(shape), self.generator.noise_dim
        return (torch.rand(rows, dtype=like.dtype, device=like.device) - 0.5).view(*shape, -1)


class PublicModel:
    """A public model as the engine sees one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.backbone, self.tokenizer, net = _Backbone(model), self, model.scoreloss.net
        position, first = model.decoder_pos_embed_learned, model.decoder_blocks[0]
        tokens, classes = position.shape[1] - int(model.buffer_size), model.class_emb.num_embeddings
        self.config = ModelConfig(
            image_size=math.isqrt(tokens), channels=model.z_proj.in_features, num_classes=classes,
            width=position.shape[2], depth=len(model.decoder_blocks), num_heads=first.attn.num_heads,
            class_tokens=int(model.buffer_size), noise_dim=int(model.scoreloss.noise_channels),
            generator_width=net.input_proj.out_features, generator_depth=len(net.res_blocks),
        )  # fmt: skip
        self.score = _Score(model.scoreloss, self.config)

    def parameters(self) -> Any:
        return self._model.parameters()

    def modules(self) -> Any:
        """Those whose weights are read."""
        return self._model.modules()

    def sample(self, *arguments: Any, **options: Any) -> Tensor:
        return self._model.sample_tokens(*arguments, **options)

    def decode(self, tokens_BLD: Tensor) -> Tensor:
        """Latents ``[B, channels, H, W]`` of tokens."""
        return self._model.unpatchify(tokens_BLD)


class _Engines(Engines):
    """The engines of a public model, and how they see it."""

    def __init__(self) -> None:
        super().__init__()
        self._view: PublicModel | None = None
        self._parameters: list[int] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Engines, ()

    def view(self, model: Any) -> PublicModel:
        """The model as it is: another view where parameters were put in the place of others."""
        parameters = [id(parameter) for parameter in model.scoreloss.net.parameters()]
        if self._view is None or parameters != self._parameters:
            self._view, self._parameters = PublicModel(model), parameters
        return self._view


def swap(model: Any) -> str | None:
    """Give a public EAR model our ``sample_tokens``; returns what it does, None if this is no such model."""
    if not all(hasattr(model, name) for name in NAMES):
        return None
    if is_replaced(model, "sample_tokens"):
        return None  # somebody else's, on the instance
    model._sampling_engines = _Engines()
    replace_method(model, "sample_tokens", sample_tokens)
    return "the steps as CUDA graphs"


def _is_read(model: Any) -> bool:
    """Whether a model's head is no more than its weights, and what the engine does in their place is its class's."""
    bypassed = is_replaced(model, "forward_mae_decoder") or is_replaced(model.scoreloss, "sample")
    return not bypassed and plain_head(model.scoreloss, model.mask_token) is not None


def sample_tokens(
    self: Any,
    bsz: int,
    num_iter: int = 64,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    labels: Tensor | None = None,
    infer_temperature: float = 1.0,
    progress: bool = False,
    **more: Any,
) -> Tensor:
    """The public method of these arguments: the same draws, the same latents within rounding.

    It goes to the public method itself in training, on a CPU, and where submodules have hooks or wrappers. ``more``
    may hold ``temperature``, which is another name of ``infer_temperature``.
    """
    infer_temperature = more.pop("temperature", infer_temperature)
    engines: _Engines = self._sampling_engines
    device = self.mask_token.device
    wanted = torch.full((bsz,), -1, device=device) if labels is None else labels.to(device).long()
    known = cfg_schedule in ("linear", "constant") and len(wanted) == bsz and not more
    view = engines.view(self) if known and wanted.is_cuda and not self.training and _is_read(self) else None
    if view is None or not engines.takes(view, wanted):
        public = type(self).sample_tokens
        return public(self, bsz, num_iter, cfg, cfg_schedule, labels, infer_temperature, progress, **more)
    setting = SamplingConfig(num_iter, float(cfg), cfg_schedule, float(infer_temperature))  # type: ignore[arg-type]
    options: dict[str, Any] = {"precision": "auto" if torch.is_autocast_enabled("cuda") else "fp32"}
    if progress:
        from tqdm import tqdm

        options["progress"] = tqdm
    with torch.no_grad():
        return view.decode(engines.decode(view, wanted, setting, _Draws(self, num_iter), **options))
