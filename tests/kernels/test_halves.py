"""A block's halves with their norms: outputs and gradients against float64 and eager, and what they keep."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.ops.transformer.functional import (
    dropout_add_layer_norm,
    gelu_mlp,
    norm_gelu_mlp,
    norm_self_attention,
    project,
    qkv_heads,
    self_attention,
)
from ear_kernels.runtime import launching
from ear_kernels.testing import FACTOR, assert_close_to_eager, errors
from tests.kernels.generator_fixtures import DEVICE, DTYPES
from tests.kernels.test_transformer import compare, leaves, results

LOW = DTYPES[-1]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def added(branch, residual, weight, bias, branch_bias):
    x = residual + branch + branch_bias
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


@given(st.integers(0, 40), st.integers(8, 40), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
@settings(max_examples=100 if DEVICE == "cuda" else 12)
def test_norm_gelu_mlp(rows, width, inner, dtype, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.manual_seed(seed)
        norm = [draw(rows, width), draw(rows, width), draw(width), draw(width), draw(width)]
        mlp = [draw(inner, width) / width**0.5, draw(inner), draw(width, inner) / inner**0.5, draw(width)]

        def oracle(*tensors):
            x, normed = added(*tensors[:5])
            return x, F.linear(F.gelu(F.linear(normed, *tensors[5:7])), *tensors[7:])

        grads = [draw(rows, width), draw(rows, width)]
        compare(monkeypatch, norm_gelu_mlp, oracle, [*norm, *mlp], grads, dtype, max(2, rows * inner))


def attention_half(
    batch: int, length: int, heads: int, dim: int, seed: int, sharpness: float
) -> tuple[Callable, Callable, list, list]:
    """(ours, the same by hand, inputs, gradients of the outputs); the logits are of the order of ``sharpness``."""
    width = heads * dim
    torch.manual_seed(seed)
    rows = (batch, length, width)
    norm = [draw(*rows), draw(*rows), draw(width), draw(width), draw(width)]
    linear = [draw(3 * width, width) / width**0.5, draw(3 * width)]
    for tensor in linear:
        tensor[: 2 * width] *= (sharpness / 3) ** 0.5

    def ours(*tensors):
        return norm_self_attention(*tensors, heads)

    def oracle(*tensors):
        x, normed = added(*tensors[:5])
        packed = F.linear(normed, *tensors[5:]).view(batch, length, 3, heads, dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind()
        # By hand: PyTorch's function gives None for no sequences on a GPU.
        mixed = torch.softmax(query @ key.transpose(2, 3) / dim**0.5, 3) @ value
        return x, mixed.transpose(1, 2).flatten(2)

    return ours, oracle, [*norm, *linear], [draw(*rows), draw(*rows)]


@given(st.integers(0, 3), st.integers(1, 40), st.sampled_from([(1, 16), (3, 8), (2, 20)]), st.integers(0, 99))
@settings(max_examples=100 if DEVICE == "cuda" else 12)
def test_norm_self_attention(batch, length, heads_and_dim, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        problem = attention_half(batch, length, *heads_and_dim, seed, 0.75)
        # The norm's bias sums over the rows what comes back from query, key and value.
        compare(monkeypatch, *problem, LOW, 3 * batch * length + 8)


def test_norm_self_attention_with_sharp_logits(monkeypatch) -> None:
    """There the rounding of queries and keys decides: one computation of a problem may be ten times as far off as
    another that is as good, so what counts is the median over many problems."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    ratios = []
    for seed in torch.randint(2**31, (100 if DEVICE == "cuda" else 20,)).tolist():
        ours, oracle, tensors, grads = attention_half(3, 19, 1, 16, seed, 3.0)
        tensors = [tensor.to(LOW) for tensor in tensors]
        exact = results(oracle, leaves(*tensors, dtype=torch.float64), grads)
        one, two = (
            torch.tensor([errors(found, truth)[1] for found, truth in zip(results_of, exact, strict=True)])
            for results_of in (results(function, leaves(*tensors, dtype=LOW), grads) for function in (ours, oracle))
        )
        ratios.append(one / two)
    assert (torch.stack(ratios).median(0).values <= FACTOR).all(), ratios


