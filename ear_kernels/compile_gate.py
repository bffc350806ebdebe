"""The compile gate, ``python -m ear_kernels.compile_gate``: calls of every public operation, on "meta" tensors.

:mod:`ear_kernels.runtime.compile_gate` records what they launch and compiles it for every target, without a GPU.

Nothing here names a kernel, a tile or an argument of a launch: a new call joins by being made. Sizes lie on both
sides of every border that the configurations have, dtypes are those that each operation claims, and gradients are
wanted of all that can have one, of the first input alone, and of nothing.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ear_kernels import functional
from ear_kernels.evaluation import energy_distance
from ear_kernels.gate_inference import ALL_FLOATS, FLOATS, HALVES, inference_calls, tensor
from ear_kernels.modules import FusedMLPGenerator
from ear_kernels.noise_pool import pool_arrangement
from ear_kernels.optimizer import FusedAdamW
from ear_kernels.runtime.compile_gate import main
from ear_kernels.runtime.copies import LowCopies
from ear_kernels.targets import GaussianTarget


def backward(*outputs: Tensor) -> None:
    """From gradients of all outputs that have one."""
    wanted = [output for output in outputs if output.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.empty_like(output) for output in wanted])


# The energy loss.

EAR, CALM, ENSEMBLE = (4096, 2, 1, 16), (2048, 8, 100, 128), (8192, 16, 1, 1)
"""(Rows, samples, targets, features) of the paper's model, of CALM's, and of a forecast's ensemble."""


def _loss(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    grads: tuple[bool, bool] = (True, False),
    gaussian: bool = False,
    terms: tuple[str, ...] = (),
    other: torch.dtype | None = None,
    **options: Any,
) -> None:
    """``other``: dtype of the targets and weights where it is not that of the samples. With a kernel: its score."""
    rows, n, m, features = sizes
    x = tensor(rows, n, features, dtype=dtype, grad=grads[0])
    other = other or dtype
    if gaussian:
        mean, log_std = (tensor(rows, features, dtype=other, grad=grads[1]) for _ in range(2))
        target: Tensor | GaussianTarget = GaussianTarget(mean, log_std, m)
    else:
        target = tensor(rows, m, features, dtype=other, grad=grads[1])
    given: dict[str, Any] = {
        "mask": tensor(rows, dtype=torch.bool),
        "weights": tensor(rows, dtype=other),
        "feature_weights": tensor(features, dtype=other),
    }
    operation: Any = functional.kernel_score_loss if "kernel" in options else functional.energy_loss
    backward(operation(x, target, **{term: given[term] for term in terms}, **options))


def _strided_loss(x: Tensor, y: Tensor, **options: Any) -> None:
    backward(functional.energy_loss(x.requires_grad_(), y.requires_grad_(), **options))


BORDERS = (
    (1, 2, 1, 1), ENSEMBLE, (999, 64, 2, 1), (77, 3, 5, 7), (333, 8, 2, 16), (64, 2, 2, 129), (64, 4, 2, 129),
    (333, 16, 17, 33), (256, 32, 1, 64), (64, 64, 20, 64), (64, 2, 2, 1024), (64, 2, 3, 2048),
    (8, 8, 1, 100000), (3, 2, 1, 10000),
)  # fmt: skip
"""Both sides of each border of the tiles (one feature, 256 to 4,096 elements) and rows of several programs."""
TERMS = ("mask", "weights", "feature_weights")
SWITCHES: tuple[dict[str, Any], ...] = (
    {"alpha": 2.0},
    {"alpha": 0.5},
    {"eps": 0.1},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reduction": "none", "dtype": torch.bfloat16},
)
EVERYTHING: dict[str, Any] = {"grads": (True, True), "terms": TERMS, "alpha": 1.3, "eps": 0.1}


