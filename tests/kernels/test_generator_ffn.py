"""SiLU network kernels (Triton GEMMs with epilogues, and pointwise kernels round cuBLAS) against float64 and
eager."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ear_kernels import gated_silu_ffn
from ear_kernels.ops.generator import launch_ffn
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES

SMALL = launch_ffn.GemmConfig(32, 32, 16, 2, 4)
if DEVICE == "cuda":
    SMALL = launch_ffn.GemmConfig(64, 64, 64, 2, 4)
SPLIT = launch_ffn.GemmConfig(SMALL.bm, SMALL.bn, SMALL.bk, 2, 4, split=2, flatten=True)
PLANS = {
    "cublas": {"silu": None, "gate": None},
    "triton": {"silu": SMALL, "gate": SMALL},
    "split": {"silu": SPLIT, "gate": SPLIT},
}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")


def eager(h, u, gate, w_in, b_in, w_out, b_out) -> Tensor:
    return h + gate * F.linear(F.silu(F.linear(u, w_in, b_in)), w_out, b_out)


def run(function, tensors: list[Tensor | None], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() if t is not None else None for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))
    return [out.detach(), *grads]


def compare(rows, gate_rows, sizes, dtype, plan, biases=True, seed=0) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    u, v, w = sizes

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    tensors = [draw(*rows, w), draw(*rows, u), draw(*gate_rows, w), draw(v, u) / u**0.5, draw(v)]
    tensors += [draw(w, v) / v**0.5, draw(w)]
    if not biases:
        tensors[4] = tensors[6] = None
    grad = draw(*rows, w)
    rows_total = max(1, grad.numel() // w)
    with launch_ffn.using_gemms(**PLANS[plan]):
        ours = run(gated_silu_ffn, tensors, grad, dtype)
    theirs = run(eager, tensors, grad, dtype)
    exact = run(eager, tensors, grad, torch.float64)
    names = ["out"] + [
        name
        for name, tensor in zip(
            ("hidden", "modulated", "gate", "weight_in", "bias_in", "weight_out", "bias_out"),
            tensors,
            strict=True,
        )
        if tensor is not None
    ]
    for name, a, b, c in zip(names, ours, theirs, exact, strict=True):
        assert_close_to_eager(name, a, b, c, max(2, rows_total) ** 0.5, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("rows", "gate_rows", "sizes"),
    [
        ((40,), (40,), (96, 96, 96)),
        ((37,), (37,), (64, 48, 96)),
        ((5, 7), (5, 1), (32, 32, 32)),
        ((35,), (1,), (32, 32, 32)),
        ((0,), (0,), (32, 32, 32)),
        ((1,), (1,), (40, 40, 40)),
        ((9 * SMALL.bm + 5,), (9 * SMALL.bm + 5,), (16, 40, 72)),  # more than one group of row tiles
    ],
    ids=str,
)
def test_matches_eager(rows, gate_rows, sizes, dtype: torch.dtype, plan: str) -> None:
    compare(rows, gate_rows, sizes, dtype, plan)


@given(st.integers(0, 40), st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from(list(PLANS)), st.booleans())
@settings(max_examples=10 if DEVICE == "cuda" else 5)
def test_any_rows_and_sizes(rows: int, eighths: tuple[int, ...], plan: str, biases: bool) -> None:
    compare((rows,), (rows,), tuple(8 * n for n in eighths), torch.float16, plan, biases, seed=rows)


def test_odd_sizes_fall_back_to_cublas() -> None:
    compare((9,), (9,), (13, 11, 7), torch.float16, "triton")


def test_strided_inputs_and_expanded_gradient() -> None:
    torch.manual_seed(0)
    wide = torch.randn(9, 3 * 32, device=DEVICE)
    h, u, gate = wide.chunk(3, -1)
    weights = [torch.randn(32, 32, device=DEVICE) for _ in range(2)]
    leaves = [[t.clone().requires_grad_() for t in weights] for _ in range(2)]
    for function, (w_in, w_out) in zip((gated_silu_ffn, eager), leaves, strict=True):
        function(h, u, gate, w_in, None, w_out, None).sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_second_order_gradients_are_refused() -> None:
    h = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    w = torch.randn(16, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(gated_silu_ffn(h, h, h, w, None, w, None).sum(), h, create_graph=True)


def test_fullgraph_compile_and_opcheck() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(6, 32, device=DEVICE) for _ in range(3)]
    tensors += [torch.randn(32, 32, device=DEVICE), torch.randn(32, device=DEVICE)] * 2
    grad = torch.randn(6, 32, device=DEVICE)
    compiled = torch.compile(gated_silu_ffn, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, tensors, grad, torch.float32), run(eager, tensors, grad, torch.float32), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.library.opcheck(torch.ops.ear_kernels.gated_silu_ffn_fwd, (*tensors, 1, True))
    h, u, gate, w_in, _, w_out, _ = tensors
    torch.library.opcheck(torch.ops.ear_kernels.gated_silu_ffn_bwd, (grad, u, gate, w_in, w_out, h, u, 1))


def test_other_gemms_hold_inside_their_scope_alone() -> None:
    x = torch.zeros(8, 8, device=DEVICE, dtype=torch.float16)

    def chosen() -> launch_ffn.GemmConfig | None:
        return launch_ffn.gemm_config("silu", 8, 8, x, save=False)

    before = chosen()
    with contextlib.suppress(KeyError), launch_ffn.using_gemms(silu=SMALL):
        with launch_ffn.using_gemms(gate=None):
            assert chosen() == SMALL
        raise KeyError
    assert chosen() == before
    with pytest.raises(ValueError, match="epilogues"), launch_ffn.using_gemms(relu=None):
        pass
