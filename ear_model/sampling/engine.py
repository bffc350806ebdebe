"""Decoding by CUDA graphs: a launch for each step, where Python would make some two hundred.

A graph holds a step of :mod:`ear_model.sampling.state`, or a piece of one, for a number of predicted tokens; a
schedule of 64 steps over 256 tokens has seven (MAR's backbone one a step). Weights are read where they lie and cast
anew at every call, so training, averaging and loading into a model are seen; parameters that have moved make the
graphs anew.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ear_kernels.head import linear_parameters, norm_parameters
from ear_kernels.public_blocks import is_block, read_block
from ear_kernels.runtime.backend import TRITON_IS_INSTALLED, requested_backend
from ear_kernels.runtime.launching import processor
from ear_kernels.runtime.plain import are_modules_watched, is_replaced, runs_forward
from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import Draws
from ear_model.errors import RunError
from ear_model.model.backbone import Backbone, TokenEmbedding, TransformerBlock
from ear_model.model.causal import CausalBackbone, CausalBlock
from ear_model.model.mar_backbone import MarBackbone
from ear_model.sampling import heads
from ear_model.sampling.causal import check_order
from ear_model.sampling.causal_cache import CausalDecoding
from ear_model.sampling.decoding import decode_tokens
from ear_model.sampling.first_step import NULL, FirstStep
from ear_model.sampling.incremental import IncrementalDecoding
from ear_model.sampling.mar import MarDecoding
from ear_model.sampling.state import Decoding
from ear_model.sampling.steps import Progress, SamplingModel, steps_of
from ear_model.sampling.weights import Weights

Precision = Literal["auto", "fp32", "bf16", "fp8"]
PRECISIONS = get_args(Precision)

KEPT = 3
"""Engines that a model keeps: one holds a gigabyte of buffers at 64 images of EAR-B."""


def compute_dtype(precision: str, parameter: Tensor) -> torch.dtype:
    """What sampling computes in: "auto" is autocast's dtype where it is on, bfloat16 on a GPU, else the parameters'.

    Parameters of another dtype than float32 stay what they are.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be {' or '.join(map(repr, PRECISIONS))}")
    device = parameter.device.type
    if parameter.dtype != torch.float32:
        return parameter.dtype
    if precision == "auto" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if precision in ("bf16", "fp8") or (precision == "auto" and device == "cuda"):
        return torch.bfloat16
    return parameter.dtype


