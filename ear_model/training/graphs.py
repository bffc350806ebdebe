"""The training step as CUDA graphs: a few launches where there are 1,300.

A step of EAR-B has 1,300 kernels of 76 ms; Python takes longer than that to launch them one by one. The backbone's
blocks have the same shapes in every step: a graph for forward, one for backward. Those of the generator and its loss
follow the number of masked tokens: a graph for each number, forward and backward in one: a loss is the end.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ear_kernels import FusedEnergyLoss, FusedMLPGenerator, LowCopies
from ear_kernels.head import norm_parameters
from ear_kernels.public_blocks import read_block
from ear_kernels.runtime.backend import TRITON_IS_INSTALLED, requested_backend
from ear_kernels.runtime.plain import are_modules_watched, runs_forward
from ear_model.config import ModelConfig, RunConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.ear import EAR
from ear_model.model.backbone import Backbone, TransformerBlock
from ear_model.scores import EnergyScore
from ear_model.training.loss import TrainingLoss


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
    """Whether the blocks of this model can be captured: with our own attention, bfloat16 and heads up to 80.

    A capture that fails leaves CUDA unusable, and with PyTorch's attention (float32, wider heads, the eager backend)
    no capture is tested.
    """
    ours = TRITON_IS_INSTALLED and requested_backend() != "eager"
    return ours and use_bf16 and config.width // config.num_heads <= 80


def wanted(config: RunConfig) -> bool:
    """Whether a run on GPUs is to replay graphs: if nothing in its configuration speaks against it."""
    train = config.train
    allowed = train.cuda_graphs and not train.compile and train.parallel == "ddp"
    return allowed and can_capture(config.model, use_bf16=train.precision in ("auto", "bf16"))


def is_plain(model: EAR) -> bool:
    """Whether graphs of a model in training would leave out nothing: no hooks, wrappers or computed weights."""
    kind = model.config.score, model.config.order, model.config.backbone
    if kind != ("energy", "masked", "ear"):
        return False
    return _read_blocks(model.backbone) is not None and _read_score(model.score) is not None


def _where(parameters: Iterable[Tensor | None]) -> tuple:
    """What a capture depends on of parameters: where they lie and whether they are trained."""
    return tuple(None if each is None else (each.data_ptr(), each.requires_grad) for each in parameters)


def _read_blocks(backbone: Backbone) -> tuple | None:
    """What a capture of the blocks depends on; None where it would leave something out."""
    norm: Any = backbone.decoder_norm
    position, width = backbone.decoder_pos_embed_learned, backbone.config.width
    last = norm_parameters(norm, width)
    if last is None or are_modules_watched():
        return None
    found: list[Any] = [norm.eps, _where(last)]
    for block in backbone.decoder_blocks:
        read = None
        if type(block) is TransformerBlock and runs_forward(block) and block.training == backbone.training:
            read = read_block(block, position)
        rate = block.rate if block.training else 0.0
        if read is None or read[1].dropouts != (rate, rate, rate):
            return None
        found += [rate, read[1], _where(read[0])]
    return tuple(found)


def _read_score(score: EnergyScore) -> tuple | None:
    """What a capture of the loss depends on; None where it would leave something out."""
    generator, loss = score.generator, score.energy_loss
    plain = generator.plain_parameters() if type(generator) is FusedMLPGenerator else None
    if plain is None or not runs_forward(generator) or type(loss) is not FusedEnergyLoss or not runs_forward(loss):
        return None
    return loss.alpha, loss.tau, loss.eps, loss.reduction, _where([loss.feature_weights, *plain[0], *plain[1]])


class _GivesGradients:
    """Hands out gradients of parameters in memory that its next replay overwrites, so that nobody notices."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._copied: dict[int, int] = {}

    def keep_gradients(self) -> None:
        """Copy gradients that are still there out of the graphs' memory, so that a second backward adds to them.

        To be called before a replay; copies of earlier calls stay as they are.
        """
        for number, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is not None and self._copied.get(number) != gradient.data_ptr():
                parameter.grad = gradient.clone()
                self._copied[number] = parameter.grad.data_ptr()


