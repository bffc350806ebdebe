"""Calls of the inference operations for the compile gate (:mod:`ear_kernels.compile_gate`), on "meta" tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ear_kernels import functional

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
ALL_FLOATS = (torch.float64, *FLOATS)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


@torch.no_grad()
def _linears(rows: int, inner: int, dtype: torch.dtype, bias: bool, dependent: bool) -> None:
    """Inference's linears, with results in 16 bit and in e4m3."""
    x, weight, scale = tensor(rows, 768, dtype=dtype), tensor(inner, 768, dtype=dtype), tensor(1)
    wide = dtype if dtype in HALVES else torch.bfloat16
    given: dict[str, Any] = {"bias": tensor(inner, dtype=wide) if bias else None, "dependent": dependent}
    operations: Any = functional
    for operation in (operations.linear_gelu, operations.linear_inference):
        if dtype in HALVES:
            operation(x, weight, **given)
            operation(x, weight, out_scale=scale, dtype=torch.float8_e4m3fn, **given)
        else:
            operation(x, weight, scales=(scale, scale), **given)
            operation(x, weight, scales=(scale, scale), out_scale=scale, dtype=dtype, **given)


@torch.no_grad()
def _inference(
    rows: int, width: int, heads: int, lengths: tuple[int, int, int], dtype: torch.dtype, low: bool, **options: Any
) -> None:
    """The inference operations of a block; ``lengths``: sequences, keys, queries of rows; ``low``: to e4m3."""
    operations: Any = functional
    groups, keys, queries = lengths
    output: Any = {"dtype": torch.float8_e4m3fn, "scale": tensor(1)} if low else {"dtype": dtype}
    parameters = [tensor(width, dtype=dtype) for _ in range(3)]
    stream = tensor(rows, width)
    branch = tensor(rows, width, dtype=dtype), parameters[0]
    for branches, out_stream in (((), None), ((branch,), None), ((branch,), stream), ((branch, branch), stream)):
        operations.residual_norm(stream, branches, *parameters[1:], out_stream=out_stream, **output, **options)
    operations.attention(tensor(groups, keys, 3 * width, dtype=dtype), heads, **output, **options)
    query = tensor(groups, queries, width, dtype=dtype)
    operations.attention_rows(query, tensor(groups, keys, 2 * width, dtype=dtype), heads, **options)
    place = torch.empty(1, dtype=torch.int64, device="meta")
    cache = tensor(2, groups, keys, width, dtype=dtype)
    operations.attention_cached(tensor(groups, 3 * width, dtype=dtype), cache, place, heads, **options)


@torch.no_grad()
def _decoding(width: int, size: int, dtype: torch.dtype, guided: bool) -> None:
    """The small parts of a decoding step of 3 images, 5 tokens of each."""
    sequences, norm = 6 if guided else 3, (tensor(width), tensor(width))
    stream, left = tensor(sequences, 320, width), torch.empty(1, dtype=torch.int64, device="meta")
    orders = torch.empty(3, 256, dtype=torch.int64, device="meta")
    rows, gathered, _ = functional.predicted_rows(stream, orders, left, 5, *norm, dtype=dtype)
    branch, scales = tensor(len(rows), width, dtype=dtype), tensor(257) if guided else None
    functional.guided_norm(branch, tensor(width), gathered, *norm, scales, left, 5)
    embed = tensor(width, size, dtype=dtype), tensor(width, dtype=dtype)
    sampled, tokens, position = tensor(15, size), tensor(3, 256, size), tensor(320, width)
    functional.write_tokens(sampled, tokens, stream, rows, embed, position, (*norm, 1e-6))
    target = tensor(sequences, 320, 3 * width, dtype=dtype)
    functional.write_rows(tensor(15, 3 * width, dtype=dtype), target, rows, left, 5)


@torch.no_grad()
def _denoising(width: int, size: int, rows: int, dtype: torch.dtype, guided: bool) -> None:
    """A step of a denoising MLP of two blocks: modulations of two times' conditionings, layers, step back."""
    both = 2 * rows if guided else rows
    block = [(width,), (width,), *[(width, width), (width,)] * 2, (3 * width, width), (3 * width,)]
    final = [(2 * width, width), (2 * width,), (2 * size, width), (2 * size,)]
    parameters = [tensor(*shape, dtype=dtype) for shape in (*block, *block, *final)]
    projection = [tensor(width, size, dtype=dtype), tensor(width, dtype=dtype)]
    mod = functional.generator_modulations(tensor(2 * both, width, dtype=dtype), [], parameters)
    states, time = tensor(both, size, dtype=dtype), torch.empty(1, dtype=torch.int64, device="meta")
    output = functional.generator_chain(states, mod[:both], projection, parameters)
    guidance = tensor(1) if guided else None
    functional.denoise_step(
        output, tensor(rows, size), states, tensor(rows, 100, size), tensor(100, 5), time, 1, guidance
    )


def _fingerprint() -> None:
    from ear_kernels.runtime.fingerprint import launch_fingerprint

    table, out = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((9, 3), (1,)))
    for size in (4, 2, 1):
        launch_fingerprint(table, out, size)


def inference_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, call) of each."""
    # One image, eight and 128, guided, of each size; digits; other lengths and dtypes.
    for width, heads in ((768, 12), (1024, 16), (1280, 16)):
        for groups in (2, 16, 256):
            for low in (False, True):
                what = f"inference, {width}, {groups} sequences{', e4m3' if low else ''}"
                sizes = groups * 320, width, heads, (groups, 320, 3)
                yield what, partial(_inference, *sizes, torch.bfloat16, low, dependent=True)
    for dtype in FLOATS:
        yield f"inference, odd, {dtype}", partial(_inference, 77, 768, 12, (2, 77, 20), dtype, False)
        yield f"inference, wide heads, {dtype}", partial(_inference, 77, 288, 4, (2, 300, 1), dtype, False)
    yield "inference, digits", partial(_inference, 2080, 96, 4, (4, 20, 2), torch.bfloat16, False)
    # Every tile of the table; one of them with each switch.
    for rows, inner in ((16, 3072), (320, 3072), (640, 3072), (1281, 2304), (1280, 3072), (5120, 3072)):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            yield f"linears, {rows} x {inner}, {dtype}", partial(_linears, rows, inner, dtype, True, True)
    yield "linears, plain", partial(_linears, 640, 3072, torch.float16, False, False)
    yield "linears, many rows, plain", partial(_linears, 5120, 3072, torch.float16, False, False)
    for width, size in ((768, 16), (1024, 16), (1280, 16), (96, 4), (768, 48)):
        for dtype in FLOATS:
            for guided in (False, True):
                what = f"decoding, {width}, tokens of {size}, {dtype}{', guided' if guided else ''}"
                yield what, partial(_decoding, width, size, dtype, guided)
    for width, rows, guided in ((1024, 3, True), (1536, 3, True), (1024, 448, True), (96, 20, False)):
        for dtype in HALVES:
            name = f"denoising, {width}, {rows} rows, {dtype}{', guided' if guided else ''}"
            yield name, partial(_denoising, width, 16 if width > 96 else 4, rows, dtype, guided)
    yield "fingerprint", _fingerprint
