"""A whole pre-norm block: outputs and gradients against float64 and eager, timm's block, and its halves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.functional import (
    Block,
    BlockOptions,
    dropout_add_layer_norm,
    norm_gelu_mlp,
    project,
    self_attention,
    transformer_block,
)
from ear_kernels.ops.transformer import reference
from ear_kernels.runtime import launching
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES
from tests.kernels.test_transformer import compare

LOW = DTYPES[-1]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def parameters(heads: int, dim: int, width: int, inner: int, *, bias: bool = True) -> list:
    """In the order of :class:`Block`."""
    rows = heads * dim

    def linear(outputs: int, inputs: int) -> list:
        return [draw(outputs, inputs) / inputs**0.5, draw(outputs) if bias else None]

    norms = [[1 + draw(width) / 4, draw(width)] for _ in range(2)]
    attention = [*norms[0], *linear(3 * rows, width), *linear(width, rows)]
    return [*attention, *norms[1], *linear(inner, width), *linear(width, inner)]


@pytest.mark.slow
@given(
    st.integers(0, 3), st.integers(1, 40), st.sampled_from([(1, 16, 16), (3, 8, 24), (2, 20, 36)]),
    st.integers(1, 70), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100 if DEVICE == "cuda" else 6)
def test_the_block_is_the_eager_block(batch, length, sizes, inner, bias, seed) -> None:
    heads, dim, width = sizes
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.manual_seed(seed)
        options = BlockOptions(heads, eps=(1e-6, 1e-5))
        given_parameters = parameters(heads, dim, width, inner, bias=bias)
        present = [tensor for tensor in given_parameters if tensor is not None]

        def call(function):
            def with_list(x, *tensors):
                rest = iter(tensors)
                block = Block(*(None if each is None else next(rest) for each in given_parameters))
                return function(x, block, options)

            return with_list

        def oracle(x, block, options):
            if len(x):
                return reference.transformer_block(x, block, options)
            # PyTorch's attention gives None for no sequences on a GPU.
            return x + 0 * sum(tensor.sum() for tensor in block if tensor is not None)

        tensors = [draw(batch, length, width), *present]
        terms = 3 * batch * length * 4 + 8
        compare(monkeypatch, call(transformer_block), call(oracle), tensors, [draw(batch, length, width)], LOW, terms)


def as_halves(x, block, options, seeds):
    """The same block of the operations for its halves, every dropout of one rate."""
    p, rate, width = block, options.dropouts[0], x.shape[-1]
    zeros = torch.zeros_like(x, dtype=LOW)
    x, normed = dropout_add_layer_norm(zeros, x, p.norm1_weight, p.norm1_bias, eps=options.eps[0])
    mixed = self_attention(normed, p.qkv_weight, p.qkv_bias, options.heads, dropout=options.attention_dropout)
    mlp = p.fc1_weight, p.fc1_bias, p.fc2_weight, None
    norm2 = p.norm2_weight, p.norm2_bias, p.proj_bias
    x, out = norm_gelu_mlp(
        project(mixed, p.proj_weight), x, *norm2, *mlp, dropout=rate, eps=options.eps[1], seeds=seeds[:2]
    )
    ones = torch.ones(width, device=x.device)
    return dropout_add_layer_norm(out, x, ones, ones, p.fc2_bias, dropout=rate, seed=seeds[2])[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_under_autocast_with_dropout_it_is_its_halves(monkeypatch, dropout) -> None:
    """From the same state of torch's generator the same masks: the attention's draws come after the seeds."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    torch.manual_seed(3)
    options = BlockOptions(3, dropout, (dropout,) * 3, (1e-6, 1e-5))
    given_tensors = [draw(2, 5, 48), *parameters(3, 16, 48, 40)]
    grad, found = draw(2, 5, 48), []

    def halves(x, block, options):
        return as_halves(x, block, options, torch.randint(2**31, (3, 1), device=x.device).unbind())

    for function in (transformer_block, halves):
        tensors = [tensor.clone().requires_grad_() for tensor in given_tensors]
        torch.manual_seed(5)
        if function is halves and not dropout:
            torch.randint(2**31, (3, 1), device=DEVICE)
        with torch.autocast(DEVICE, LOW):
            out = function(tensors[0], Block(*tensors[1:]), options)
        assert out.dtype == torch.float32
        found.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        assert one.dtype == other.dtype
        # Normed rows are rounded once more.
        error, scale = (one.double() - other.double()).norm(), other.double().norm()
        assert error <= torch.finfo(LOW).eps * scale, f"result {number}: {error / scale:.1e}"


