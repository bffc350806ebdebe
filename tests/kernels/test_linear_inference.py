"""Linears for inference: both kernels, their choice, e4m3, and the addition to the stream, against float64."""

import pytest
import torch
import torch.nn.functional as F

from ear_kernels.ops.transformer.functional_linear import linear_gelu, linear_inference
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES

E4M3 = torch.float8_e4m3fn
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
OPERANDS = [*HALVES, *([E4M3] if DEVICE == "cuda" else [])]
FUNCTIONS = {"linear_gelu": linear_gelu, "linear_inference": linear_inference}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight and bias in ``dtype``; in e4m3 the bias in bfloat16, and the scales."""
    x, weight, bias = draw(rows, k), draw(n, k) / k**0.5, draw(n)
    if dtype != E4M3:
        return x.to(dtype), weight.to(dtype), bias.to(dtype)
    scales = [torch.full((1,), value, device=DEVICE) for value in (0.02, 0.01)]
    narrow = [(t / s).clamp(-448, 448).to(E4M3) for t, s in zip((x, weight), scales, strict=True)]
    return *narrow, bias.bfloat16(), *scales


def exact(x, weight, bias, scale_x=None, scale_weight=None, *, gelu: bool) -> torch.Tensor:
    product = x.double() @ weight.double().t()
    product = product if scale_x is None else product * (scale_x.double() * scale_weight.double())
    product = product if bias is None else product + bias.double()
    return F.gelu(product) if gelu else product


def eager(x, weight, bias, scale_x=None, scale_weight=None, *, gelu: bool) -> torch.Tensor:
    if scale_x is None:
        product = F.linear(x, weight, bias)
    else:
        options = {"scale_a": scale_x, "scale_b": scale_weight, "bias": bias, "out_dtype": torch.bfloat16}
        product = torch._scaled_mm(x, weight.t(), **options)
    return F.gelu(product) if gelu else product


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 16), (77, 208, 144), (200, 80, 272)], ids=str)
@pytest.mark.parametrize("tile", [(64, 64, 64, 3, 4), (128, 128, 64, 2, 4, 2), (128, 64, 64, 2, 4, 1, True)], ids=str)
def test_kernels(tile, shape, gelu, dtype) -> None:
    """The last tile is the persistent kernel's, of which a program has many on the interpreter's four processors."""
    from ear_kernels.ops.transformer.launch_linear import LinearConfig, Scales, launch_linear

    rows, k, n = shape
    x, weight, bias, *scales = problem(rows, k, n, dtype)
    bias = bias if rows > 1 else None
    out = torch.full((rows, n), float("nan"), device=DEVICE, dtype=torch.bfloat16 if scales else dtype)
    launch_linear(LinearConfig(*tile), x, weight, bias, out, Scales(*scales), gelu=gelu)
    reference = (function(x, weight, bias, *scales, gelu=gelu) for function in (eager, exact))
    assert_close_to_eager("out", out, *reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("width", [768, 1024, 1280])
@pytest.mark.parametrize("rows", [1, 100, 640, 1280, 2048, 5121])
def test_the_table_and_dependent_launches(rows, width, name, dtype) -> None:
    """Three linears, each launched before the one before has ended, against the same ones that wait."""
    function, gelu = FUNCTIONS[name], name == "linear_gelu"
    results = []
    weights = [problem(rows, k, n, dtype) for k, n in ((width, 3 * width), (width, width), (width, 4 * width))]
    first, second = weights[0], weights[1]
    for dependent in (False, True):
        options = {"dependent": dependent} | ({"scales": (first[3], first[4])} if dtype == E4M3 else {})
        square = second[1], second[2]
        narrow = {"dtype": E4M3, "out_scale": first[3]} if dtype == E4M3 else {}
        x = function(first[0], *square, **options, **narrow)
        x = function(x, *square, **options, **narrow)
        results += [function(x, w, b, **options) for _, w, b, *_ in weights]
    assert all(map(torch.equal, results[: len(weights)], results[len(weights) :]))
    scales = (first[3], first[4]) if dtype == E4M3 else ()
    for result, (_, w, b, *_) in zip(results, weights, strict=False):
        expected = (function(x, w, b, *scales, gelu=gelu) for function in (eager, exact))
        assert_close_to_eager("out", result, *expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_in_e4m3_are_rounded_and_end_at_the_largest(name, dtype) -> None:
    x, weight, bias, *scales = problem(333, 256, 512, dtype)
    operands = {"scales": tuple(scales)} if scales else {}
    for size in (1.0, 1e-3):
        out_scale = torch.full((1,), 0.1 * size, device=DEVICE)
        out = FUNCTIONS[name](x, weight, bias, **operands, out_scale=out_scale, dtype=E4M3)
        real = exact(x, weight, bias, *scales, gelu=name == "linear_gelu")
        wanted = (real / out_scale.double()).clamp(-448, 448)
        assert_close_to_eager("out", out.float(), wanted.to(E4M3).float(), wanted)
        assert (out.float().abs().max() == 448) == (size == 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 65])
def test_public_functions(monkeypatch, rows, name, dtype) -> None:
    gelu = name == "linear_gelu"
    x, weight, bias = problem(rows, 40, 24, dtype)
    wanted = exact(x, weight, bias, gelu=gelu)
    for backend in ("eager", "triton" if dtype in HALVES else "auto"):
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        out = torch.full((rows, 24), float("nan"), device=DEVICE, dtype=dtype)
        assert FUNCTIONS[name](x, weight, bias, out=out) is out
        assert_close_to_eager("out", out, eager(x, weight, bias, gelu=gelu), wanted)


def test_e4m3_without_kernels_is_the_product_of_what_the_numbers_mean() -> None:
    x, weight, bias, *scales = problem(9, 33, 17, E4M3)
    wanted = exact(x, weight, bias, *scales, gelu=True)
    out = linear_gelu(x, weight, bias, scales=tuple(scales), dtype=torch.float32)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    narrow = linear_gelu(x, weight, bias, scales=tuple(scales), out_scale=scales[0], dtype=E4M3)
    limit = 448 * scales[0].double()
    torch.testing.assert_close(narrow.double() * scales[0], wanted.clamp(-limit, limit), rtol=0.07, atol=1e-4)


def test_bad_input_is_named() -> None:
    x, weight, bias = problem(4, 16, 8, torch.float16)
    one = torch.ones(1, device=DEVICE)
    for error, match, call in (
        (ValueError, r"x has shape \(4, 16\) and weight \(8, 15\)", lambda: linear_gelu(x, weight[:, :15])),
        (TypeError, "x has dtype torch.float16 and weight torch.float32", lambda: linear_gelu(x, weight.float())),
        (ValueError, r"bias has shape \(7,\); it must be \[8\]", lambda: linear_gelu(x, weight, bias[:7])),
        (TypeError, "bias has dtype torch.float32", lambda: linear_gelu(x, weight, bias.float())),
        (ValueError, "e4m3 alone has scales", lambda: linear_gelu(x, weight, scales=(one, one))),
        (ValueError, "e4m3 alone has scales", lambda: linear_inference(x.to(E4M3), weight.to(E4M3))),
        (TypeError, "dtype is torch.float32", lambda: linear_gelu(x, weight, dtype=torch.float32)),
        (ValueError, "out_scale given", lambda: linear_gelu(x, weight, out_scale=one)),
        (ValueError, r"out has shape \(8, 4\)", lambda: linear_gelu(x, weight, out=x.new_empty(8, 4))),
        (TypeError, "out has dtype torch.float32", lambda: linear_gelu(x, weight, out=draw(4, 8))),
        (ValueError, "linear_gelu has no backward", lambda: linear_gelu(x.clone().requires_grad_(), weight)),
    ):
        with pytest.raises(error, match=match):
            call()
    narrow = {"scales": (one, torch.ones(2, device=DEVICE))}
    with pytest.raises(ValueError, match=r"scales\[1\] is torch.float32 \(2,\)"):
        linear_gelu(x.to(E4M3), weight.to(E4M3), **narrow)
    with torch.no_grad():
        linear_gelu(x.clone().requires_grad_(), weight)


def test_kernels_refuse_what_they_cannot_describe(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, weight, _ = problem(4, 17, 8, torch.float16)
    with pytest.raises(NotImplementedError, match="16 bytes"):
        linear_gelu(x, weight)
    with pytest.raises(NotImplementedError, match=r"dtype torch.float32 \(the kernels take"):
        linear_gelu(x.float(), weight.float())