class CapturedBlocks(_GivesGradients):
    """Graphs of :meth:`Backbone.run_blocks` in training for one batch size, to be called in its place.

    Other batch sizes, and calls in eval mode or without gradients, go on without the graphs; so do calls after a
    hook, a wrapper, another dropout, a parameter that lies elsewhere or one that is frozen. The graphs read the
    parameters where they lie, so an optimiser that changes them in place needs nothing else; dropout draws anew at
    every replay.

    Args:
        backbone: on a GPU, in training mode.
        batch: images of a step.
        use_bf16: whether steps run under bfloat16 autocast.
        parts: graphs that the blocks are divided into. One is fastest on a single GPU; under DDP the gradients of a
            part are exchanged while the parts before it run backward.
    """

    def __init__(self, backbone: Backbone, batch: int, *, use_bf16: bool, parts: int = 1) -> None:
        self.backbone = backbone
        position = backbone.decoder_pos_embed_learned
        self.shape = (batch, *position.shape[1:])
        super().__init__([*backbone.decoder_blocks.parameters(), *backbone.decoder_norm.parameters()])
        self._captured = _read_blocks(backbone)
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

    def __call__(self, hidden: Tensor) -> Tensor:
        """:meth:`Backbone.run_blocks` of ``hidden``."""
        wanted = self.backbone.training and torch.is_grad_enabled() and hidden.shape == self.shape
        if not wanted or self._captured is None or _read_blocks(self.backbone) != self._captured:
            return self.backbone.run_blocks(hidden)
        self.keep_gradients()
        pending: tuple = ()
        for part in self._parts[:-1]:
            hidden, pending = part(hidden, *pending)
        return self._parts[-1](hidden, *pending)


@contextlib.contextmanager
def _aliased(module: nn.Module, copies: LowCopies | None) -> Iterator[None]:
    """The module with other leaves of autograd in the place of its parameters, of the same memory and copies.

    While a loss of an earlier step is alive, autograd still has nodes of the parameters that belong to the stream of
    that step, and a capture that meets one fails.
    """
    owners = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    for owner, name, parameter in owners:
        if copies is None:
            owner._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        else:
            owner._parameters[name] = copies.alias(parameter)
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            owner._parameters[name] = parameter