def _energy_loss_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, sizes in (("EAR", EAR), ("CALM", CALM)):
        for dtype in ALL_FLOATS:
            yield f"energy loss, {name}, {dtype}", partial(_loss, sizes, dtype)
            yield f"energy loss, {name}, {dtype}, everything", partial(_loss, sizes, dtype, **EVERYTHING)
            yield f"Gaussian, {name}, {dtype}", partial(_loss, sizes, dtype, gaussian=True)
            yield f"Gaussian, {name}, {dtype}, everything", partial(_loss, sizes, dtype, gaussian=True, **EVERYTHING)
    for dtype in (torch.float32, torch.float64):
        for sizes in BORDERS:
            yield f"energy loss, {sizes}, {dtype}", partial(_loss, sizes, dtype, (True, True))
            yield f"Gaussian, {sizes}, {dtype}", partial(_loss, sizes, dtype, gaussian=True)
            yield f"Gaussian, {sizes}, {dtype}, all gradients", partial(_loss, sizes, dtype, (True, True), True)
        # The V-statistic of one sample.
        for sizes in ((333, 1, 1, 16), (64, 1, 3, 200), (8, 1, 2, 9000)):
            yield f"energy loss, one sample, {sizes}, {dtype}", partial(_loss, sizes, dtype, (True, True), fair=False)
        yield f"Gaussian, one sample, {dtype}", partial(_loss, (333, 1, 3, 16), dtype, gaussian=True, fair=False)
        yield f"energy loss, fields, {dtype}, everything", partial(_loss, (8, 16, 2, 3000), dtype, **EVERYTHING)


def _energy_loss_double() -> Iterator[tuple[str, Callable[[], None]]]:
    """float64 with several targets and large rows, whose tiles are the hardest to compile."""
    for sizes in (
        (16, 2, 2, 129),
        (64, 4, 3, 200),
        (5, 3, 2, 300),
        (64, 2, 5, 513),
        (5, 2, 20, 1025),
        (5, 4, 2, 3000),
    ):
        for grads in ((True, False), (True, True)):
            for alpha in (1.0, 1.3):
                what = f"energy loss, {sizes}, float64, gradients {grads}, alpha {alpha}"
                yield what, partial(_loss, sizes, torch.float64, grads, alpha=alpha)
        what = f"energy loss, {sizes}, float64, everything"
        yield what, partial(_loss, sizes, torch.float64, **EVERYTHING)


def _energy_loss_variants() -> Iterator[tuple[str, Callable[[], None]]]:
    # One switch at a time.
    for gaussian in (False, True):
        what = "Gaussian" if gaussian else "energy loss"
        for grads in ((False, False), (False, True)):
            yield f"{what}, gradients {grads}", partial(_loss, EAR, grads=grads, gaussian=gaussian)
        for term in TERMS:
            yield f"{what}, {term}", partial(_loss, EAR, terms=(term,), gaussian=gaussian)
        for options in SWITCHES:
            yield f"{what}, {options}", partial(_loss, EAR, gaussian=gaussian, **options)
            yield f"{what}, one feature, {options}", partial(_loss, ENSEMBLE, gaussian=gaussian, **options)
    # Targets and weights of another precision than the samples.
    for dtype, other in (
        (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64),
    ):  # fmt: skip
        for gaussian in (False, True):
            for sizes in (EAR, (64, 2, 2, 129)):
                what = f"{'Gaussian' if gaussian else 'energy loss'}, {sizes}, {dtype} and {other}"
                yield what, partial(_loss, sizes, dtype, (True, True), gaussian, TERMS, other)
    first: dict[str, Any] = {"sample_dim": 0}
    for name, x, y, layout in (
        ("samples first", tensor(2, 4096, 16), tensor(4096, 16), first),
        ("both first", tensor(2, 500, 129), tensor(2, 500, 129), first | {"target_dim": 0}),
        ("two dimensions", tensor(16, 32, 2, 16), tensor(32, 16, 16).transpose(0, 1), {}),
        ("three dimensions", tensor(5, 3, 4, 2, 16).permute(2, 1, 0, 3, 4), tensor(4, 3, 5, 16), {}),
        ("four dimensions", tensor(2, 5, 3, 4, 2, 16).permute(3, 2, 1, 0, 4, 5), tensor(4, 3, 5, 2, 16), {}),
        ("expanded targets", tensor(100, 2, 16), tensor(16).expand(100, 16), {}),
        ("features apart", tensor(100, 16, 2).transpose(1, 2), tensor(16, 100).t(), {}),
        ("a slice", tensor(100, 2, 33)[..., 1:17], tensor(100, 40)[:, :16], {}),
    ):
        yield f"energy loss, {name}", partial(_strided_loss, x, y, **layout)


