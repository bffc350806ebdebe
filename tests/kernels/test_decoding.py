"""The small parts of a decoding step: kernels against the reference, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_kernels import functional
from tests.kernels.generator_fixtures import DEVICE, DTYPES


def step(images: int, guided: bool, width: int, size: int, count: int, left: int, dtype: torch.dtype) -> list:
    """All tensors that a step of random values writes, in order."""
    tokens, prefix, groups = 11, 3, 2 if guided else 1
    generator = torch.Generator().manual_seed(width * size * count)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    stream = new(groups * images, prefix + tokens, width)
    orders = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(images)]).to(DEVICE)
    remaining = torch.tensor([left], device=DEVICE)
    norm = new(width), new(width)
    rows, gathered, normed = functional.predicted_rows(stream, orders, remaining, count, *norm, dtype=dtype)
    scales = new(tokens + 1) if guided else None
    branch = new(len(rows), width, dtype=dtype)
    hidden = functional.guided_norm(branch, new(width), gathered, *norm, scales, remaining, count)
    kept, start = torch.zeros(images, tokens, size, device=DEVICE), new(*stream.shape)
    embed = new(width, size, dtype=dtype), new(width, dtype=dtype)
    after = functional.write_tokens(
        new(images * count, size), kept, start, rows, embed, new(prefix + tokens, width), (*norm, 1e-6)
    )
    target = new(*stream.shape[:2], 3 * width, dtype=dtype)
    functional.write_rows(new(images * count, 3 * width, dtype=dtype), target, rows, remaining, count)
    return [rows, gathered, normed, hidden, kept, start, after, target, remaining]


@given(
    st.integers(1, 4), st.booleans(), st.sampled_from([8, 48, 100]), st.sampled_from([1, 4, 16, 37]),
    st.integers(1, 11), st.sampled_from(DTYPES), st.data(),
)  # fmt: skip
def test_kernels_do_what_the_reference_does(images, guided, width, size, count, dtype, data) -> None:
    left = data.draw(st.integers(count, 11))
    results = {}
    for backend in ("triton", "eager"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EAR_KERNELS_BACKEND", backend)
            results[backend] = step(images, guided, width, size, count, left, dtype)
    assert results["triton"][-1].item() == left - count
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for ours, expected in zip(results["triton"], results["eager"], strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_what_does_not_fit_is_named() -> None:
    stream, left = torch.randn(4, 14, 8, device=DEVICE), torch.tensor([11], device=DEVICE)
    orders, norm = torch.arange(11, device=DEVICE).repeat(2, 1), (torch.ones(8, device=DEVICE),) * 2
    for wrong in ((orders[:1], 1), (orders, 12), (orders, 0)):
        with pytest.raises(ValueError, match=r"do not fit"):
            functional.predicted_rows(stream, wrong[0], left, wrong[1], *norm)
    with pytest.raises(TypeError, match=r"orders has dtype torch.int32"):
        functional.predicted_rows(stream, orders.int(), left, 1, *norm)
    rows = torch.randn(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"branch has shape \(2, 8\)"):
        functional.guided_norm(rows[:2], norm[0], rows, *norm, None, left, 1)
    with pytest.raises(TypeError, match=r"values have dtype torch.float16"):
        functional.write_rows(rows.half(), stream, torch.arange(3, device=DEVICE), left, 1)
