"""Dropout + residual + LayerNorm and the GELU MLP: outputs and gradients against float64 and eager; the dropout."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.ops.transformer import reference
from ear_kernels.ops.transformer.functional import dropout_add_layer_norm, gelu_mlp, project, qkv_heads
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES


def leaves(*tensors, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def results(function, tensors, grads):
    outs = function(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = torch.autograd.grad(
        outs, tensors, [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)]
    )
    return [*(out.detach() for out in outs), *gradients]


def compare(monkeypatch, ours, oracle, tensors, grads, dtype, terms) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    kernel = results(ours, leaves(*tensors, dtype=dtype), grads)
    eager = results(oracle, leaves(*tensors, dtype=dtype), grads)
    tensors = [tensor.to(dtype) for tensor in tensors]
    exact = results(oracle, leaves(*tensors, dtype=torch.float64), grads)
    for number, (one, two, three) in enumerate(zip(kernel, eager, exact, strict=True)):
        assert_close_to_eager(f"result {number}", one, two, three, terms**0.5 if terms > 1 else 0.0, ulps=2)


def mask_of(rows: int, width: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """What the norm's kernel keeps, scaled: x for a branch of ones and no residual."""
    ones, zeros = torch.ones(rows, width, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    parameters = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    return dropout_add_layer_norm(ones, zeros, *parameters, dropout=dropout, seed=seed)[0]


@given(
    st.integers(0, 70),
    # Of two or three features the norm's own conditioning decides, not the kernel.
    st.integers(8, 70),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
@settings(max_examples=100 if DEVICE == "cuda" else 12)
def test_dropout_add_layer_norm(rows, width, dropout, dtype, seed_number) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        torch.manual_seed(seed_number)
        draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
        seed = torch.randint(2**31, (1,), device=DEVICE)
        mask = mask_of(rows, width, dropout, seed)

        def ours(branch, residual, weight, bias, *extra):
            return dropout_add_layer_norm(branch, residual, weight, bias, *extra, dropout=dropout, seed=seed)

        def oracle(branch, residual, weight, bias, branch_bias=None):
            branch = branch if branch_bias is None else branch + branch_bias
            x = residual + branch * mask.to(branch.dtype)
            return x, F.layer_norm(x, (width,), weight, bias, 1e-6)

        tensors = [draw(rows, width), draw(rows, width), draw(width), draw(width)]
        tensors += [draw(width)] if seed_number % 2 else []
        grads = [draw(rows, width), draw(rows, width)]
        compare(monkeypatch, ours, oracle, tensors, grads, dtype, max(2, rows))


@given(
    st.integers(0, 40),
    st.integers(2, 40),
    st.integers(1, 90),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=100 if DEVICE == "cuda" else 12)
def test_gelu_mlp(rows, width, inner, dtype, has_bias, seed_number) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.manual_seed(seed_number)
        draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
        tensors = [draw(rows, width), draw(inner, width) / width**0.5, draw(width, inner) / inner**0.5]
        tensors += [draw(inner), draw(width)] if has_bias else []

        def arranged(function):
            def call(x, first, second, first_bias=None, second_bias=None):
                return function(x, first, first_bias, second, second_bias)

            return call

        def oracle(*arguments):
            return reference.gelu_mlp(*arguments, 0.0)

        compare(
            monkeypatch,
            arranged(gelu_mlp),
            arranged(oracle),
            tensors,
            [draw(rows, width)],
            dtype,
            max(2, rows * inner),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 16, 2), (1, 3, 24, 3), (0, 4, 8, 1), (3, 7, 96, 12)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "heads", "mixed"])
def test_qkv_heads(monkeypatch, dtype, shape, layout) -> None:
    """Whatever the strides in which attention returns its gradients."""
    batch, length, width, heads = shape
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    tensors = [draw(batch, length, width), draw(3 * width, width) / width**0.5, draw(3 * width)]

    def arranged(function):
        return lambda *tensors: function(*tensors, heads)

    def laid_out(number: int) -> torch.Tensor:
        by_rows = layout == "rows" or (layout == "mixed" and number == 1)
        if by_rows:
            return draw(batch, length, heads, width // heads).transpose(1, 2)
        return draw(batch, heads, length, width // heads)

    grads = [laid_out(number) for number in range(3)]
    compare(
        monkeypatch, arranged(qkv_heads), arranged(reference.qkv_heads), tensors, grads, dtype, batch * length + 2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 16, 7), (1, 1, 24, 24), (0, 4, 8, 3)], ids=str)
def test_project(monkeypatch, dtype, shape) -> None:
    batch, length, width, outer = shape
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    tensors = [draw(batch, length, width), draw(outer, width) / width**0.5]
    compare(monkeypatch, project, F.linear, tensors, [draw(batch, length, outer)], dtype, batch * length + 2)
    with pytest.raises(ValueError, match="weight has shape"):
        project(tensors[0], tensors[1][:, :-1])