def block_of(*, grad: bool = True) -> tuple[torch.Tensor, Block]:
    tensors = [tensor.requires_grad_(grad) for tensor in [draw(2, 5, 48), *parameters(3, 16, 48, 40)]]
    return tensors[0], Block(*tensors[1:])


def test_nothing_of_the_stream_is_kept(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, block = block_of()
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t)
    with torch.autocast(DEVICE, LOW), hooks:
        out = transformer_block(x, block, BlockOptions(3))
    rows = [tensor for tensor in saved if tensor.shape[0] in (10, 2) and tensor.numel() >= 10 * 40]
    # Normed rows twice, query-key-value, the heads' results, pre-activation.
    assert len(rows) == 5
    assert all(tensor.dtype == LOW for tensor in rows)
    out.sum().backward()


def test_backward_may_run_again_only_if_told(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, block = block_of()
    with torch.autocast(DEVICE, LOW):
        loss = (transformer_block(x, block, BlockOptions(3)) ** 2).sum()
    first = torch.autograd.grad(loss, [x, *block], retain_graph=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, [x, *block], create_graph=True)
    second = torch.autograd.grad(loss, [x, *block])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(monkeypatch, reentrant) -> None:
    """Recomputed with the same masks: the gradients are those without it."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, block = block_of()
    options = BlockOptions(3, 0.2, (0.2, 0.3, 0.1))
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        with torch.autocast(DEVICE, LOW):
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(
                    transformer_block, x, block, options, use_reentrant=reentrant
                )  # fmt: skip
            else:
                out = transformer_block(x, block, options)
        wanted = [x, *block] if not reentrant else [x]
        for tensor in (x, *block):
            tensor.grad = None
        out.square().sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in wanted)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_without_gradients_and_in_strided_memory(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, block = block_of(grad=False)
    wide = torch.cat([x, x], dim=2)[..., :48]
    strided = Block(*(tensor.new_zeros(*tensor.shape, 2)[..., 0].copy_(tensor) for tensor in block))
    assert not wide.is_contiguous()
    assert not strided.norm1_weight.is_contiguous()
    with torch.autocast(DEVICE, LOW):
        out = transformer_block(x, block, BlockOptions(3))
        assert torch.equal(transformer_block(wide, strided, BlockOptions(3)), out)
        with torch.no_grad():
            assert torch.equal(transformer_block(x, block, BlockOptions(3)), out)
        eager = reference.transformer_block(x, block, BlockOptions(3))
    exact = reference.transformer_block(x.double(), Block(*(t.double() for t in block)), BlockOptions(3))
    assert_close_to_eager("out", out, eager, exact)


def test_launches_are_recorded_on_meta_tensors() -> None:
    x, block = block_of()
    x, block = x.detach().to("meta").requires_grad_(), Block(*(t.detach().to("meta").requires_grad_() for t in block))
    names: list[str] = []

    def record(kernel, arguments, options) -> None:
        names.append(kernel.fn.__name__.removesuffix("_kernel"))

    recording = launching.recording(record, launching.Processor(9, 132))
    with recording, torch.autocast("cpu", torch.bfloat16):
        out = transformer_block(x, block, BlockOptions(3, 0.1, (0.1, 0.1, 0.1)))
        out.backward(torch.empty_like(out))
    forward = ["dropout_add_layer_norm_fwd", "attention_fwd", "dropout_add_layer_norm_fwd"]
    forward += ["gelu_dropout_fwd", "dropout_add_fwd"]
    assert names[:5] == forward
    backward = {"dropout_add_bwd", "gelu_dropout_bwd", "dropout_add_layer_norm_bwd", "column_sums"}
    assert set(names[5:]) == backward | {"attention_bwd_query", "attention_bwd_key"}


def test_bad_input_is_named() -> None:
    x, block = block_of()
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        transformer_block(x, block, BlockOptions(3, dropouts=(0.0, 1.0, 0.0)))
    with pytest.raises(ValueError, match="fc2_weight has shape"):
        transformer_block(x, block._replace(fc2_weight=block.fc1_weight), BlockOptions(3))
    with pytest.raises(ValueError, match="proj_bias has shape"):
        transformer_block(x, block._replace(proj_bias=block.proj_bias[1:]), BlockOptions(3))
    with pytest.raises(ValueError, match="for 5 heads"):
        transformer_block(x, block, BlockOptions(5))
    with pytest.raises(ValueError, match="x has shape"):
        transformer_block(x[0], block, BlockOptions(3))
