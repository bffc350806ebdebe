"""The V-statistic, one sample, members that are left out, and derivatives in forward mode."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ear_kernels import FusedEnergyLoss, GaussianTarget, energy_loss, energy_score
from ear_kernels.testing import assert_close_to_eager

BACKENDS = ("eager", "triton")


def v_statistic(samples: Tensor, target: Tensor, alpha: float, tau: float) -> Tensor:
    """The formula, a pair at a time: samples ``[R, n, D]``, target ``[R, m, D]``; mean over rows."""
    rows = []
    for x, y in zip(samples, target, strict=True):
        n, m = len(x), len(y)
        fidelity = sum(torch.dist(x[i], y[k]) ** alpha for i in range(n) for k in range(m)) / (n * m)
        diversity = sum(torch.dist(x[i], x[j]) ** alpha for i in range(n) for j in range(n) if i != j) / n**2
        rows.append(2 * fidelity - tau * diversity)
    return torch.stack(rows).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("m", "features"), [(1, 1), (2, 7), (3, 5000)])
@pytest.mark.parametrize("alpha", [1.0, 1.4])
def test_without_fair_the_mean_is_over_all_pairs(monkeypatch, device, backend, n, m, features, alpha) -> None:
    """n = 1 among them: |x - y|, twice, and its gradient; in one program and over a field."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    samples, target = torch.randn(3, n, features, device=device), torch.randn(3, m, features, device=device)
    options = {"alpha": alpha, "tau": 0.7}
    results = []
    for dtype, function in (
        (torch.float32, energy_loss), (torch.float32, v_statistic), (torch.float64, v_statistic),
    ):  # fmt: skip
        x, y = (tensor.detach().to(dtype).requires_grad_() for tensor in (samples, target))
        extra = {"fair": False} if function is energy_loss else {}
        loss = function(x, y, **options, **extra)
        loss.backward()
        results.append((loss.detach(), x.grad, y.grad))
    for name, ours, eager, exact in zip(("loss", "samples", "target"), *results, strict=True):
        assert_close_to_eager(name, ours, eager, exact)


def test_one_sample_of_gaussian_targets(monkeypatch, device) -> None:
    """E|x - y| of one sample and a standard normal is sqrt(2 / pi) at x = 0."""
    for backend in BACKENDS:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        zeros = torch.zeros(100, 1, device=device)
        samples = torch.zeros(100, 1, 1, device=device, requires_grad=True)
        loss = energy_loss(samples, GaussianTarget(zeros, zeros, 40), fair=False)
        loss.backward()
        # 4,000 draws: six standard deviations of the mean of |y|, 0.6 each, and of the sign.
        assert loss.item() == pytest.approx(2 * math.sqrt(2 / math.pi), abs=2 * 6 * 0.61 / 4000**0.5)
        assert abs(samples.grad.sum().item()) < 2 * 6 / 4000**0.5


def test_score_and_module_take_fair() -> None:
    samples, target = torch.randn(4, 1, 3), torch.randn(4, 3)
    distance = torch.linalg.vector_norm(samples[:, 0] - target, dim=-1).mean()
    torch.testing.assert_close(energy_score(samples, target, fair=False), distance)
    torch.testing.assert_close(FusedEnergyLoss(fair=False)(samples, target), 2 * distance)
    assert repr(FusedEnergyLoss(fair=False)).endswith("fair=False)")
    with pytest.raises(ValueError, match=r"at least 2, or fair=False, which defines it for 1"):
        energy_loss(samples, target)
    with pytest.raises(ValueError, match=r"0 sample\(s\).*at least 1"):
        energy_loss(samples[:, :0], target, fair=False)
    with pytest.raises(TypeError, match=r"fair is 0 \(int\); it must be True or False"):
        energy_loss(samples, target, fair=0)


def test_a_sample_with_itself_has_no_distance_even_smoothed() -> None:
    samples, target = torch.randn(4, 3, 5), torch.randn(4, 5)
    options = {"eps": 0.3, "alpha": 1.2}
    torch.testing.assert_close(
        energy_loss(samples, target, fair=False, tau=0.9, **options),
        energy_loss(samples, target, tau=0.9 * 2 / 3, **options),
    )


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_left_out_members_are_not_there(fair, reduction, eps) -> None:
    """Each row is that of its members alone, gradients too; a row of too few counts as masked."""
    rows, n, m, features = 7, 5, 2, 3
    samples, target = torch.randn(rows, n, features).double(), torch.randn(rows, m, features).double()
    members = torch.rand(rows, n) < 0.6
    members[0], members[1], members[2] = False, True, torch.arange(n) == 3
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1])
    weights = torch.rand(rows).double() + 0.1
    options = {"alpha": 1.3, "tau": 0.8, "eps": eps, "fair": fair}
    kept, total = [], 0.0
    x = samples.clone().requires_grad_()
    for row in range(rows):
        enough = bool(mask[row]) and int(members[row].sum()) >= (2 if fair else 1)
        loss = energy_loss(x[row, members[row]], target[row], **options) if enough else x.new_zeros(())
        kept.append(weights[row] * loss)
        total += weights[row].item() * enough
    expected = torch.stack(kept)
    if reduction != "none":
        expected = expected.sum() / (total if reduction == "mean" else 1.0)
    expected.sum().backward()
    given = samples.masked_fill(~members.unsqueeze(-1), math.nan).requires_grad_()
    found = energy_loss(given, target, mask, weights=weights, member_mask=members, reduction=reduction, **options)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(given.grad, x.grad)
    assert not given.grad[~members].any()