# The second is wider than a program's columns, and of fewer rows than programs.
@pytest.mark.parametrize(("rows", "inner"), [(37, 40), (6, 1100)])
def test_gelu_mlp_with_dropout_is_linear_in_its_mask(monkeypatch, rows, inner) -> None:
    """The mask is read off an identity second linear; outputs and gradients then are those of that mask."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    width, dropout = 16, 0.3
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    x, first, second = draw(rows, width), draw(inner, width), draw(5, inner)
    seed = torch.randint(2**31, (1,), device=DEVICE)
    bias = torch.full((inner,), 3.0, device=DEVICE)
    seen = gelu_mlp(x, 0 * first, bias, torch.eye(inner, device=DEVICE), None, dropout=dropout, seed=seed)
    mask = seen / F.gelu(bias)
    assert 0.15 < (mask == 0).double().mean() < 0.45

    def ours(x, first, second):
        return gelu_mlp(x, first, None, second, None, dropout=dropout, seed=seed)

    def oracle(x, first, second):
        return F.linear(F.gelu(F.linear(x, first)) * mask.to(x.dtype), second)

    compare(monkeypatch, ours, oracle, [x, first, second], [draw(rows, 5)], torch.float32, rows * inner)


def test_the_dropped_share_and_its_scale(monkeypatch) -> None:
    """Shares within 5 standard errors; every row and column alike; kept elements scaled by the exact inverse."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    rows, width = (4096, 768) if DEVICE == "cuda" else (96, 200)
    for dropout in (0.1, 0.5):
        torch.manual_seed(5)
        mask = mask_of(rows, width, dropout, torch.randint(2**31, (1,), device=DEVICE))
        share = round(dropout * 65536) / 65536
        torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - share)))
        dropped = (mask == 0).double()
        deviation = (share * (1 - share)) ** 0.5
        assert abs(dropped.mean() - share) < 5 * deviation / (rows * width) ** 0.5
        for dim, count in ((0, rows), (1, width)):
            assert (dropped.mean(dim) - share).abs().max() < 6 * deviation / count**0.5
        # Neighbours share a Philox call: they must still be independent.
        both = (dropped[:, 1:] * dropped[:, :-1]).mean()
        assert abs(both - share**2) < 6 * share / (rows * width) ** 0.5


def test_seeds_give_other_masks_and_the_same_seed_the_same(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    masks = [mask_of(8, 64, 0.5, torch.tensor([number], device=DEVICE)) for number in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_bad_dropout_is_named(dropout) -> None:
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"dropout is .*\[0, 1\)"):
        dropout_add_layer_norm(x, x, x[0], x[0], dropout=dropout)
    with pytest.raises(ValueError, match="weight_out"):
        gelu_mlp(x, torch.ones(6, 4, device=DEVICE), None, torch.ones(3, 5, device=DEVICE), None)


@pytest.mark.parametrize(
    ("width", "dtype", "reason"),
    [
        (4, torch.float64, r"dtype torch.float64 \(the kernels take float32, float16 and bfloat16\)"),
        (8200, torch.float32, r"width 8200 \(the kernels take 1 to 8192\)"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(monkeypatch, width, dtype, reason) -> None:
    x = torch.ones(2, width, device=DEVICE, dtype=dtype)
    for backend in ("auto", "triton"):
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        if backend == "auto":
            torch.testing.assert_close(dropout_add_layer_norm(x, x, x[0], x[0])[0], 2 * x)
            continue
        with pytest.raises(NotImplementedError, match=reason):
            dropout_add_layer_norm(x, x, x[0], x[0])
        with pytest.raises(NotImplementedError, match=reason):
            project(x, x)


@pytest.mark.gpu
def test_the_model_with_kernels_is_the_eager_model(monkeypatch) -> None:
    """Loss and every gradient, dropout off, same noise and masks: within twice the eager model's bf16 error."""
    from dataclasses import replace

    from ear_model import EAR
    from ear_model.presets import EAR_BASE

    config = replace(EAR_BASE, depth=3, dropout=0.0, attention_dropout=0.0, generator_depth=2)
    torch.manual_seed(0)
    model = EAR(config).cuda().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
    images, labels = torch.randn(8, 16, 16, 16, device="cuda"), torch.arange(8, device="cuda")

    def run(backend: str, enabled: bool) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = model(images, labels, num_masked=200)
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    exact, eager, ours = run("eager", False), run("eager", True), run("auto", True)
    for name, truth in exact.items():
        bound = 2 * (eager[name] - truth).norm() + 2e-3 * truth.norm()
        assert (ours[name] - truth).norm() <= bound, name
