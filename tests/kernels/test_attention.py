"""Self-attention with dropout: outputs and gradients against float64 and eager, the mask, the refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.ops.transformer import reference
from ear_kernels.ops.transformer.functional import self_attention
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE

LOW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(batch: int, length: int, heads: int, dim: int, has_bias: bool, spread: float = 1.0):
    """x, weight, bias or None: query, key and value of size about ``spread``."""
    width = heads * dim
    bias = draw(3 * width) if has_bias else None
    return draw(batch, length, width), draw(3 * width, width) * (spread / width**0.5), bias


def oracle(x, weight, bias, heads, factors=None, causal=False):
    batch, length, _ = x.shape
    packed = F.linear(x, weight, bias).view(batch, length, 3, heads, weight.shape[0] // (3 * heads))
    split = packed.permute(2, 0, 3, 1, 4).unbind()
    return reference.attention(*split, factors, causal=causal).transpose(1, 2).flatten(2)


def outputs_and_gradients(function, tensors, grad, dtype):
    leaves = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def compare(monkeypatch, ours, plain, tensors, grad, dtype, terms) -> None:
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    grad = grad.to(dtype)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    kernel = outputs_and_gradients(ours, tensors, grad, dtype)
    eager = outputs_and_gradients(plain, tensors, grad, dtype)
    exact = outputs_and_gradients(plain, tensors, grad, torch.float64)
    for number, (one, two, three) in enumerate(zip(kernel, eager, exact, strict=True)):
        assert_close_to_eager(f"result {number}", one, two, three, terms**0.5 if terms > 1 else 0.0, ulps=2)


def check(batch, length, heads, dim, dtype, has_bias, dropout, causal=False) -> None:
    """Output and gradients for a random problem, with what the dropout keeps given to the oracle."""
    from ear_kernels.ops.transformer import launch_attention

    with pytest.MonkeyPatch.context() as monkeypatch:
        tensors = problem(batch, length, heads, dim, has_bias)
        factors = None
        if dropout:
            draws = launch_attention.draw(batch, heads, length, torch.device(DEVICE))
            monkeypatch.setattr(launch_attention, "draw", lambda *_: draws)
            threshold, scale = launch_attention.threshold_of(dropout)
            factors = (reference.kept(draws, threshold) * scale).view(batch, heads, length, length)
        compare(
            monkeypatch,
            lambda *given: self_attention(*given, heads, dropout=dropout, causal=causal),
            lambda *given: oracle(*given, heads, factors, causal),
            tensors,
            draw(batch, length, heads * dim),
            dtype,
            # What dropout keeps it scales: products are of that size. With few keys they cancel where eager's error
            # is exactly 0, and ours that of an output rounded once (the row sum of output times its gradient).
            max(2, batch * length) * max(1.0, factors.max().item() if dropout and batch else 1.0) ** 2,
        )


@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 15, 64, 65, 100, 128, 192]),
    st.integers(1, 3),
    st.sampled_from([1, 8, 24, 32, 64, 65, 72, 80]),
    st.sampled_from(LOW),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.integers(0, 99),
)
@settings(max_examples=150 if DEVICE == "cuda" else 15)
def test_self_attention(batch, length, heads, dim, dtype, has_bias, dropout, number) -> None:
    torch.manual_seed(number)
    check(batch, length, heads, dim, dtype, has_bias, dropout)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("length", [1, 64, 101])
@pytest.mark.parametrize("dim", [66, 72, 80])
def test_wide_heads(dim, length, dtype) -> None:
    """Two blocks of features, the second full (80) or not."""
    check(2, length, 2, dim, dtype, True, 0.1)
    check(1, length, 1, dim, dtype, False, 0.0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 6.0])
@pytest.mark.parametrize("dim", [32, 80])
def test_flat_and_sharp_softmax(monkeypatch, dim, dtype, spread) -> None:
    """Logits of 0 and logits of hundreds."""
    torch.manual_seed(3)
    heads = 2
    tensors = problem(2, 80, heads, dim, True, spread)
    compare(
        monkeypatch,
        lambda *given: self_attention(*given, heads),
        lambda *given: oracle(*given, heads),
        tensors,
        draw(2, 80, heads * dim),
        dtype,
        160,
    )


@pytest.mark.parametrize("dim", [16, 72, 80])
def test_buffers_are_written_before_they_are_read(monkeypatch, poisoned_empty, dim) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    for length in (64, 70):
        x, weight, bias = (tensor.half().requires_grad_() for tensor in problem(2, length, 2, dim, True))
        out = self_attention(x, weight, bias, 2, dropout=0.2)
        results = [out, *torch.autograd.grad(out.sum(), [x, weight, bias])]
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("dim", [16, 72, 80])
def test_strided_inputs_and_gradients(monkeypatch, dim) -> None:
    """A transposed x and an expanded gradient (``.sum().backward()``)."""
    heads = 2
    x, weight, bias = problem(70, 3, heads, dim, True)
    compare(
        monkeypatch,
        lambda *given: self_attention(given[0].transpose(0, 1), *given[1:], heads),
        lambda *given: oracle(given[0].transpose(0, 1), *given[1:], heads),
        (x, weight, bias),
        torch.ones(1, 1, 1, device=DEVICE).expand(3, 70, heads * dim),
        torch.float16,
        210,
    )


def test_the_mask_is_random() -> None:
    """Shares of rows, columns and heads; pairs in a row, a column and across heads; corners of rectangles."""
    from ear_kernels.ops.transformer import launch_attention

    heads, length, dropout = 64, 256, 0.1
    torch.manual_seed(11)
    threshold, scale = launch_attention.threshold_of(dropout)
    assert abs(scale * (1 - dropout) - 1) < 1e-6
    dropped = (~reference.kept(launch_attention.draw(1, heads, length, torch.device("cpu")), threshold)).double()
    spread = (dropout * (1 - dropout)) ** 0.5
    assert abs(dropped.mean() - dropout) < 5 * spread / dropped.numel() ** 0.5
    for dims, count in (((1, 2), length**2), ((2,), length), ((1,), length)):
        # Up to 16,384 means: six standard errors, and their own spread is the binomial one.
        means = dropped.mean(dims)
        assert (means - dropout).abs().max() < 6.5 * spread / count**0.5 + 1 / count
        assert 0.8 < means.var() / (spread**2 / count) < 1.25 or means.numel() < 100
    centred = dropped - dropout
    for shift_row, shift_col, shift_head in ((0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 32, 0), (32, 0, 0)):
        moved = centred.roll((shift_head, shift_row, shift_col), (0, 1, 2))
        assert abs((centred * moved).mean()) < 5 * spread**2 / centred.numel() ** 0.5
    for shift in (1, 2, 7, 64):
        corners = centred
        for dims in ((1,), (2,), (1, 2)):
            corners = corners * centred.roll((shift,) * len(dims), dims)
        assert abs(corners.mean()) < 6 * spread**4 / centred.numel() ** 0.5
        three = centred * centred.roll(shift, 1) * centred.roll(2 * shift, 1)
        assert abs(three.mean()) < 6 * spread**3 / centred.numel() ** 0.5


def test_dropout_extremes() -> None:
    from ear_kernels.ops.transformer import launch_attention

    assert launch_attention.threshold_of(0.0) == (-(2**31), 1.0)
    threshold, scale = launch_attention.threshold_of(1 - 2**-40)
    assert threshold <= 2**31 - 1
    assert scale > 0


def test_what_the_kernels_do_not_take_goes_to_pytorch(monkeypatch) -> None:
    """Float32 and wide heads, even where Triton is demanded: PyTorch's attention is no eager reference."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    for dtype, dim in ((torch.float32, 16), (torch.float16, 136)):
        tensors = [tensor.to(dtype) for tensor in problem(1, 9, 2, dim, True)]
        exact = oracle(*(tensor.double() for tensor in tensors), 2)
        assert (self_attention(*tensors, 2) - exact).abs().max() < (1e-4 if dtype == torch.float32 else 2e-2)


def test_second_order_gradients_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, weight, bias = (tensor.half().requires_grad_() for tensor in problem(1, 16, 1, 16, True))
    out = self_attention(x, weight, bias, 1)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.sum(), [x], create_graph=True)


def test_bad_input_is_named() -> None:
    x, weight, bias = problem(1, 4, 2, 8, True)
    with pytest.raises(ValueError, match=r"dropout is 1.0"):
        self_attention(x, weight, bias, 2, dropout=1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        self_attention(x, weight, bias[:3], 2)
    with pytest.raises(ValueError, match="weight has shape"):
        self_attention(x, weight[:-1], bias, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dim"), [(12, 64), (16, 80)])
@pytest.mark.parametrize("length", [320, 300, 1088])
def test_paper_sizes(length, heads, dim) -> None:
    check(2, length, heads, dim, torch.bfloat16, True, 0.1)