class Graphs:
    """CUDA graphs by name, in one pool of memory: one runs at a time.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    @property
    def names(self) -> Any:
        """Of the graphs that are there."""
        return self._graphs.keys()

    def capture(self, works: dict[Any, Callable[[], Any]], before: Callable[[], Any] = lambda: None) -> None:
        """Capture what is not there yet, after a run of each: kernels are compiled and loaded, which a capture does
        not allow. ``before`` makes sense of such a run."""
        missing = {name: work for name, work in works.items() if name not in self._graphs}
        if not missing:
            return
        stream, current = self._stream, torch.cuda.current_stream(self._stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for work in missing.values():
                before()
                work()
        current.wait_stream(stream)
        for name, work in missing.items():
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                work()
            self._graphs[name] = graph

    def __call__(self, name: Any, work: Callable[[], Any] | None = None) -> None:
        """Replay a graph; capture ``work`` first if it is not there."""
        if work is not None:
            self.capture({name: work})
        self._graphs[name].replay()


class Engine:
    """The graphs of one batch size, with or without guidance, over some weights.

    Args:
        model: on a GPU, in eval mode.
        weights: of the model.
        table: of those weights; None for a causal order, which begins with the class's rows.
        batch: B.
        guided: whether there is guidance.
    """

    def __init__(
        self, model: SamplingModel, weights: Weights, table: FirstStep | None, batch: int, *, guided: bool
    ) -> None:
        self.decoding = decoding_class(model.config)(model, weights, batch, guided=guided)
        self.weights, self.table = weights, table
        device = self.decoding.left.device
        self._places_G = torch.zeros(self.decoding.sequences, dtype=torch.int64, device=device)
        self._graphs = Graphs(device)

    def __call__(
        self, labels_B: Tensor, sampling: SamplingConfig, draws: Draws, progress: Progress | None = None
    ) -> Tensor:
        """Tokens ``[B, L, D]`` in float32, as :func:`decode_tokens` gives them within rounding.

        From weights as they were copied last: see :meth:`refresh` and :meth:`is_current`.
        """
        decoding = self.decoding
        model, tokens = decoding.model, decoding.config.num_tokens

        def images() -> Tensor:
            return model.tokenizer.decode(model.score.decode(decoding.tokens_BLD))

        number = tokens if decoding.is_causal else sampling.steps
        steps = list(steps_of(tokens, number, images, None))
        decoding.fill(labels_B, sampling, draws, [step.left - step.keep for step in steps])
        dtype = decoding.dtype
        autocast = torch.autocast("cuda", dtype, enabled=dtype.itemsize == 2, cache_enabled=False)
        with self.weights.scope(), autocast:
            decoding.prepare(sampling)
            table = None
            if self.table is not None:
                nulls = [NULL] * (decoding.sequences - decoding.batch)
                places = self.table.places(labels_B.tolist() + nulls)
                if places is not None:
                    self._places_G.copy_(torch.tensor(places))
                    table = self.table.hidden_TLC, self._places_G
            pieces = []
            for step in steps:
                guided = sampling.guides(step.left, tokens)
                pieces.append(decoding.pieces(tokens - step.left, step.left - step.keep, guided, table))
                table = None
            works: dict[Any, Callable] = {"begin": decoding.begin}
            works |= {name: work for parts in pieces for name, work in parts if name is not None}
            if not works.keys() <= self._graphs.names:
                with evaluating(model):
                    self._graphs.capture(works, before=decoding.begin)
            self._graphs("begin")
            for _, parts in zip(steps_of(tokens, number, images, progress), pieces, strict=True):
                for name, work in parts:
                    self._graphs(name) if name is not None else work()
        return decoding.tokens_BLD.clone()

    def refresh(self) -> None:
        """See to weights that have changed."""
        if self.weights.refresh() and self.table is not None:
            self.table.clear()


def decoding_class(config: ModelConfig) -> type[Decoding]:
    """What decodes models like this."""
    if config.order != "masked":
        return CausalDecoding
    return MarDecoding if config.backbone == "mar" else IncrementalDecoding


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and afterwards each of its modules in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_plain(model: Any) -> bool:
    """Whether what the engine reads and bypasses is what calling a model's modules does.

    No hooks anywhere, plain modules (:mod:`ear_kernels.runtime.plain`) of one device, float32, our own methods.
    """
    backbone, score = model.backbone, model.score
    position, is_mar = backbone.decoder_pos_embed_learned, model.config.backbone == "mar"
    own = all(getattr(type(backbone), name, None) in (None, *methods) for name, methods in BYPASSED.items())
    if not own or are_modules_watched() or position.dtype != torch.float32 or is_replaced(backbone, "run_blocks"):
        return False
    if not all(runs_forward(module) and "parametrizations" not in module._modules for module in model.modules()):
        return False
    width = position.shape[2]
    stacks, linears, norms = [backbone.decoder_blocks], [], [backbone.decoder_norm]
    if not isinstance(backbone.z_proj, TokenEmbedding):
        linears.append(backbone.z_proj)
    if is_mar:
        stacks.append(backbone.encoder_blocks)
        linears.append(backbone.decoder_embed)
        norms += [backbone.encoder_norm, backbone.z_proj_ln]
    found = [linear_parameters(linear, width) for linear in linears]
    found += [norm_parameters(norm, width) for norm in norms]
    if None in found or not heads.is_read(score):
        return False
    return all(_is_read(block, position) for stack in stacks for block in stack) and all(
        type(tensor) is nn.Parameter and tensor.dtype == torch.float32 and tensor.device == position.device
        for tensor in (*(each for pair in found for each in pair or ()), *score.parameters())
    )


BYPASSED = {
    "forward": (Backbone.forward, MarBackbone.forward, CausalBackbone.forward),
    "run_blocks": (Backbone.run_blocks,),
    "run_encoder": (MarBackbone.run_encoder,),
    "extend": (CausalBackbone.extend,),
    "embed_tokens": (CausalBackbone.embed_tokens,),
    "embed_prefix": (CausalBackbone.embed_prefix,),
}
"""Methods of a backbone that the engine does the work of."""


OWN_BLOCKS = (TransformerBlock, CausalBlock)


def _is_read(block: Any, position: Tensor) -> bool:
    """Whether a block of ours or timm's is no more than its float32 weights, biases included."""
    found = read_block(block, position) if type(block) in OWN_BLOCKS or is_block(block) else None
    return found is not None and all(tensor is not None and tensor.dtype == torch.float32 for tensor in found[0])


