"""Sampling of a model of the public EAR or MAR code by our engine, in the place of its ``sample_tokens``.

:func:`ear_kernels.accelerate` finds this by the entry point ``ear_kernels.accelerate``. Nothing of the public code is
imported: a model has the attributes that its checkpoints name, and ``sample_tokens``, ``sample_orders`` and
``unpatchify``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_kernels.public_models import plain_head
from ear_kernels.runtime.plain import is_replaced, replace_method, runs_forward
from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.model.masking import unmasking_schedule
from ear_model.sampling.engine import Engines
from ear_model.scores.denoising import Denoising
from ear_model.scores.diffusion import DiffusionScore
from ear_model.scores.diffusion_process import DiffusionProcess
from ear_model.scores.energy import EnergyScore

NAMES = (
    *("sample_tokens", "sample_orders", "unpatchify", "class_emb", "fake_latent", "z_proj", "mask_token"),
    *("decoder_norm", "decoder_pos_embed_learned", "decoder_blocks", "buffer_size"),
)
"""Attributes of both."""
MAR_NAMES = (
    *("z_proj_ln", "encoder_blocks", "encoder_norm", "encoder_pos_embed_learned", "decoder_embed"),
    *("diffusion_pos_embed_learned", "diffloss"),
)
PROCESS_NAMES = ("betas", "timestep_map")
"""Of ``diffloss.gen_diffusion``: the variances of the times that sampling keeps, and those times."""


class _Draws(Draws):
    """The public code's draws, number for number: orders by numpy; noise step by step, by place in the image."""

    def __init__(self, model: Any, steps: int) -> None:
        super().__init__()
        self._model, self._steps = model, steps

    def mark(self, device: torch.device) -> Callable[[], object]:
        rewind, numbers = super().mark(device), np.random.get_state()

        def go_back() -> None:
            rewind()
            np.random.set_state(numbers)

        return go_back

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


def _take_parameters(own: Any, public: Any) -> None:
    """Put a public module's parameters into one of ours, made on "meta", by their names."""
    given = dict(public.named_parameters(remove_duplicate=False))
    for path, module in own.named_modules():
        for name in module._parameters:
            module._parameters[name] = given[f"{path}.{name}" if path else name]


