"""The backbone's blocks as CUDA graphs, forward and backward: two launches where there are a thousand.

A step of EAR-B has 1,500 kernels of 77 ms; Python takes longer than that to launch them one by one. The blocks are
most of them, and their shapes are the same in every step (the generator's follow the number of masked tokens).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ear_kernels.dispatch import TRITON_IS_INSTALLED, requested_backend
from ear_model.config import ModelConfig

if TYPE_CHECKING:
    from ear_model.transformer import Backbone


class _Blocks(nn.Module):
    """What is captured: holds the parameters that the graphs give gradients of, and is no part of the model."""

    def __init__(self, backbone: Backbone, part: slice) -> None:
        super().__init__()
        self.blocks = backbone.decoder_blocks[part]
        self.norm = backbone.decoder_norm if part.stop is None else None
        self.run: Callable[..., Any] = functools.partial(backbone.run_blocks, part=part)

    def forward(self, hidden: Tensor, *pending: Tensor) -> Any:
        return self.run(hidden, pending or None)


def can_capture(config: ModelConfig, *, use_bf16: bool) -> bool:
    """Whether the blocks of this model were ever captured: with our own attention, bfloat16 and heads up to 128.

    A capture that fails leaves CUDA unusable, so PyTorch's attention (float32, wider heads, the eager
    backend) is left out until it was tried.
    """
    ours = TRITON_IS_INSTALLED and requested_backend() != "eager"
    return ours and use_bf16 and config.width // config.num_heads <= 128


class CapturedBlocks:
    """Graphs of :meth:`Backbone.run_blocks` in training for one batch size.

    The graphs read the parameters where they lie, so an optimiser that changes them in place needs nothing else;
    dropout draws anew at every replay. Gradients of the blocks' parameters are handed out in memory that the next
    replay overwrites: call :meth:`keep_gradients` before another backward is to be added to them.

    Args:
        backbone: on a GPU, in training mode.
        batch: images of a step.
        use_bf16: whether steps run under bfloat16 autocast.
        parts: graphs that the blocks are divided into. One is fastest on a single GPU; under DDP the gradients of a
            part are exchanged while the parts before it run backward.
    """

    def __init__(self, backbone: Backbone, batch: int, *, use_bf16: bool, parts: int = 1) -> None:
        position = backbone.decoder_pos_embed_learned
        self.shape = (batch, *position.shape[1:])
        self._parameters = [*backbone.decoder_blocks.parameters(), *backbone.decoder_norm.parameters()]
        random_state = torch.cuda.get_rng_state(position.device)
        # The graphs' gradients come from the stream of the capture; autograd waits for it, and would warn of that.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        depth = len(backbone.decoder_blocks)
        borders = [depth * number // parts for number in range(1, parts)]
        callables = tuple(
            _Blocks(backbone, slice(start, stop)) for start, stop in zip([0, *borders], [*borders, None], strict=True)
        )
        # Autocast must not keep a cast weight from one replay to the next.
        with torch.autocast("cuda", torch.bfloat16, enabled=use_bf16, cache_enabled=False):
            samples: list[tuple[Tensor, ...]] = [(torch.zeros(self.shape, device=position.device),)]
            with torch.no_grad():
                for blocks in callables[:-1]:
                    hidden, pending = blocks(*samples[-1])
                    samples.append((hidden, *pending))
            samples = [tuple(tensor.detach().clone().requires_grad_() for tensor in each) for each in samples]
            self._parts: Any = torch.cuda.make_graphed_callables(callables, tuple(samples))
        # Capturing must not change what a run draws, nor keep what its warm-up needed.
        torch.cuda.set_rng_state(random_state, position.device)
        torch.cuda.empty_cache()

    def replay(self, hidden: Tensor) -> Tensor:
        """:meth:`Backbone.run_blocks` of ``hidden``."""
        pending: tuple = ()
        for part in self._parts[:-1]:
            hidden, pending = part(hidden, *pending)
        return self._parts[-1](hidden, *pending)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has no graphs: these are of this model's parameters."""
        return None

    def keep_gradients(self) -> None:
        """Copy the gradients out of the graphs' memory, so that a second backward adds to them."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
