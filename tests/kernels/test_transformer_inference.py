"""The block's inference operations against float64 and eager: results, given memory, e4m3, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.functional import attention, attention_cached, attention_rows, quantise_e4m3, residual_norm
from ear_kernels.ops.transformer import reference
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES

E4M3 = torch.float8_e4m3fn
LOW = [dtype for dtype in DTYPES if dtype != torch.float32]
# The interpreter cannot round to e4m3.
OUTPUTS = [None, E4M3] if DEVICE == "cuda" else [None]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def close(
    name: str,
    ours: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    scale: float | None = None,
    slack: float = 0.0,
) -> None:
    """The error rule; of e4m3 that every number is rounded to a neighbour, but for ``slack``, and saturated."""
    if ours.dtype == E4M3:
        ours, eager, exact = ours.float() * scale, eager.float() * scale, exact.clamp(-448 * scale, 448 * scale)
        assert ((ours - exact).abs() <= exact.abs() / 15 + scale * 2**-9 + slack).all(), name
    assert_close_to_eager(name, ours, eager, exact, ulps=2)


@given(
    st.integers(0, 9),
    st.sampled_from([8, 17, 64, 70, 768]),
    st.sampled_from(DTYPES),
    st.lists(st.booleans(), max_size=2),
    st.sampled_from(OUTPUTS),
    st.sampled_from(["in place", "elsewhere", "nowhere"]),
    st.integers(0, 999),
)
@settings(max_examples=150 if DEVICE == "cuda" else 30)
def test_residual_norm(rows, width, dtype, biases, output, written, number) -> None:
    """With no, one or two branches; a branch has a bias or none."""
    torch.manual_seed(number)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        branches = [(draw(rows, width).to(dtype), draw(width).to(dtype) if biased else None) for biased in biases]
        stream, parameters = draw(rows, width) * 3, [draw(width).to(dtype) for _ in range(2)]
        before = stream.clone()
        wide = [(branch.double(), None if own is None else own.double()) for branch, own in branches]
        scale = torch.tensor([0.011], device=DEVICE) if output is E4M3 else None
        memory = {"in place": stream, "elsewhere": torch.full_like(stream, torch.nan), "nowhere": None}[written]
        memory, out = memory if branches else None, output or dtype
        normed = residual_norm(stream, branches, *parameters, out_stream=memory, dtype=out, scale=scale)
        assert torch.equal(stream, before) == (memory is not stream or not rows)
        eager = reference.residual_norm(before, branches, *parameters, 1e-6)
        exact = reference.residual_norm(before.double(), wide, *(each.double() for each in parameters), 1e-6)
        if memory is not None:
            close("x", memory, eager[0], exact[0])
        expected = reference.e4m3(eager[1] if output else eager[1].to(dtype), scale, out)
        close("normed", normed, expected, exact[1], None if scale is None else scale.item())


def exact_attention(query, kv, heads):
    parts = (each.double().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, *kv.chunk(2, -1)))
    return reference.attention(*parts).transpose(1, 2).flatten(2)


def eager_attention(query, kv, heads):
    """In the dtype of the tensors, product by product."""
    parts = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, *kv.chunk(2, -1)))
    return reference.attention(*parts).transpose(1, 2).flatten(2)


def check_attention(groups, length, heads, dim, dtype, output=None, spread=1.0) -> None:
    width = heads * dim
    qkv = (draw(groups, length, 3 * width) * spread).to(dtype)
    scale = torch.tensor([0.004], device=DEVICE) if output is E4M3 else None
    parts = qkv[..., :width], qkv[..., width:]
    eager, exact = eager_attention(*parts, heads), exact_attention(*parts, heads)
    ours = attention(qkv, heads, scale=scale, dtype=output)
    slack = 2 * (eager - exact).abs().max().item() if exact.numel() else 0.0
    eager = eager if scale is None else reference.e4m3(eager.float(), scale, E4M3)
    close("attention", ours, eager, exact, None if scale is None else 0.004, slack)


def check_rows(groups, length, queries, heads, dim, dtype) -> None:
    width = heads * dim
    query, kv = draw(groups, queries, width).to(dtype), draw(groups, length, 2 * width).to(dtype)
    out = torch.full_like(query, float("nan"))
    assert attention_rows(query, kv, heads, out=out) is out
    close("rows", out, eager_attention(query, kv, heads), exact_attention(query, kv, heads))


@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 16, 20, 64, 65, 100, 128, 192]),
    st.integers(1, 3),
    st.sampled_from([1, 8, 24, 64, 72, 80]),
    st.sampled_from(LOW),
    st.sampled_from(OUTPUTS),
    st.sampled_from([1e-3, 1.0, 6.0]),
    st.integers(0, 999),
)
@settings(max_examples=150 if DEVICE == "cuda" else 20)
def test_attention(groups, length, heads, dim, dtype, output, spread, number) -> None:
    torch.manual_seed(number)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        check_attention(groups, length, heads, dim, dtype, output, spread)


@given(
    st.integers(0, 3),
    st.sampled_from([1, 16, 63, 64, 100, 320]),
    st.sampled_from([0, 1, 2, 7, 16, 17, 40]),
    st.integers(1, 3),
    st.sampled_from([8, 24, 64, 72, 80]),
    st.sampled_from(LOW),
    st.integers(0, 999),
)
@settings(max_examples=150 if DEVICE == "cuda" else 20)
def test_attention_rows(groups, length, queries, heads, dim, dtype, number) -> None:
    torch.manual_seed(number)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        check_rows(groups, length, queries, heads, dim, dtype)


def test_attention_writes_all_of_given_memory_and_no_more(triton_backend) -> None:
    qkv, memory = draw(2, 70, 3 * 48).half(), torch.full((4, 70, 48), float("nan"), device=DEVICE).half()
    assert attention(qkv, 2, out=memory[1:3]).data_ptr() == memory[1].data_ptr()
    assert torch.isfinite(memory[1:3]).all()
    assert torch.isnan(memory[0]).all()
    assert torch.isnan(memory[3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_the_kernels_do_not_take_goes_to_pytorch(triton_backend, dtype) -> None:
    """Float32 and wide heads, even where Triton is demanded."""
    for dim in (8, 136):
        qkv = draw(2, 9, 3 * 2 * dim).to(dtype)
        exact = exact_attention(qkv[..., : 2 * dim], qkv[..., 2 * dim :], 2)
        assert (attention(qkv, 2) - exact).abs().max() < 1e-5
        rows = attention_rows(qkv[:, 2:4, : 2 * dim], qkv[..., 2 * dim :], 2)
        assert (rows - exact[:, 2:4]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_eager_takes_every_dtype(monkeypatch, dtype) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    scale = torch.tensor([0.1], device=DEVICE)
    stream, branch, weight = draw(3, 16).to(dtype), draw(3, 16).bfloat16(), draw(16)
    expected = stream + branch
    normed = residual_norm(stream, [(branch, None)], weight, weight, out_stream=stream, dtype=E4M3, scale=scale)
    assert torch.allclose(stream.float(), expected.float(), atol=0.05)
    wanted = F.layer_norm(stream.float(), (16,), weight, weight, 1e-6)
    assert torch.allclose(normed.float() * 0.1, wanted, rtol=0.07, atol=1e-3)
    qkv = draw(2, 5, 48).to(dtype)
    low = attention(qkv, 2, dtype=E4M3, scale=scale).float() * 0.1
    assert torch.allclose(low, attention(qkv, 2).float(), rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_quantise(magnitude) -> None:
    weight = draw(33, 70) * magnitude
    low, scale = quantise_e4m3(weight)
    assert low.dtype == E4M3
    assert scale.shape == (1,)
    assert low.float().abs().max() == 448
    back = low.double() * scale.double()
    assert ((back - weight).abs() <= weight.abs() / 15 + scale.item() * 2**-9).all()


def test_zeros_are_quantised() -> None:
    low, scale = quantise_e4m3(torch.zeros(3, 4, device=DEVICE))
    assert scale.item() == 1
    assert not low.float().any()


def test_bad_input_is_named() -> None:
    stream, weight, scale = draw(4, 8), draw(8), torch.ones(1, device=DEVICE)
    for error, match, branches in (
        (ValueError, r"branches\[0\]\[0\] has shape \(4, 7\)", [(draw(4, 7), None)]),
        (ValueError, r"branches\[1\]\[1\] has shape \(7,\)", [(stream, weight), (stream, draw(7))]),
        (ValueError, "branches has 3 items", [(stream, None)] * 3),
        (TypeError, r"branches\[0\] is a Tensor; it must be \(tensor, bias or None\)", [stream]),
        (TypeError, r"branches\[0\]\[0\] is a NoneType", [(None, weight)]),
        (TypeError, "branches is a Tensor", stream),
    ):
        with pytest.raises(error, match=match):
            residual_norm(stream, branches, weight, weight)
    with pytest.raises(ValueError, match="without branches"):
        residual_norm(stream, [], weight, weight, out_stream=stream)
    with pytest.raises(ValueError, match="contiguous"):
        residual_norm(draw(8, 4).t(), [], weight, weight)
    with pytest.raises(TypeError, match="needs one"):
        residual_norm(stream, [], weight, weight, dtype=E4M3)
    with pytest.raises(TypeError, match="needs one"):
        attention(stream[None].repeat(1, 1, 3), 2, scale=scale)
    with pytest.raises(TypeError, match="scale has dtype"):
        attention(stream[None].repeat(1, 1, 3), 2, scale=scale.double(), dtype=E4M3)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 1\)"):
        attention(stream[None].repeat(1, 1, 3), 2, scale=scale[None], dtype=E4M3)
    with pytest.raises(ValueError, match="for 5 heads"):
        attention(draw(1, 4, 24), 5)
    with pytest.raises(ValueError, match=r"out has shape \(1, 4, 9\)"):
        attention(draw(1, 4, 24), 2, out=draw(1, 4, 9))
    with pytest.raises(TypeError, match="out has dtype"):
        attention_rows(draw(1, 4, 8), draw(1, 4, 16), 2, out=draw(1, 4, 8).half())
    with pytest.raises(ValueError, match="kv has shape"):
        attention_rows(draw(1, 4, 8), draw(1, 0, 16), 2)
    with pytest.raises(TypeError, match="they must be alike"):
        attention_rows(draw(1, 4, 8), draw(1, 4, 16).half(), 2)
    with pytest.raises(ValueError, match="must be finite"):
        quantise_e4m3(stream / 0)


@pytest.mark.gpu
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(12, 64), (16, 80)])
@pytest.mark.parametrize(("groups", "length"), [(2, 320), (16, 320), (128, 320), (2, 300), (3, 1088)])
def test_paper_sizes(triton_backend, groups, length, heads, dim, output) -> None:
    check_attention(groups, length, heads, dim, torch.bfloat16, output)
    check_rows(groups, length, 3, heads, dim, torch.bfloat16)
    check_rows(groups, length, length - 1, heads, dim, torch.bfloat16)


@pytest.mark.gpu
def test_dependent_launches_in_a_graph(triton_backend) -> None:
    """A chain in which each kernel reads what the one before has written, launched before that has ended."""
    heads, width = 12, 768
    weight, bias = draw(width).bfloat16(), draw(width).bfloat16()
    start = draw(2, 320, width) * 2

    def chain(dependent: bool) -> torch.Tensor:
        stream = start.clone()
        branches: list = []
        for _ in range(8):
            options = {"out_stream": stream if branches else None, "dtype": torch.bfloat16, "dependent": dependent}
            normed = residual_norm(stream, branches, weight, bias, **options)
            qkv = normed.repeat(1, 1, 3)
            branch = attention(qkv, heads, dependent=dependent)
            query, kv = qkv[..., :width].contiguous(), qkv[..., width:].contiguous()
            branches = [(branch, None), (attention_rows(query, kv, heads, dependent=dependent), bias)]
        return residual_norm(stream, branches, weight, bias, dependent=dependent)

    expected = chain(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, expected)


@given(
    st.integers(0, 3), st.integers(1, 150), st.integers(1, 3), st.sampled_from([1, 8, 24, 64, 72, 128]),
    st.sampled_from(DTYPES), st.sampled_from([1e-3, 1.0, 6.0]), st.data(),
)  # fmt: skip
@settings(max_examples=150 if DEVICE == "cuda" else 25)
def test_attention_to_a_cache(groups, length, heads, dim, dtype, spread, data) -> None:
    """What the cache holds behind the new row is not read; before it nothing is written."""
    place, width = data.draw(st.integers(0, length - 1)), heads * dim
    torch.manual_seed(place)
    qkv, whole = (draw(groups, 3 * width) * spread).to(dtype), (draw(2, groups, length, width) * spread).to(dtype)
    cache = whole.clone()
    cache[:, :, place:] = float("nan")
    found = {}
    for backend in ("triton", "eager"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
            kept = cache.clone()
            out = torch.full((groups, width), float("nan"), device=DEVICE, dtype=dtype)
            assert attention_cached(qkv, kept, torch.tensor([place], device=DEVICE), heads, out=out) is out
            found[backend] = out
        assert torch.equal(kept[:, :, :place], whole[:, :, :place])
        assert torch.equal(kept[0, :, place], qkv[:, width : 2 * width])
        assert torch.equal(kept[1, :, place], qkv[:, 2 * width :])
    seen = kept[:, :, : place + 1]
    kv, query = torch.cat([seen[0], seen[1]], -1), qkv[:, None, :width]
    exact, eager = exact_attention(query, kv, heads)[:, 0], eager_attention(query, kv, heads)[:, 0]
    close("out", found["triton"], eager, exact)
    # A mask makes PyTorch take another kernel of its own, whose sums have another order.
    assert_close_to_eager("reference", found["eager"], eager, exact, ulps=8)


def test_what_does_not_fit_a_cache_is_named() -> None:
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    given_ = {"qkv": draw(2, 24), "cache": draw(2, 2, 5, 8), "place": place}
    for name, value, error, match in (
        ("qkv", draw(2, 25), ValueError, r"qkv has shape \(2, 25\)"),
        ("cache", draw(2, 3, 5, 8), ValueError, r"cache has shape \(2, 3, 5, 8\); it must be \[2, 2, N, 8\]"),
        ("cache", draw(2, 2, 0, 8), ValueError, "N at least 1"),
        ("cache", draw(2, 5, 2, 8).transpose(1, 2), ValueError, "cache has strides"),
        ("cache", draw(2, 2, 5, 8).half(), TypeError, "cache has dtype torch.float16"),
        ("place", place.int(), TypeError, "place is torch.int32"),
        ("place", place.repeat(2), TypeError, r"place is torch.int64 \(2,\)"),
    ):
        with pytest.raises(error, match=match):
            attention_cached(**{**given_, name: value}, heads=2)