def test_members_lie_along_sample_dim_and_broadcast() -> None:
    samples, target = torch.randn(4, 6, 3), torch.randn(6, 3)
    samples[1, 2:4] = math.nan
    members = ~samples.isnan().any(-1)  # [n, rows], as the samples lie
    expected = energy_loss(samples.movedim(0, -2), target, member_mask=members.t())
    assert expected.isfinite()
    torch.testing.assert_close(energy_loss(samples, target, sample_dim=0, member_mask=members), expected)
    torch.testing.assert_close(FusedEnergyLoss(sample_dim=0)(samples, target, member_mask=members), expected)
    torch.testing.assert_close(
        energy_score(samples, target, sample_dim=0, member_mask=members.float()), 0.5 * expected
    )
    without_second = torch.tensor([1, 0, 1, 1]).unsqueeze(1)
    torch.testing.assert_close(
        energy_loss(samples, target, sample_dim=0, member_mask=without_second),
        energy_loss(samples[[0, 2, 3]], target, sample_dim=0),
    )
    with pytest.raises(ValueError, match=r"member_mask has shape \(6, 4\); it must broadcast to the samples without"):
        energy_loss(samples, target, sample_dim=0, member_mask=members.t())


def test_nothing_left_is_zero() -> None:
    samples = torch.full((3, 2, 4), math.nan, requires_grad=True)
    loss = energy_loss(samples, torch.randn(3, 4), member_mask=torch.zeros(3, 2))
    loss.backward()
    assert loss.item() == 0
    assert not samples.grad.any()


def test_member_mask_takes_the_reference_and_compiles(monkeypatch, device) -> None:
    samples, target = torch.randn(3, 4, 2, device=device), torch.randn(3, 2, device=device)
    members = torch.ones(3, 4, dtype=torch.bool, device=device)
    expected = energy_loss(samples, target)
    torch.testing.assert_close(energy_loss(samples, target, member_mask=members), expected)
    compiled = torch.compile(energy_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(samples, target, member_mask=members), expected)
    zeros = torch.zeros_like(target)
    assert energy_loss(samples, GaussianTarget(target, zeros, 3), member_mask=members).isfinite()
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    with pytest.raises(NotImplementedError, match="member_mask, which needs the reference"):
        energy_loss(samples, target, member_mask=members)


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 1.3}, {"alpha": 0.5, "eps": 0.1}, {"alpha": 2.0, "reduction": "sum"}, {"fair": False, "masks": 1}],
    ids=str,
)
def test_forward_mode_agrees_with_backward(options) -> None:
    """jvp, dual numbers, and the Hessian as forward over reverse and forward over forward."""
    options = dict(options)
    samples, target = torch.randn(3, 4, 2).double(), torch.randn(3, 2, 2).double()
    if options.pop("masks", None):
        options |= {"mask": torch.tensor([1, 0, 1]), "member_mask": torch.rand(3, 4) < 0.8}
    tangent = torch.randn_like(samples)

    def loss(x: Tensor) -> Tensor:
        return energy_loss(x, target, **options)

    along = (torch.func.grad(loss)(samples) * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (samples,), (tangent,))[1], along)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(samples, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)
    expected = torch.autograd.functional.hessian(loss, samples)
    torch.testing.assert_close(torch.func.hessian(loss)(samples), expected)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(samples), expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_forward_mode_at_coincident_points_is_zero(alpha) -> None:
    points = torch.zeros(2, 3, 4)
    value, slope = torch.func.jvp(
        lambda x: energy_loss(x, points[:, 0], alpha=alpha), (points,), (torch.randn(2, 3, 4),)
    )
    assert value == 0
    assert slope == 0


def test_the_kernels_refuse_forward_mode_by_name(monkeypatch, device) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    samples, target = torch.randn(3, 4, 2, device=device), torch.randn(3, 2, device=device)
    with (
        forward_ad.dual_level(),
        pytest.raises(
            NotImplementedError, match=r"forward-mode AD, which needs the reference; use EAR_KERNELS_BACKEND"
        ),
    ):
        energy_loss(forward_ad.make_dual(samples, samples), target)
