"""What makes the steps of a run fast or small, handed to a model at each step; the model knows nothing of it."""

import contextlib
from collections.abc import Iterable
from typing import Any

from ear_kernels import LowCopies
from ear_model.config import TrainConfig, check_training
from ear_model.ear import EAR
from ear_model.model.backbone import Backbone
from ear_model.model.masking import possible_num_masked
from ear_model.scores import EnergyScore
from ear_model.training.graphs import CapturedBlocks, CapturedLoss, is_plain
from ear_model.training.loss import TrainingLoss


class Engine:
    """The engine of a model in training: CUDA graphs, 16-bit copies of weights, chunks of the loss, shared noise.

    >>> engine = Engine(model, loss_chunks=2)
    >>> engine.capture(batch_size, use_bf16=True)              # on a GPU
    >>> with engine.scope():
    ...     with torch.autocast("cuda", torch.bfloat16):
    ...         loss = model(images, labels, **engine.options)
    ...     loss.backward()
    >>> optimizer.update(copies=engine.copies)                 # FusedAdamW

    Args:
        model: the model.
        loss_chunks: parts of the masked tokens that the generator takes one after another.
        rows_per_noise: rows that share a noise vector.

    Raises:
        ValueError: chunks or shared noise with a score that has none.
    """

    def __init__(self, model: EAR, *, loss_chunks: int = 1, rows_per_noise: int = 1) -> None:
        self.model = model
        self.copies: LowCopies | None = None
        self.blocks: CapturedBlocks | None = None
        check_training(model.config, TrainConfig(loss_chunks=loss_chunks, rows_per_noise=rows_per_noise))
        self.loss: TrainingLoss | CapturedLoss | None = None  # the score's own
        if isinstance(model.score, EnergyScore):
            self.loss = TrainingLoss(model.score, loss_chunks, rows_per_noise)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :meth:`ear_model.ear.EAR.forward`."""
        return {"run_blocks": self.blocks, "score_loss": self.loss}

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward of a step belong into it: inside, 16-bit copies stand for the weights."""
        return contextlib.nullcontext() if self.copies is None else self.copies

    def capture(
        self, images: int, *, use_bf16: bool, parts: int = 1, num_masked: Iterable[int] | None = None
    ) -> None:
        """From now on steps of ``images`` images replay CUDA graphs; steps of other sizes go on without.

        A model with hooks, wrapped layers or computed weights goes on without graphs: they would leave these out.
        To be called in training mode, on a GPU, with the parameters where they will stay.

        Args:
            images: images of a step.
            use_bf16: whether steps run under bfloat16 autocast.
            parts: graphs that the backbone is divided into, each way; several are for DDP.
            num_masked: numbers of masked tokens an image that will occur; all that can if None.
        """
        model, config = self.model, self.model.config
        if not is_plain(model):
            return
        if use_bf16:
            blocks, generator = model.backbone.decoder_blocks, model.score.generator
            self.copies = LowCopies([*blocks.parameters(), *generator.parameters()])
        if num_masked is None:
            num_masked = possible_num_masked(config.num_tokens, config.min_mask_ratio, config.masking)
        assert isinstance(self.loss, TrainingLoss)
        with self.scope():
            self.blocks = CapturedBlocks(model.backbone, images, use_bf16=use_bf16, parts=parts)
            counts = [images * number for number in num_masked]
            self.loss = CapturedLoss(self.loss, counts, use_bf16=use_bf16, copies=self.copies)


def compile_blocks(backbone: Backbone) -> None:
    """torch.compile every block in place: names, state dicts and copies of the model stay what they are.

    The kernels of ear_kernels then leave the blocks to inductor. All blocks are one graph of the same shapes, so
    only the first is compiled.
    """
    for block in backbone.all_blocks():
        block.compile()
