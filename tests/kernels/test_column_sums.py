"""Column sums against float64 and torch's own sum, one stage and two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels.runtime import column_sums as launchers
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES

SHAPES = [(1, 1), (5, 3), (528, 70), (600, 3, 24), (launchers.SPLIT_ROWS + 1, 5), (9000, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sums(poisoned_empty, dtype, shape) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    ours, exact = column_sums(x), x.double().sum(0)
    assert_close_to_eager("sums", ours, x.sum(0, dtype=torch.float32), exact, shape[0] ** 0.5, ulps=4)
    assert torch.equal(ours, column_sums(x))
    assert torch.equal(column_sums(x, dtype), ours.to(dtype))


@given(st.integers(0, 3000), st.integers(0, 200), st.booleans())
@settings(max_examples=100 if DEVICE == "cuda" else 15)
def test_any_size_and_row_stride(rows, width, strided) -> None:
    x = torch.randn(rows, 2 * width if strided else width, device=DEVICE)[:, :width]
    ours = column_sums(x)
    assert_close_to_eager("sums", ours, x.sum(0), x.double().sum(0), max(2, rows) ** 0.5, ulps=4)


def test_columns_that_are_not_dense() -> None:
    x = torch.randn(40, 7, device=DEVICE)
    assert torch.equal(column_sums(x.t()), column_sums(x.t().contiguous()))
    # Not to the bit: a row stride of 0 lets the compiler load, and so add, in another order.
    torch.testing.assert_close(column_sums(x[:1].expand(50, -1)), column_sums(x[:1].repeat(50, 1)))


def test_the_paper_shapes_fill_a_gpu() -> None:
    """Enough programs for 132 SMs over the partials of EAR-B's kernels."""
    for width in (2304, 3072, 6144):
        rows, columns = launchers.tile_of(width, 4)
        assert rows * columns == launchers.TILE
        assert width // columns >= 132
