"""The shared noise pool: who shares with whom, and that each row's loss and gradient stay unbiased."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_kernels import energy_loss
from ear_kernels.noise_pool import pool_arrangement
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_generator_whole import make


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 500))
def test_arrangement(tokens: int, samples: int, pool: int) -> None:
    pool = max(pool, samples)
    arrangement = pool_arrangement(tokens, samples, pool, torch.device("cpu"))
    group, vectors = arrangement.group, samples * arrangement.per_sample
    assert vectors <= pool + samples
    assert arrangement.index.shape == (vectors * group,)
    inverse = arrangement.inverse.view(tokens, samples)
    assert inverse.unique().numel() == tokens * samples, "two samples have one row"
    assert torch.equal(arrangement.index[inverse], torch.arange(tokens)[:, None].expand(-1, samples).int())
    used = inverse // group
    assert (used // arrangement.per_sample == torch.arange(samples)).all(), "samples of one token share a vector"
    assert used.unique(return_counts=True)[1].max() <= group


def test_tokens_that_share_one_vector_do_not_share_the_next() -> None:
    arrangement = pool_arrangement(400, 4, 400, torch.device("cpu"))
    used = (arrangement.inverse // arrangement.group).view(400, 4)
    for a, b in ((0, 1), (1, 2), (0, 3)):
        pairs = used[:, a] * 10_000 + used[:, b]
        assert pairs.unique().numel() == 400


@pytest.mark.parametrize("pool", [1, 2.0, True])
def test_wrong_pools(pool) -> None:
    with pytest.raises((TypeError, ValueError), match="noise_pool"):
        make(8, 1, 0)(torch.randn(3, 24, device=DEVICE), torch.rand(3, 2, 16, device=DEVICE), noise_pool=pool)


def test_needs_the_sample_dimension() -> None:
    with pytest.raises(ValueError, match="'n'"):
        make(8, 1, 0)(torch.randn(3, 24, device=DEVICE), torch.rand(3, 16, device=DEVICE), noise_pool=3)


def test_a_pool_of_all_rows_is_the_independent_draw() -> None:
    generator = make(16, 2, 0)
    z, noise = torch.randn(6, 24, device=DEVICE), torch.rand(6, 2, 16, device=DEVICE)
    torch.testing.assert_close(generator(z, noise, noise_pool=12), generator(z, noise), atol=1e-5, rtol=1e-5)


def test_each_rows_loss_and_gradient_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over 500 draws, pool against independent: every row's loss and a gradient, by their standard
    errors.

    With 24 rows' losses, one gradient's 64 numbers and normal errors, a largest z-score of 4.5 has a chance
    of about 1 in 1,700 to be exceeded by accident; the seed is fixed.
    """
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    generator = make(8, 2, 3).double()
    draws, tokens = 500, 24
    torch.manual_seed(5)
    z = torch.randn(tokens, 24, device=DEVICE, dtype=torch.float64)
    target = torch.randn(tokens, 8, device=DEVICE, dtype=torch.float64)
    weight = generator.res_blocks[0].mlp[0].weight
    rows: dict[int | None, list[torch.Tensor]] = {None: [], 12: []}
    for pool, found in rows.items():
        for _ in range(draws):
            noise = torch.rand(tokens, 2, 16, device=DEVICE, dtype=torch.float64) - 0.5
            loss = energy_loss(generator(z, noise, noise_pool=pool), target, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), weight)
            found.append(torch.cat([loss.detach(), gradient.flatten()]))
    independent, shared = (torch.stack(found) for found in rows.values())
    error = (independent.var(0) / draws + shared.var(0) / draws).sqrt()
    z_score = (independent.mean(0) - shared.mean(0)).abs() / error
    assert z_score.max() < 4.5
    # And the price: the summed gradient's variance grows, by at most the rows that share a vector.
    ratio = (shared.var(0)[tokens:].sum() / independent.var(0)[tokens:].sum()).item()
    assert 1.0 < ratio < 4 * 1.5