class _EnergyScore(EnergyScore):
    """Our energy score over the parameters of a public one."""

    def __init__(self, scoreloss: Any, config: ModelConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
        _take_parameters(self.generator, scoreloss.net)
        self.eval()

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        rows = math.prod(shape), self.generator.noise_dim
        return (torch.rand(rows, dtype=like.dtype, device=like.device) - 0.5).view(*shape, -1)


class _DiffusionScore(DiffusionScore):
    """Our diffusion score over the parameters and the process of a public one."""

    def __init__(self, diffloss: Any, config: ModelConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
        _take_parameters(self.net, diffloss.net)
        process = diffloss.gen_diffusion
        self._respaced = list(process.timestep_map), DiffusionProcess(np.asarray(process.betas, np.float64))
        self.is_guided = False
        self.eval()

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS, diffusion_steps: int = 100) -> Tensor:
        """As drawn there: the start, then each step's for both halves, the last step's too."""
        rows, size = math.prod(shape), self.token_size
        noise = torch.empty(diffusion_steps, rows, size, device=like.device)
        torch.randn(rows, size, out=noise[0])
        both = torch.empty(rows * (2 if self.is_guided else 1), size, device=like.device)
        for step in range(1, diffusion_steps + 1):
            torch.randn(both.shape, out=both)
            if step < diffusion_steps:
                noise[step].copy_(both[:rows])
        return noise.transpose(0, 1).reshape(*shape, -1)

    def denoising(self, rows: int, diffusion_steps: int, *, guided: bool) -> Denoising:
        return Denoising(self.net, *self._respaced, rows, guided=guided)


class PublicModel:
    """A public model as the engine sees one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.backbone, self.tokenizer = _Backbone(model), self
        self.is_mar = hasattr(model, "diffloss")
        loss = model.diffloss if self.is_mar else model.scoreloss
        position, first, net = model.decoder_pos_embed_learned, model.decoder_blocks[0], loss.net
        tokens, classes = position.shape[1] - int(model.buffer_size), model.class_emb.num_embeddings
        own: dict[str, Any] = {"noise_dim": int(loss.noise_channels)} if not self.is_mar else {
            "score": "diffusion", "backbone": "mar", "encoder_depth": len(model.encoder_blocks),
            "diffusion_steps": max(loss.gen_diffusion.timestep_map) + 1,
        }  # fmt: skip
        self.config = ModelConfig(
            image_size=math.isqrt(tokens), channels=model.z_proj.in_features, num_classes=classes,
            width=position.shape[2], depth=len(model.decoder_blocks), num_heads=first.attn.num_heads,
            class_tokens=int(model.buffer_size), generator_width=net.input_proj.out_features,
            generator_depth=len(net.res_blocks), **own,
        )  # fmt: skip
        self.score: Any = (_DiffusionScore if self.is_mar else _EnergyScore)(loss, self.config)

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

    def setting(self, steps: int, guidance: float, schedule: str, temperature: float) -> SamplingConfig:
        """Of a call of the public method, which is what the score draws for next."""
        more: dict[str, Any] = {}
        if self.is_mar:
            self.score.is_guided = guidance != 1
            more["diffusion_steps"] = len(self.score._respaced[0])
        return SamplingConfig(steps, guidance, schedule, temperature, **more)  # type: ignore[arg-type]


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
        loss = model.diffloss if hasattr(model, "diffloss") else model.scoreloss
        parameters = [id(parameter) for parameter in loss.net.parameters()]
        if hasattr(model, "diffloss"):
            parameters.append(id(loss.gen_diffusion))
        if self._view is None or parameters != self._parameters:
            self._view, self._parameters = PublicModel(model), parameters
        return self._view


def swap(model: Any) -> str | None:
    """Give a public EAR or MAR model our ``sample_tokens``; returns what it does, None if this is no such model."""
    is_mar = all(hasattr(model, name) for name in MAR_NAMES)
    if not all(hasattr(model, name) for name in NAMES) or not (is_mar or hasattr(model, "scoreloss")):
        return None
    if is_mar and not _is_read_process(getattr(model.diffloss, "gen_diffusion", None)):
        return None
    if is_replaced(model, "sample_tokens"):
        return None  # somebody else's, on the instance
    model._sampling_engines = _Engines()
    replace_method(model, "sample_tokens", sample_tokens)
    return "the steps as CUDA graphs"


def _is_read_process(process: Any) -> bool:
    """Whether a public diffusion process predicts the noise and a variance in its range, if it says so."""
    kinds = {"model_mean_type": "EPSILON", "model_var_type": "LEARNED_RANGE"}
    is_known = all(getattr(getattr(process, name, None), "name", kind) == kind for name, kind in kinds.items())
    return is_known and all(hasattr(process, name) for name in PROCESS_NAMES)


def _is_read(model: Any) -> bool:
    """Whether a model's head is no more than its weights, and what the engine does in their place is its class's."""
    if hasattr(model, "diffloss"):
        loss, bypassed = model.diffloss, ["forward_mae_encoder", "forward_mae_decoder"]
        is_plain = runs_forward(loss.net) and not is_replaced(loss.net, "forward_with_cfg")
    else:
        loss, bypassed = model.scoreloss, ["forward_mae_decoder"]
        is_plain = plain_head(loss, model.mask_token) is not None
    return is_plain and not is_replaced(loss, "sample") and not any(is_replaced(model, name) for name in bypassed)


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
    setting = view.setting(num_iter, float(cfg), cfg_schedule, float(infer_temperature))
    options: dict[str, Any] = {"precision": "auto" if torch.is_autocast_enabled("cuda") else "fp32"}
    if progress:
        from tqdm import tqdm

        options["progress"] = tqdm
    with torch.no_grad():
        return view.decode(engines.decode(view, wanted, setting, _Draws(self, num_iter), **options))