def _kernel_score_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (", everything", {"grads": (True, True), "terms": TERMS}),
    )
    for kernel in ("gaussian", "laplace"):
        what = f"kernel score, {kernel}"
        for dtype in ALL_FLOATS:
            for name, sizes in (("EAR", EAR), ("CALM", (2048, 8, 1, 128)), ("field", (8, 16, 2, 3000))):
                for extra, more in variants:
                    yield f"{what}, {name}, {dtype}{extra}", partial(_loss, sizes, dtype, kernel=kernel, **more)
        for dtype in (torch.float32, torch.float64):
            for sizes in BORDERS:
                yield f"{what}, {sizes}, {dtype}", partial(_loss, sizes, dtype, (True, True), kernel=kernel)
        for grads in ((False, False), (False, True)):
            yield f"{what}, gradients {grads}", partial(_loss, EAR, grads=grads, kernel=kernel)
        for options in SWITCHES[3:]:
            yield f"{what}, {options}", partial(_loss, EAR, kernel=kernel, **options)


def _energy_distance_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in ALL_FLOATS:
        for features in (2, 16, 2048):
            for alpha in (1.0, 2.0, 1.5):
                x, y = tensor(5000, features, dtype=dtype), tensor(4999, features, dtype=dtype)
                yield f"energy distance, {features}, {dtype}, alpha {alpha}", partial(energy_distance, x, y, alpha)


# The generator.


def _modulation(
    shape: tuple[int, ...], entries: tuple[int, ...], dtype: torch.dtype, norm: torch.dtype | None, grad: bool
) -> None:
    """AdaLN and the gated network of one block; ``entries``: leading dimensions of the modulation."""
    width = shape[-1]
    hidden = tensor(*shape, dtype=dtype, grad=grad)
    shift, scale, gate = (tensor(*entries, width, dtype=dtype, grad=grad) for _ in range(3))
    affine = [None if norm is None else tensor(width, dtype=norm, grad=grad) for _ in range(2)]
    weights = [tensor(*size, dtype=dtype, grad=grad) for size in ((width, width), (width,))]
    modulated = functional.adaln_modulate(hidden, shift, scale, *affine)
    backward(functional.gated_silu_ffn(hidden, modulated, gate, *weights, *weights))


def _generator(
    rows: int, width: int, dtype: torch.dtype, grad: bool, samples: int = 1, pool: int | None = None, **options: Any
) -> None:
    """Blocks and final layer under mixed precision: float32 parameters, the rest in ``dtype``."""
    with torch.device("meta"):
        model = FusedMLPGenerator(768, width, 16, depth=2).requires_grad_(grad)
    tokens = rows // samples
    index = inverse = None
    group, entries = 1, rows
    if pool is not None:
        arrangement = pool_arrangement(tokens, samples, pool, torch.device("meta"))
        index, inverse, group = arrangement.index, arrangement.inverse, arrangement.group
        entries = index.numel() // group
    elif samples > 1:
        index = tensor(rows, dtype=torch.int32)
    hidden = tensor(tokens, width, dtype=dtype, grad=grad)
    conditioning = tensor(entries, width, dtype=dtype, grad=grad)
    with torch.set_grad_enabled(grad):
        options |= {"index": index, "inverse": inverse, "group": group}
        backward(functional.generator_blocks(hidden, conditioning, model.block_parameters(), **options))


@torch.no_grad()
def _few_rows(rows: int, width: int, weights: torch.dtype, compute: torch.dtype, halves: bool = False) -> None:
    """The generator without gradients, ``halves``: the modulations first."""
    with torch.device("meta"):
        model = FusedMLPGenerator(768, width, 16, depth=2).to(weights)
    z, noise = tensor(rows, 768, dtype=weights), tensor(rows, 64, dtype=weights)
    with torch.autocast("cpu", compute if compute in HALVES else None, enabled=weights != compute):
        if halves:
            model.chain(z, model.modulations(noise, 0.7))
        else:
            model(z, noise)


