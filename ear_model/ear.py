"""The assembled model: tokenizer, backbone and score. Shapes: B images, L tokens, M masked tokens an image."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ear_kernels.runtime.checks import check_floating
from ear_model.config import ModelConfig, SamplingConfig, check_sampling
from ear_model.draws import TORCH_DRAWS, Draws, ImageDraws
from ear_model.model import masking
from ear_model.model.backbone import Backbone
from ear_model.model.causal import CausalBackbone
from ear_model.model.mar_backbone import MarBackbone
from ear_model.model.weights import check_fit, check_same_score, load_weights, on_meta
from ear_model.presets import model_config
from ear_model.run_dir import AVERAGES_FILE, CONFIG_FILE, WEIGHTS_FILE, latest_checkpoint, load_config, step_of
from ear_model.sampling.engine import Engines, Precision
from ear_model.sampling.steps import Progress
from ear_model.score_names import score_entry
from ear_model.scores import make_score
from ear_model.tokenizers.patches import PixelPatches


class SelectRows(torch.autograd.Function):
    """Rows of a matrix, none of them twice: backward copies, where indexing would add with atomics."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = matrix.shape
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device).index_copy(0, rows, grad), None


class EAR(nn.Module):
    """Continuous autoregression with a strictly proper score: by default energy-based (paper section 4).

    >>> model = EAR.from_preset("digits")
    >>> loss = model(images, labels)          # images [B, channels, size, size], labels [B]
    >>> images = model.sample(labels, guidance=2.0, temperature=0.7)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = PixelPatches(config.image_size, config.channels, config.patch_size)
        backbones = {"ear": Backbone, "mar": MarBackbone}
        self.backbone: Any = (backbones[config.backbone] if config.order == "masked" else CausalBackbone)(config)
        self.score: Any = make_score(config)
        self._engines = Engines()

    @classmethod
    def from_preset(cls, name: str) -> "EAR":
        """A freshly initialised model: "digits", "ear_base", "mar_base" or another of ``presets.MODELS``."""
        return cls(model_config(name))

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, *, ema: bool = True, device: str | torch.device = "cpu") -> "EAR":
        """The trained model of a run directory, in eval mode: the last checkpoint's averaged weights, and
        the tau that its last step was trained with, where its score has one.

        Args:
            run_dir: what ``ear train --out`` wrote.
            ema: the moving average of the weights; False for the raw ones.
            device: where to put it.

        Raises:
            ValueError: no run directory, no checkpoint in it, or a file that is damaged or foreign.
        """
        run_dir = Path(run_dir)
        checkpoint, run = latest_checkpoint(run_dir), load_config(run_dir)
        path = checkpoint / (AVERAGES_FILE if ema else WEIGHTS_FILE)
        config, tensors = load_weights(path)
        check_same_score(config, run.model, path, run_dir)
        if config != run.model:
            raise ValueError(f"{path} holds another architecture than {run_dir / CONFIG_FILE}")
        # Compared before there is memory for the model: a small file may name a huge one.
        weights = check_fit(on_meta(lambda: cls(config), path), tensors, path)
        model = cls(config)
        model.load_state_dict(weights)
        if "tau" in score_entry(config.score).train_options:
            model.score.tau = run.train.tau_of(max(0, step_of(checkpoint) - 1))
        return model.to(device).eval()

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        num_masked: int | None = None,
        draws: Draws = TORCH_DRAWS,
        run_blocks: Callable[[Tensor], Tensor] | None = None,
        score_loss: Callable[[Tensor, Tensor, Draws], Tensor] | None = None,
    ) -> Tensor:
        """The training loss of the score over the masked tokens, or over all of a causal model's (paper Eq. 10 for
        EAR), a scalar in float32.

        Args:
            images: images or latents, ``[B, channels, size, size]``, floating point.
            labels: int64 ``[B]``. Values are checked on a CPU only: reading a GPU tensor would stall the step.
            num_masked: masked tokens an image; drawn anew for every batch if None (docs/model.md, "Masking").
                Must be None with a causal order, which masks nothing.
            draws: where orders, dropped classes and noise come from.
            run_blocks: what does the work of ``backbone.run_blocks`` in its place, such as a CUDA graph.
            score_loss: likewise of ``score.loss``.

        Raises:
            ValueError: wrong shapes, labels or num_masked out of range. TypeError: no tensors, or of wrong dtypes.
        """
        check_floating("images", images)
        self._check_labels(labels, images.shape[0])
        is_causal = self.config.order != "masked"
        if is_causal and num_masked is not None:
            raise ValueError(
                f"num_masked is {num_masked} and the model's order is {self.config.order!r}, which masks nothing; "
                "give None"
            )
        tokens_BLT = self.score.encode(self.tokenizer.encode(images))
        rows = self._next_token_rows if is_causal else partial(self._masked_rows, num_masked)
        return (score_loss or self.score.loss)(*rows(tokens_BLT, labels, draws, run_blocks), draws)

    def _masked_rows(
        self,
        num_masked: int | None,
        tokens_BLT: Tensor,
        labels: Tensor,
        draws: Draws,
        run_blocks: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[R, C]`` and values ``[R, T]`` of the masked tokens."""
        batch, num_tokens, token_size = tokens_BLT.shape
        if num_masked is None:
            num_masked = masking.draw_num_masked(num_tokens, self.config.min_mask_ratio, self.config.masking, draws)
        if not 1 <= num_masked <= num_tokens:
            raise ValueError(f"num_masked is {num_masked}; it must be in 1..{num_tokens}")
        orders_BL = masking.random_orders(batch, num_tokens, tokens_BLT.device, draws)
        positions_BM = orders_BL[:, :num_masked]
        masked_BL = torch.zeros_like(orders_BL, dtype=torch.bool).scatter(1, positions_BM, True)
        hidden_BLC = self.backbone(tokens_BLT, masked_BL, self._embed_classes(labels, draws), run_blocks, num_masked)
        starts_B1 = torch.arange(batch, device=tokens_BLT.device).unsqueeze(1) * num_tokens
        rows_R = (positions_BM + starts_B1).flatten()
        hidden_RC = SelectRows.apply(hidden_BLC.flatten(0, 1), rows_R)
        return hidden_RC, tokens_BLT.reshape(-1, token_size)[rows_R]

    def _next_token_rows(
        self, tokens_BLT: Tensor, labels: Tensor, draws: Draws, run_blocks: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B L, C]`` and values ``[B L, T]`` of all tokens, image by image in the model's order."""
        hidden_BLC = self.backbone(tokens_BLT, self._embed_classes(labels, draws), run_blocks)
        return hidden_BLC.flatten(0, 1), tokens_BLT[:, self.backbone.order_L].flatten(0, 1)

    def _embed_classes(self, labels: Tensor, draws: Draws) -> Tensor:
        """Class embeddings ``[B, C]``, in training some of them the null class's."""
        classes_BC = self.backbone.embed_classes(labels)
        return self.backbone.drop_classes(classes_BC, draws) if self.training else classes_BC

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        *,
        steps: int = 64,
        guidance: float = 1.0,
        temperature: float = 1.0,
        guidance_schedule: Literal["linear", "constant"] = "linear",
        guidance_from: float = 0.0,
        guidance_to: float = 1.0,
        order: Literal["random", "halton"] = "random",
        diffusion_steps: int = 100,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        precision: Precision = "auto",
        progress: Progress | None = None,
    ) -> Tensor:
        """Images or latents ``[B, channels, size, size]`` in float32; the same seed gives the same images.

        On a GPU the steps are replayed as CUDA graphs, which the first call of a batch size captures; images agree
        with those of the plain loop (:func:`ear_model.sampling.decoding.decode_tokens`) within rounding.

        Args:
            labels: int64 ``[B]``.
            steps: decoding steps; any number. A causal model takes one token a step, whatever it is.
            guidance: guidance scale g; 1 is none.
            temperature: factor on the shift of the generator's residual blocks; other scores have their own
                (docs/training.md, "Other scores").
            guidance_schedule: "linear" (g grows as tokens become known) or "constant".
            guidance_from, guidance_to: guidance is applied while the share of known tokens is in this interval.
            order: of the tokens, "random" as in the paper or "halton" (docs/sampling.md, "Approximations"). A causal
                model has an order of its own, and "halton" is refused.
            diffusion_steps: of the diffusion score, from noise to a token.
            generator: a torch.Generator of the labels' device, which all images are drawn from in turn.
            draws: in its place where orders and noise come from, such as :class:`ear_model.draws.ImageDraws`. With
                neither of the two every image has draws of its own, of a seed that torch's CPU generator gives.
            precision: what is computed in: "fp32", "bf16", or "auto", which is autocast's dtype where that is on,
                and otherwise bfloat16 on a GPU and the parameters' dtype on a CPU.
            progress: wraps the steps (:class:`ear_model.sampling.decoding.Step`), such as ``tqdm``.

        Raises:
            ValueError: options or labels out of range, or options of another score. TypeError: labels that are no
            int64 tensor. RunError: a model that samples values that are not finite.
        """
        interval = guidance_from, guidance_to
        sampling = SamplingConfig(
            steps, guidance, guidance_schedule, temperature, *interval, order, diffusion_steps=diffusion_steps
        )
        check_sampling(self.config, sampling)
        self._check_labels(labels, labels.shape[0] if isinstance(labels, Tensor) and labels.ndim else 0)
        if generator is not None and draws is not None:
            raise ValueError("generator and draws were both given; give one of them")
        if generator is not None:
            draws = Draws(generator)
        elif draws is None:
            draws = ImageDraws(int(torch.randint(2**63 - 1, ())), range(len(labels)))
        tokens_BLT = self._engines.decode(self, labels, sampling, draws, precision=precision, progress=progress)
        return self.tokenizer.decode(self.score.decode(tokens_BLT))

    def _apply(self, fn: Any, recurse: bool = True) -> "EAR":
        """What ``to``, ``cuda``, ``float`` and the like do; engines hold the parameters' old memory."""
        self.release()
        return super()._apply(fn, recurse)

    def release(self) -> None:
        """Free the buffers and graphs that sampling on a GPU keeps; the next call makes them anew."""
        self._engines.release()

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            kind = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise TypeError(f"labels are {kind}; they must be an int64 tensor")
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"labels have shape {tuple(labels.shape)}; they must be [{batch}]")
        if labels.device.type != "cpu" or labels.numel() == 0 or torch.compiler.is_compiling():
            return
        outside = labels[(labels < 0) | (labels >= self.config.num_classes)]
        if outside.numel():
            raise ValueError(f"label {int(outside[0])} is out of range; classes are 0..{self.config.num_classes - 1}")