class Engines:
    """The engines of a model, made when they are needed; the last few are kept.

    A copy or a pickle of it has none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Engine] = OrderedDict()
        self._weights: dict[tuple, tuple[Weights, FirstStep | None]] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Engines, ()

    def decode(
        self,
        model: SamplingModel,
        labels_B: Tensor,
        sampling: SamplingConfig,
        draws: Draws,
        *,
        precision: str = "auto",
        progress: Progress | None = None,
    ) -> Tensor:
        """Tokens ``[B, L, D]`` in float32: by graphs on a GPU, else by the plain loop.

        Args:
            model: always the same one, in any mode.
            labels_B: int64, on the model's device.
            sampling: how.
            draws: where orders and noise come from.
            precision: "auto", "fp32", "bf16" or "fp8"; see :func:`compute_dtype`.
            progress: wraps the steps.

        Raises:
            ValueError: an unknown precision. RunError: tokens that are not finite.
        """
        check_order(model.config, sampling)
        parameter = next(iter(model.parameters()))
        dtype = compute_dtype(precision, parameter)
        numbers = dtype, precision == "fp8"
        with self._lock:
            tokens = None if progress else self._at_once(model, labels_B, sampling, draws, numbers)
            if tokens is None:
                tokens = self._checked(model, labels_B, sampling, draws, numbers, progress)
        if not bool(tokens.isfinite().all()):
            raise RunError("the model samples values that are not finite; its weights are damaged or diverged")
        return tokens

    def _at_once(
        self,
        model: SamplingModel,
        labels_B: Tensor,
        sampling: SamplingConfig,
        draws: Draws,
        numbers: tuple[torch.dtype, bool],
    ) -> Tensor | None:
        """Tokens by an engine that is there; None if there is none or what it stands for has changed.

        That is asked while the GPU works: reading all submodules and parameters takes the host milliseconds.
        """
        engine = self._kept.get((len(labels_B), sampling.guidance != 1, numbers))
        if engine is None or not self._may_capture(labels_B) or not heads.is_read(model.score):
            return None
        rewind = draws.mark(labels_B.device)
        engine.weights.start_check()
        tokens = engine(labels_B, sampling, draws)
        if is_plain(model) and engine.weights.fits(model) and not engine.weights.have_changed():
            return tokens
        rewind()
        return None

    def _checked(
        self,
        model: SamplingModel,
        labels_B: Tensor,
        sampling: SamplingConfig,
        draws: Draws,
        numbers: tuple[torch.dtype, bool],
        progress: Progress | None,
    ) -> Tensor:
        """Tokens by the engine of this model as it is, or by the plain loop."""
        parameter, (dtype, fp8) = next(iter(model.parameters())), numbers
        takes, is_causal = self.takes(model, labels_B), model.config.order != "masked"
        if fp8 and not (takes and not is_causal and processor(parameter).major >= 9):
            raise ValueError(
                "precision is 'fp8'; it needs a GPU of compute capability 9 or higher, Triton and a model of the "
                "masked order without hooks or wrapped submodules; use 'bf16' or 'auto'"
            )
        if takes:
            engine = self._engine(model, len(labels_B), sampling.guidance != 1, numbers)
            engine.refresh()
            return engine(labels_B, sampling, draws, progress)
        wanted = dtype != parameter.dtype
        with evaluating(model), torch.autocast(parameter.device.type, dtype if wanted else None, enabled=wanted):
            return decode_tokens(model, labels_B, sampling, draws, progress)

    @staticmethod
    def takes(model: SamplingModel, labels_B: Tensor) -> bool:
        """Whether there can be graphs of this call."""
        return Engines._may_capture(labels_B) and is_plain(model)

    @staticmethod
    def _may_capture(labels_B: Tensor) -> bool:
        if not labels_B.is_cuda or len(labels_B) == 0 or torch.version.hip is not None or not TRITON_IS_INSTALLED:
            return False
        watched = torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
        return requested_backend() != "eager" and not watched

    def release(self) -> None:
        """Free the memory of all engines; the next call makes them anew."""
        with self._lock:
            self._kept.clear()
            self._weights.clear()

    def _engine(self, model: SamplingModel, batch: int, guided: bool, numbers: tuple[torch.dtype, bool]) -> Engine:
        found = self._weights.get(numbers)
        if found is None or not found[0].fits(model):
            # Graphs read the parameters and copies where they lie.
            for key in [key for key in self._kept if key[2] == numbers]:
                del self._kept[key]
            weights = Weights(model, numbers[0], fp8=numbers[1])
            graphs = Graphs(next(model.parameters()).device)
            make = decoding_class(model.config)
            table = None if make.is_causal else FirstStep(make, model, weights, graphs)
            found = self._weights[numbers] = weights, table
        key = batch, guided, numbers
        engine = self._kept.pop(key, None)
        if engine is None:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            engine = Engine(model, *found, batch, guided=guided)
        self._kept[key] = engine
        return engine