def _generator_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    # A width for each block of columns, one and several rows a modulation, runs longer than a unit of work.
    for width in (96, 1024, 1536, 3000, 8192):
        for entries in ((4, 40), (4, 1), (1, 1)):
            what = f"AdaLN block, {width}, {entries}"
            yield what, partial(_modulation, (4, 40, width), entries, torch.bfloat16, torch.float32, True)
    norms = (torch.float32, torch.bfloat16, torch.float16, None)
    for dtype, norm in zip((*FLOATS, torch.bfloat16), norms, strict=True):
        for grad in (True, False):
            what = f"AdaLN block, {dtype}, norm {norm}, {'' if grad else 'no '}gradients"
            yield what, partial(_modulation, (160, 1024), (160,), dtype, norm, grad)
    # Both sides of each border of the tables.
    for rows in (65, 600, 800, 2000, 4096, 8192):
        for width in (1024, 1536):
            for grad in (True, False):
                what = f"generator, {rows} x {width}{'' if grad else ', inference'}"
                yield what, partial(_generator, rows, width, torch.bfloat16, grad)
    for width in (384, 1280):
        yield f"generator, {width}", partial(_generator, 4096, width, torch.bfloat16, True)
    for dtype in FLOATS:
        for grad in (True, False):
            yield f"generator, {dtype}, {grad}", partial(_generator, 4096, 1024, dtype, grad, samples=2)
            yield f"generator, odd, {dtype}, {grad}", partial(_generator, 1001, 999, dtype, grad)
        yield f"generator, noise pool, {dtype}", partial(_generator, 4096, 1024, dtype, True, samples=2, pool=512)
    yield "generator, noise pool, 1536", partial(_generator, 4096, 1536, torch.bfloat16, True, samples=2, pool=512)
    yield "generator, temperature", partial(_generator, 4096, 1024, torch.bfloat16, False, temperature=0.9)
    for rows in (16, 64):
        for width in (1024, 1536):
            for weights, compute in (
                (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, torch.float32),
                (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
            ):  # fmt: skip
                what = f"generator, {rows} x {width}, {weights} in {compute}"
                yield what, partial(_few_rows, rows, width, weights, compute)
    # Rows of no whole vectors, which the halves do not take.
    for dtype in HALVES:
        yield f"generator, 16 x 1004, {dtype}", partial(_few_rows, 16, 1004, dtype, dtype)
    for rows, width in ((8, 1024), (8, 1536), (16, 1024), (64, 1024), (64, 1536), (600, 1024), (4096, 1024)):
        for weights, compute in (
            (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
        ):  # fmt: skip
            what = f"generator in halves, {rows} x {width}, {weights} in {compute}"
            yield what, partial(_few_rows, rows, width, weights, compute, True)


# The transformer block and the optimiser.


def _block(width: int, heads: int, length: int, dtype: torch.dtype, dropout: float, bias: bool, grad: bool) -> None:
    """Whole, and both halves joined and apart, as mixed precision runs it: float32 parameters and residual stream."""
    operations: Any = functional

    def linear(rows: int, columns: int) -> list[Tensor | None]:
        return [tensor(rows, columns, grad=grad), tensor(rows, grad=grad) if bias else None]

    branch = tensor(2, length, width, dtype=dtype, grad=grad)
    residual, scale, shift, branch_bias = (tensor(*size, width, grad=grad) for size in ((2, length), (), (), ()))
    norm = [branch, residual, scale, shift, branch_bias if bias else None]
    attention, mlp = linear(3 * width, width), linear(4 * width, width) + linear(width, 4 * width)
    with torch.autocast("cpu", dtype if dtype in HALVES else torch.bfloat16, enabled=dtype in HALVES):
        backward(*operations.dropout_add_layer_norm(*norm, dropout=dropout))
        backward(operations.self_attention(branch, *attention, heads, dropout=dropout))
        backward(*operations.qkv_heads(branch, *attention, heads))
        backward(operations.gelu_mlp(branch, *mlp, dropout=dropout))
        backward(operations.project(branch, mlp[0]))
        both = {"dropout": dropout, "attention_dropout": dropout}
        backward(*operations.norm_self_attention(*norm, *attention, heads, **both))
        backward(*operations.norm_gelu_mlp(*norm, *mlp, dropout=dropout))
        projection = [tensor(width, width, grad=grad), branch_bias if bias else None]
        block = functional.Block(*[scale, shift, *attention, *projection, scale, shift, *mlp])  # type: ignore[arg-type]
        options = functional.BlockOptions(heads, dropout, (dropout,) * 3)
        backward(functional.transformer_block(residual, block, options))


def _causal(width: int, heads: int, length: int, dtype: torch.dtype, dropout: float) -> None:
    """Causal attention alone, and with the norm before it, as mixed precision runs it."""
    operations: Any = functional
    branch = tensor(2, length, width, dtype=dtype, grad=True)
    residual, scale, shift, branch_bias = (tensor(*size, width, grad=True) for size in ((2, length), (), (), ()))
    attention = [tensor(3 * width, width, grad=True), tensor(3 * width, grad=True), heads]
    norm = [branch, residual, scale, shift, branch_bias]
    with torch.autocast("cpu", dtype):
        backward(operations.self_attention(branch, *attention, dropout=dropout, causal=True))
        both = {"dropout": dropout, "attention_dropout": dropout, "causal": True}
        backward(*operations.norm_self_attention(*norm, *attention, **both))


def _transformer_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    # EAR-B, EAR-L, EAR-H at full tiles of the attention and at others, and small and odd.
    for width, heads, length in ((768, 12, 320), (1024, 16, 321), (1280, 16, 320), (1280, 16, 77), (60, 3, 5)):
        for dtype in FLOATS if width == 768 else (torch.bfloat16,):
            yield f"block, {width}, {length}, {dtype}", partial(_block, width, heads, length, dtype, 0.1, True, True)
    for width, heads, length in ((768, 12, 320), (1280, 16, 77)):
        what = f"block, {width}, {length}"
        yield f"{what}, plain", partial(_block, width, heads, length, torch.bfloat16, 0.0, False, True)
    yield f"{what}, without gradients", partial(_block, 768, 12, 320, torch.bfloat16, 0.1, True, False)
    yield "block, 2048", partial(_block, 2048, 32, 320, torch.bfloat16, 0.1, True, True)
    # 64 copies of the class and 255 tokens, and full tiles.
    for width, heads, length in ((768, 12, 319), (768, 12, 320), (1280, 16, 319), (1280, 16, 320), (60, 3, 5)):
        for dtype in HALVES:
            for dropout in (0.1, 0.0):
                what = f"causal attention, {width}, {length}, {dtype}, dropout {dropout}"
                yield what, partial(_causal, width, heads, length, dtype, dropout)


def _adamw_call(dtype: torch.dtype | None, divided: bool) -> None:
    parameters = [torch.nn.Parameter(tensor(size)) for size in (16, 3000)]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    copies = None if dtype is None else LowCopies(parameters, dtype)
    averages = {parameter: torch.empty_like(parameter) for parameter in parameters}
    FusedAdamW(parameters).update(tensor() if divided else None, averages, copies=copies)


def _adamw_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (None, *HALVES):
        for divided in (False, True):
            what = f"AdamW, copies in {dtype}, {'' if divided else 'not '}clipped"
            yield what, partial(_adamw_call, dtype, divided)


def example_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each; call them inside :func:`ear_kernels.runtime.launching.recording`."""
    yield from _energy_loss_calls()
    yield from _energy_loss_double()
    yield from _energy_loss_variants()
    yield from _kernel_score_calls()
    yield from _energy_distance_calls()
    yield from _generator_calls()
    yield from _transformer_calls()
    yield from inference_calls()
    yield from _adamw_calls()


if __name__ == "__main__":
    sys.exit(main(example_calls))