def mixed_tensors() -> tuple[list, list, list]:
    """A 16-bit branch on a float32 stream, as under autocast; dropout draws from given seeds."""
    batch, length, width, inner = 2, 13, 48, 40
    norm = [draw(batch, length, width).to(LOW), draw(batch, length, width), draw(width), draw(width), draw(width)]
    attention = [draw(3 * width, width) / width**0.5, draw(3 * width)]
    mlp = [draw(inner, width) / width**0.5, draw(inner), draw(width, inner) / inner**0.5, None]
    return norm, attention, mlp


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_half_is_its_parts(monkeypatch, half, dropout) -> None:
    """Under autocast and with dropout: the same seeds give what norm and half give one after another."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    torch.manual_seed(1)
    norm, attention, mlp = mixed_tensors()
    seeds = torch.tensor([[11], [12]], device=DEVICE).unbind()
    given_tensors = [*norm, *(attention if half == "attention" else mlp)]

    def joined(*tensors):
        if half == "attention":
            return norm_self_attention(*tensors, 3, dropout=dropout, attention_dropout=dropout, seed=seeds[0])
        return norm_gelu_mlp(*tensors, dropout=dropout, seeds=seeds)

    def parts(*tensors):
        x, normed = dropout_add_layer_norm(*tensors[:5], dropout=dropout, seed=seeds[0])
        if half == "attention":
            return x, self_attention(normed, *tensors[5:], 3, dropout=dropout)
        return x, gelu_mlp(normed, *tensors[5:], dropout=dropout, seed=seeds[1])

    found = []
    grads = [draw(2, 13, 48), draw(2, 13, 48)]
    for function in (joined, parts):
        tensors = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given_tensors]
        torch.manual_seed(5)
        with torch.autocast(DEVICE, LOW):
            outs = function(*tensors)
        assert [out.dtype for out in outs] == [torch.float32, LOW]
        wanted = [tensor for tensor in tensors if tensor is not None]
        gradients = torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
        found.append([*(out.detach() for out in outs), *gradients])
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        assert one.dtype == other.dtype
        if number < 2:
            assert torch.equal(one, other)
        # Normed rows are rounded once more: an error of half a unit of the low dtype in an element.
        error, scale = (one.double() - other.double()).norm(), other.double().norm()
        assert error <= torch.finfo(LOW).eps * scale, f"result {number}: {error / scale:.1e}"


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_nothing_of_the_stream_is_kept(monkeypatch, half) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    norm, attention, mlp = mixed_tensors()
    tensors = [
        None if t is None else t.requires_grad_() for t in [*norm, *(attention if half == "attention" else mlp)]
    ]
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t)
    with torch.autocast(DEVICE, LOW), hooks:
        outs = norm_self_attention(*tensors, 3) if half == "attention" else norm_gelu_mlp(*tensors)
    rows = [tensor for tensor in saved if tensor.shape[0] in (26, 2) and tensor.numel() >= 26 * 40]
    assert all(tensor.dtype == LOW for tensor in rows)
    # Normed rows and pre-activation; normed rows, query-key-value and the heads' results.
    assert len(rows) == (3 if half == "attention" else 2)
    outs[1].sum().backward()


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_backward_may_run_again_only_if_told(monkeypatch, half) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    norm, attention, mlp = mixed_tensors()
    tensors = [
        None if t is None else t.requires_grad_() for t in [*norm, *(attention if half == "attention" else mlp)]
    ]
    wanted = [tensor for tensor in tensors if tensor is not None]
    with torch.autocast(DEVICE, LOW):
        x, out = norm_self_attention(*tensors, 3) if half == "attention" else norm_gelu_mlp(*tensors)
    loss = x.sum() + (out.float() ** 2).sum()
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    # Only one of the two results has a gradient.
    alone = torch.autograd.grad(out.float().sum(), wanted, retain_graph=True)
    assert all(torch.isfinite(gradient).all() for gradient in alone)
    alone = torch.autograd.grad(x.sum(), norm, retain_graph=True)
    assert_close_to_eager(
        "branch", alone[0], torch.ones_like(norm[0]), torch.ones_like(norm[0]).double(), factor=1, ulps=2
    )
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, wanted, create_graph=True)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_launches_are_recorded_on_meta_tensors(half) -> None:
    """Forward and backward of the parts and of the whole; no host code reads what a tensor holds."""
    tensors, attention, mlp = (
        [None if t is None else t.to("meta").requires_grad_() for t in group] for group in mixed_tensors()
    )
    names: list[str] = []

    def record(kernel, arguments, options) -> None:
        names.append(kernel.fn.__name__)
        assert all(t is None or t.is_meta for t in arguments if not isinstance(t, (int, float)))

    recording = launching.recording(record, launching.Processor(9, 132))
    with recording, torch.autocast("cpu", torch.bfloat16):
        if half == "attention":
            x, out = norm_self_attention(*tensors, *attention, 3, dropout=0.1, attention_dropout=0.1)
            parts = [self_attention(tensors[0], *attention, 3), *qkv_heads(tensors[0], *attention, 3)]
            expected = {"attention_fwd", "attention_bwd_query", "attention_bwd_key", "pack_heads"}
        else:
            x, out = norm_gelu_mlp(*tensors, *mlp, dropout=0.1)
            parts = [gelu_mlp(tensors[0], *mlp), project(tensors[0], mlp[0])]
            expected = {"gelu_dropout_fwd", "gelu_dropout_bwd"}
        outs = [x, out, *dropout_add_layer_norm(*tensors), *parts]
        torch.autograd.backward(outs, [torch.empty_like(each) for each in outs])
    expected |= {"dropout_add_layer_norm_fwd", "dropout_add_layer_norm_bwd", "column_sums"}
    assert {name.removesuffix("_kernel") for name in names} == expected
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("half", ["norm", "attention", "mlp"])
def test_strided_memory_is_read_as_it_lies(monkeypatch, half) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    norm, attention, mlp = mixed_tensors()
    function = {"norm": dropout_add_layer_norm, "mlp": norm_gelu_mlp}.get(half)
    if function is None:
        function = functools.partial(norm_self_attention, heads=3)
    rest = {"norm": [], "attention": attention, "mlp": mlp}[half]
    strided = [tensor.new_zeros(*tensor.shape, 2)[..., 0].copy_(tensor) for tensor in norm]
    assert not any(tensor.is_contiguous() for tensor in strided)
    with torch.autocast(DEVICE, LOW):
        found, expected = function(*strided, *rest), function(*norm, *rest)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_bad_input_is_named() -> None:
    norm, attention, mlp = mixed_tensors()
    with pytest.raises(ValueError, match="branch has shape"):
        norm_gelu_mlp(norm[0][:, :-1], *norm[1:], *mlp)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        norm_self_attention(*norm, *attention, 3, attention_dropout=1.0)
    with pytest.raises(ValueError, match="weight has shape"):
        norm_self_attention(*norm, *attention, 5)
    with pytest.raises(ValueError, match="weight_in has shape"):
        norm_gelu_mlp(*norm, mlp[0][:, :-1], *mlp[1:])