class _ReplayedLoss(torch.autograd.Function):
    """The loss of a replay; backward hands out the gradients that the same replay computed."""

    @staticmethod
    def forward(ctx: Any, captured: "CapturedLoss", hidden_RC: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.captured, ctx.replays, ctx.count = captured, captured.replays, hidden_RC.shape[0]
        ctx.trained = [parameter.requires_grad for parameter in parameters]
        return captured.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        captured: CapturedLoss = ctx.captured
        if captured.replays != ctx.replays:
            raise RuntimeError(
                "the gradients of this loss are gone: they lie in a CUDA graph's memory, which another loss or "
                "another backward has used since; call backward once, right after each loss"
            )
        captured.replays += 1
        gradients = captured.gradients
        if gradients:
            torch._foreach_mul_(gradients, grad)
        # Views: what is handed out must have no other owner, or autograd copies it.
        shared = iter(gradient.detach() for gradient in gradients)
        given = [next(shared) if trained else None for trained in ctx.trained]
        return None, captured.grad_hidden[: ctx.count] * grad, *given


class CapturedLoss(_GivesGradients):
    """Graphs of a loss and its gradients, one for each number of tokens, to be called in its place.

    They share their memory. Other numbers of tokens, and calls in eval mode or without gradients, go on without the
    graphs; so do those of a score with hooks, wrappers or computed weights. The graphs read the parameters where they
    lie. Another tau, or other parameters that are trained, are captured anew.

    Args:
        plain: the loss, of a score on a GPU and in training mode.
        counts: tokens of a step, all values that occur.
        use_bf16: whether steps run under bfloat16 autocast.
        copies: 16-bit copies in whose scope the graphs are made and replayed.
    """

    def __init__(
        self, plain: TrainingLoss, counts: Iterable[int], *, use_bf16: bool, copies: LowCopies | None = None
    ) -> None:
        score, generator = plain.score, plain.score.generator
        super().__init__(generator.parameters())
        self.plain, self.score, self.use_bf16, self.copies = plain, score, use_bf16, copies
        self._counts = sorted(set(counts), reverse=True)
        device, most = next(generator.parameters()).device, self._counts[0]
        self._hidden = torch.zeros(most, generator.input_dim, device=device)
        self._targets = torch.zeros(most, generator.output_dim, device=device)
        self._noise = torch.zeros(most, score.num_samples, generator.noise_dim, device=device)
        self.loss = torch.zeros((), device=device)
        self.grad_hidden = torch.zeros_like(self._hidden)
        self.gradients: list[Tensor] = []
        self.replays = 0
        self._options: tuple | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture()

    def _prepare(self) -> None:
        """What the graphs are captured for, and where their gradients go."""
        self._options = _read_score(self.score)
        self._parameters = list(self.score.generator.parameters())
        self._copied.clear()
        self.gradients = [torch.zeros_like(parameter) for parameter in self._parameters if parameter.requires_grad]

    def _run(self, count: int) -> None:
        inputs = (buffer[:count] for buffer in (self._hidden, self._targets, self._noise))
        # Autocast must not keep a cast weight from one replay to the next.
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.use_bf16, cache_enabled=False)
        with autocast, _aliased(self.score.generator, self.copies):
            loss, grad_hidden, *gradients = self.plain.and_gradients(*inputs)
        # Copies, so that nothing of a graph's own memory is alive when the next one is captured.
        self.loss.copy_(loss)
        self.grad_hidden[:count].copy_(grad_hidden)
        if gradients:
            torch._foreach_copy_(self.gradients, gradients)

    def _capture(self) -> None:
        """A graph for each number of tokens, the largest first: the smaller ones fit in its memory."""
        # A replay may still run, in memory that is about to be given back.
        torch.cuda.synchronize()
        self._graphs.clear()
        self._prepare()
        torch.cuda.empty_cache()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            # Every shape once without a graph: kernels are compiled and loaded, which a capture does not allow.
            for count in self._counts:
                self._run(count)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        for count in self._counts:
            graph = torch.cuda.CUDAGraph()
            # Other threads (the reader of batches, NCCL's watchdog) may go on.
            with (
                torch.no_grad(),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._run(count)
            self._graphs[count] = graph

    def takes(self, hidden_RC: Tensor) -> bool:
        """Whether there is a graph for these hidden states."""
        wanted = self.score.training and torch.is_grad_enabled()
        fits = wanted and hidden_RC.shape[0] in self._graphs and hidden_RC.dtype == torch.float32
        return fits and _read_score(self.score) is not None

    def __call__(self, hidden_RC: Tensor, targets_RD: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The loss of these with noise that is drawn anew, a scalar in float32; its backward takes no time."""
        noise_RnE = self.plain.draw_noise(hidden_RC, draws)
        if not self.takes(hidden_RC):
            return self.plain.with_noise(hidden_RC, targets_RD, noise_RnE)
        self.keep_gradients()
        if self._options != _read_score(self.score):
            self._capture()
        count = hidden_RC.shape[0]
        for buffer, given in ((self._hidden, hidden_RC), (self._targets, targets_RD), (self._noise, noise_RnE)):
            buffer[:count].copy_(given.detach())
        self._graphs[count].replay()
        self.replays += 1
        return _ReplayedLoss.apply(self, hidden_RC, *self.score.generator.parameters())
