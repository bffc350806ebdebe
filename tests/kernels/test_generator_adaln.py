"""LayerNorm + modulation kernels against float64, eager and each other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ear_kernels import adaln_modulate
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")


def eager(h: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], weight, bias, 1e-6) * (1 + scale) + shift


def run(function, tensors: list[Tensor | None], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() if t is not None else None for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))
    return [out.detach(), *grads]


def compare(shape, modulation_shape, dtype, affine=True, seed=0) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    tensors = [draw(*shape) * 2 + 1, draw(*modulation_shape), draw(*modulation_shape)]
    tensors += [draw(shape[-1]), draw(shape[-1])] if affine else [None, None]
    grad = draw(*shape)
    ours = run(adaln_modulate, tensors, grad, dtype)
    theirs = run(eager, tensors, grad, dtype)
    exact = run(eager, tensors, grad, torch.float64)
    names = ["out", "hidden", "shift", "scale", "weight", "bias"]
    for name, a, b, c in zip(names, ours, theirs, exact, strict=False):
        assert_close_to_eager(name, a, b, c, max(2, grad.numel() // max(1, a.numel())) ** 0.5, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 384, 1024, 1152, 1280, 1536])
def test_matches_eager_at_the_generators_widths(width: int, dtype: torch.dtype) -> None:
    compare((5, width), (5, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "modulation"),
    [
        ((0, 32), (0, 32)),
        ((1, 1), (1, 1)),
        ((6, 40, 24), (6, 1, 24)),
        ((4, 3, 24), (1, 1, 24)),
        ((4, 3, 24), (24,)),
        ((4, 3, 24), (1, 3, 24)),
        ((4, 3, 24), (4, 3, 1)),
        ((70, 16), (1, 16)),
        ((24,), (24,)),
    ],
    ids=str,
)
def test_broadcast_modulation(shape, modulation, dtype: torch.dtype) -> None:
    compare(shape, modulation, dtype)


@given(
    st.integers(0, 12),
    st.integers(1, 70),
    st.sampled_from([1, 2, 5, 17]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=12 if DEVICE == "cuda" else 5)
def test_any_rows_and_width(entries: int, width: int, group: int, affine: bool, seed: int) -> None:
    compare((entries, group, width), (entries, 1, width), torch.float32, affine, seed)


def test_strided_and_expanded_inputs() -> None:
    torch.manual_seed(0)
    wide = torch.randn(7, 3 * 48, device=DEVICE)
    shift, scale, _ = wide.chunk(3, -1)
    hidden = torch.randn(48, 7, device=DEVICE).t()
    out = adaln_modulate(hidden, shift, scale)
    torch.testing.assert_close(out, eager(hidden, shift, scale, None, None))
    leaf = hidden.clone().requires_grad_()
    adaln_modulate(leaf, shift, scale).sum().backward()
    other = hidden.clone().requires_grad_()
    eager(other, shift, scale, None, None).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_second_order_gradients_are_refused() -> None:
    hidden = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    zero = torch.zeros(3, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(adaln_modulate(hidden, zero, zero).square().sum(), hidden, create_graph=True)


def test_column_sums_are_deterministic() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(90, 64, device=DEVICE) for _ in range(3)] + [torch.randn(64, device=DEVICE)] * 2
    grad = torch.randn(90, 64, device=DEVICE)
    first, second = (run(adaln_modulate, tensors, grad, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fullgraph_compile() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(6, 32, device=DEVICE) for _ in range(3)] + [torch.randn(32, device=DEVICE)] * 2
    grad = torch.randn(6, 32, device=DEVICE)
    compiled = torch.compile(adaln_modulate, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, tensors, grad, torch.float32), run(eager, tensors, grad, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_opcheck() -> None:
    from ear_kernels.ops.generator import autograd  # noqa: F401

    h, shift, scale = (torch.randn(6, 32, device=DEVICE) for _ in range(3))
    weight, bias = torch.randn(2, 32, device=DEVICE)
    args = (h, shift[:3], scale[:3], weight, bias, 2, 1e-6, torch.float32)
    torch.library.opcheck(torch.ops.ear_kernels.adaln_fwd, args)
    stats = torch.randn(2, 6, device=DEVICE)
    args = (h, h, shift[:3], scale[:3], weight, bias, stats[0], stats[1], 2)
    torch.library.opcheck(torch.ops.ear_kernels.adaln_bwd, args)


def test_a_cpu_tensor_without_the_interpreter_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        adaln_modulate(torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 8))


def test_functional_transforms_need_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(3, 8, device=DEVICE) for _ in range(3)]

    def total(hidden: torch.Tensor) -> torch.Tensor:
        return adaln_modulate(hidden, *tensors[1:]).sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(total)(tensors[0])
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    assert torch.isfinite(torch.func.grad(total)(tensors[0])).all()
