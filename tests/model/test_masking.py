"""Orders, mask ratios and the unmasking schedule."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_model.model import masking

# Computed by hand: (tokens masked before, after) each step.
# L=16, N=4: floor(16 cos(22.5deg)) = floor(14.78), floor(16 cos 45deg) = floor(11.31), floor(16 cos 67.5deg) =
# floor(6.12), then all that is left.
# L=4, N=8: cos(11.25deg) = .98 -> floor 3.92 = 3; cos 22.5 = .92 -> 3.69 = 3 but at most left-1 = 2; cos 33.75 = .83
# -> 3 but at most 1; from then on max(1, min(0, .)) = 1 until the last step takes it.
# L=256, N=1: everything at once.
HAND_COMPUTED = {
    (16, 4): [(16, 14), (14, 11), (11, 6), (6, 0)],
    (4, 8): [(4, 3), (3, 2), (2, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 0)],
    (256, 1): [(256, 0)],
    (3, 2): [(3, 2), (2, 0)],
    (1, 3): [(1, 1), (1, 1), (1, 0)],
}


@pytest.mark.parametrize(("num_tokens", "steps"), HAND_COMPUTED)
def test_schedule_is_the_table(num_tokens, steps):
    assert masking.unmasking_schedule(num_tokens, steps) == HAND_COMPUTED[num_tokens, steps]


def test_the_paper_schedule_begins_slowly():
    """256 tokens, 64 steps: floor(256 cos(pi/128)) = 255, floor(256 cos(2 pi/128)) = 254 (255.69, 254.77)."""
    schedule = masking.unmasking_schedule(256, 64)
    assert schedule[:3] == [(256, 255), (255, 254), (254, 253)]
    assert schedule[-1] == (schedule[-2][1], 0)


@given(st.integers(1, 400), st.integers(1, 500))
def test_every_token_is_predicted_once(num_tokens, steps):
    schedule = masking.unmasking_schedule(num_tokens, steps)
    assert len(schedule) == steps
    assert schedule[0][0] == num_tokens
    assert schedule[-1][1] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(schedule))
    assert sum(left - keep for left, keep in schedule) == num_tokens
    assert all(left >= keep for left, keep in schedule)


def test_orders_are_uniform_permutations():
    orders = masking.random_orders(6000, 3, torch.device("cpu"))
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount(orders @ torch.tensor([9, 3, 1]), minlength=27)
    assert (counts > 0).sum() == 6
    # 1000 each, standard deviation 29; five of them
    assert (counts[counts > 0] - 1000).abs().max() < 145


def test_mask_ratio_is_the_truncated_normal():
    """Median, ends and mean (0.867) of a normal(1, 0.25) truncated to [0.7, 1]."""
    normal = NormalDist(1.0, 0.25)
    assert masking.mask_ratio(0.0, 0.7) == pytest.approx(0.7)
    assert masking.mask_ratio(1.0, 0.7) == pytest.approx(1.0)
    middle = masking.mask_ratio(0.5, 0.7)
    assert normal.cdf(middle) - normal.cdf(0.7) == pytest.approx(normal.cdf(1.0) - normal.cdf(middle))
    mean = sum(masking.mask_ratio((i + 0.5) / 20000, 0.7) for i in range(20000)) / 20000
    assert mean == pytest.approx(0.867, abs=5e-4)


def test_number_of_masked_tokens():
    counts = [masking.draw_num_masked(256, 0.7) for _ in range(500)]
    assert min(counts) >= math.ceil(256 * 0.7)
    assert max(counts) <= 256
    assert len(set(counts)) > 30
    torch.manual_seed(7)
    first = masking.draw_num_masked(256, 0.7)
    torch.manual_seed(7)
    assert masking.draw_num_masked(256, 0.7) == first
    assert masking.draw_num_masked(16, 1.0) == 16


def test_cosine_masks_are_what_decoding_has_left():
    counts = torch.tensor([masking.draw_num_masked(256, 0.7, "cosine") for _ in range(4000)])
    assert (counts.min() >= 1).item()
    assert counts.max() == 256
    assert counts.double().mean() == pytest.approx(256 * 2 / math.pi, rel=0.03)
    left = torch.tensor([left for left, _ in masking.unmasking_schedule(256, 32)])
    for share in (0.25, 0.5, 0.75):
        assert (counts < 256 * share).double().mean() == pytest.approx(
            (left < 256 * share).double().mean().item(), abs=0.04
        )
    assert {masking.draw_num_masked(1, 0.7, "cosine") for _ in range(20)} == {1}


def test_guidance_grows_linearly_or_not_at_all():
    assert masking.guidance_scale(3.0, "constant", 16, 14) == 3.0
    assert masking.guidance_scale(3.0, "linear", 16, 14) == pytest.approx(1 + 2 * 2 / 16)
    # The public code's count of masked tokens never falls below 1.
    assert (
        masking.guidance_scale(3.0, "linear", 16, 0)
        == masking.guidance_scale(3.0, "linear", 16, 1)
        == 1 + 2 * 15 / 16
    )


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 256])
def test_halton_orders_are_permutations_that_spread(num_tokens):
    orders = masking.halton_orders(200, num_tokens, torch.device("cpu"))
    assert torch.equal(orders.sort(-1).values, torch.arange(num_tokens).expand(200, -1))
    if num_tokens < 64:
        return
    side = int(num_tokens**0.5)
    last = orders[:, -num_tokens // 16 :]  # predicted first
    distance = torch.stack([last // side, last % side], -1).double()
    nearest = (torch.cdist(distance, distance) + 1e9 * torch.eye(last.shape[1])).amin(-1).mean()
    random = masking.random_orders(200, num_tokens, torch.device("cpu"))[:, -num_tokens // 16 :]
    apart = torch.stack([random // side, random % side], -1).double()
    assert nearest > 1.1 * (torch.cdist(apart, apart) + 1e9 * torch.eye(last.shape[1])).amin(-1).mean()
    assert len(orders.unique(dim=0)) > min(100, num_tokens)


def test_halton_orders_need_a_square():
    with pytest.raises(ValueError, match="12 tokens are no square grid"):
        masking.halton_orders(1, 12, torch.device("cpu"))
