"""Causal self-attention: outputs and gradients against float64 and eager, what no query sees, dropout, the checks."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.ops.transformer import reference
from ear_kernels.ops.transformer.functional import norm_self_attention, self_attention
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_attention import LOW, check, compare, draw, oracle, problem


@given(
    st.integers(0, 2),
    st.sampled_from([1, 2, 15, 63, 64, 65, 100, 128, 130]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([1, 8, 24, 64, 65, 72, 80]),
    st.sampled_from(LOW),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.integers(0, 99),
)
@settings(max_examples=150 if DEVICE == "cuda" else 8)
def test_self_attention(batch, length, heads, dim, dtype, has_bias, dropout, number) -> None:
    torch.manual_seed(number)
    check(batch, length, heads, dim, dtype, has_bias, dropout, causal=True)


@pytest.mark.parametrize(("dim", "length"), [(64, 128), (64, 97), (72, 97), (80, 128)])
def test_several_tiles(dim, length) -> None:
    """Tiles below, on and above the diagonal, in one block of features and in two; whole tiles and a rest."""
    check(1, length, 1, dim, LOW[0], True, 0.1, causal=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dim", [16, 72])
def test_no_query_sees_a_later_key(monkeypatch, dim, dropout) -> None:
    """Other later rows change nothing before them, bit for bit, and get no gradient from there."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    from ear_kernels.ops.transformer import launch_attention

    length = 70
    draws = launch_attention.draw(1, 1, length, torch.device(DEVICE))
    monkeypatch.setattr(launch_attention, "draw", lambda *_: draws)
    x, weight, bias = (tensor.half() for tensor in problem(1, length, 1, dim, True))
    results = []
    for place in (random.randint(1, 63), random.randint(64, 69)):
        changed = x.clone()
        changed[:, place:] = draw(1, length - place, dim).half()
        leaves = [each.clone().requires_grad_() for each in (x, changed)]
        outs = [self_attention(leaf, weight, bias, 1, dropout=dropout, causal=True) for leaf in leaves]
        assert outs[0][:, :place].equal(outs[1][:, :place])
        assert not outs[0][:, place:].equal(outs[1][:, place:])
        grads = [
            torch.autograd.grad(out[:, :place].float().square().sum(), leaf)[0]
            for out, leaf in zip(outs, leaves, strict=True)
        ]
        assert not grads[0][:, place:].any()
        assert grads[0][:, :place].equal(grads[1][:, :place])
        results.append(outs[0])
    # The same draws, the same dropout.
    assert all(each.equal(results[0]) for each in results)


def test_without_causal_every_query_sees_all(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, weight, bias = (tensor.half() for tensor in problem(1, 70, 1, 16, True))
    changed = x.clone()
    changed[:, -1] += 1
    one, two = (self_attention(each, weight, bias, 1) for each in (x, changed))
    assert (one[:, :-1] != two[:, :-1]).any(-1).float().mean() > 0.5


def test_one_row_attends_to_itself(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, weight, bias = (tensor.half() for tensor in problem(3, 1, 2, 8, True))
    out = self_attention(x, weight, bias, 2, causal=True)
    torch.testing.assert_close(out, F.linear(x, weight, bias)[..., 32:])


@pytest.mark.parametrize("dim", [16, 72])
def test_strides_and_sharp_softmax(monkeypatch, dim) -> None:
    """A transposed x, an expanded gradient, and logits of hundreds."""
    heads = 2
    x, weight, bias = problem(70, 1, heads, dim, True, 6.0)
    compare(
        monkeypatch,
        lambda *given: self_attention(given[0].transpose(0, 1), *given[1:], heads, causal=True),
        lambda *given: oracle(given[0].transpose(0, 1), *given[1:], heads, causal=True),
        (x, weight, bias),
        torch.ones(1, 1, 1, device=DEVICE).expand(1, 70, heads * dim),
        torch.float16,
        70,
    )


@pytest.mark.parametrize("dim", [16, 72])
def test_buffers_are_written_before_they_are_read(monkeypatch, poisoned_empty, dim) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    for length in (64, 70):
        x, weight, bias = (tensor.half().requires_grad_() for tensor in problem(1, length, 1, dim, True))
        out = self_attention(x, weight, bias, 1, dropout=0.2, causal=True)
        results = [out, *torch.autograd.grad(out.sum(), [x, weight, bias])]
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_norm_self_attention_is_the_norm_and_the_attention(monkeypatch, backend) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    heads, dim, length = 2, 24, 67
    width = heads * dim
    norm = [draw(2, length, width).half() for _ in range(2)] + [draw(width).half() for _ in range(3)]
    linear = [(draw(3 * width, width) / width**0.5).half(), draw(3 * width).half()]
    x, out = norm_self_attention(*norm, *linear, heads, causal=True)
    expected_x = norm[1] + norm[0] + norm[4]
    normed = F.layer_norm(expected_x.double(), (width,), norm[2].double(), norm[3].double(), 1e-6)
    expected = oracle(normed, *(each.double() for each in linear), heads, causal=True)
    torch.testing.assert_close(x, expected_x, atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=1e-2)


def test_the_eager_path_is_the_reference() -> None:
    """Float64 on a CPU, which is PyTorch's own attention."""
    x, weight, bias = (tensor.cpu().double() for tensor in problem(2, 13, 2, 8, True))
    given = self_attention(x, weight, bias, 2, causal=True)
    torch.testing.assert_close(given, oracle(x, weight, bias, 2, causal=True))
    query, key, value = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    rows = [reference.attention(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1]) for i in range(5)]
    torch.testing.assert_close(reference.attention(query, key, value, causal=True), torch.cat(rows, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dim"), [(12, 64), (16, 80)])
@pytest.mark.parametrize("length", [319, 320, 1087])
def test_paper_sizes(length, heads, dim) -> None:
    check(2, length, heads, dim, torch.bfloat16, True, 0.1, causal=True)
