"""The reference energy loss against a literal float64 double loop, finite differences and its promises."""

import pytest
import torch
from hypothesis import given, settings

from ear_kernels import FusedEnergyLoss, energy_loss
from tests.kernels.literal import literal_energy_loss
from tests.strategies import EnergyLossCase, energy_loss_cases

EXAMPLES = settings(max_examples=60, deadline=None)


def _run(case: EnergyLossCase, samples, target):
    return energy_loss(
        samples, target, case.mask, weights=case.weights, feature_weights=case.feature_weights, **case.options
    )


@EXAMPLES
@given(energy_loss_cases())
def test_values_and_gradients_match_the_double_loop(case):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.samples, case.target)]
    literal_inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.samples, case.target)]
    loss = _run(case, *inputs)
    expected = literal_energy_loss(*literal_inputs, case.mask, case.weights, case.feature_weights, **case.options)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    incoming = torch.randn_like(loss)
    gradients = torch.autograd.grad(loss, inputs, incoming)
    # With every row masked the literal loss is a constant.
    expected_gradients = (
        torch.autograd.grad(expected, literal_inputs, incoming, allow_unused=True)
        if expected.requires_grad
        else (None, None)
    )
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        reference = torch.zeros_like(gradient) if reference is None else reference.nan_to_num(nan=0.0)
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(energy_loss_cases(smooth=True))
def test_gradients_match_finite_differences(case):
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (case.samples, case.target))
    assert torch.autograd.gradcheck(lambda *tensors: _run(case, *tensors), inputs, eps=1e-7, atol=1e-5, rtol=1e-3)


def test_second_derivatives_match_finite_differences():
    inputs = tuple(torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x, y: energy_loss(x, y, alpha=1.3), inputs)


def test_two_samples_and_one_target_are_equation_10():
    x1, x2, y = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    for alpha, tau in ((1.0, 1.0), (0.7, 0.99), (2.0, 0.5)):

        def power(v, alpha=alpha):
            return v.norm(dim=-1) ** alpha

        expected = (power(x1 - y) + power(x2 - y) - tau * power(x1 - x2)).mean()
        actual = energy_loss(torch.stack([x1, x2], dim=-2), y, alpha=alpha, tau=tau)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("alpha", [0.05, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_coincident_points_have_zero_gradient(alpha, dtype):
    """Step 0 of training: the last linear is zero, so all samples are one point; here the target is too."""
    samples = torch.zeros(4, 3, 5, dtype=dtype, requires_grad=True)
    target = torch.zeros(4, 5, dtype=dtype)
    loss = energy_loss(samples, target, alpha=alpha)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(samples.grad, torch.zeros_like(samples))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [1e25, 1e-25, 3e37, 1e-37])
def test_huge_and_tiny_differences(alpha, size):
    """Squares of these overflow or underflow in float32; norms and gradients that float32 can hold must be right."""
    samples = (torch.randn(8, 3, 6) * size).requires_grad_()
    target = torch.randn(8, 6) * size
    exact_samples = samples.detach().double().requires_grad_()
    loss = energy_loss(samples, target, alpha=alpha, reduction="none")
    exact = energy_loss(exact_samples, target.double(), alpha=alpha, reduction="none")
    holds = torch.finfo(torch.float32)
    if holds.tiny * 10 < exact.abs().min() and (2 * (3 * size * 3) ** alpha) < holds.max:
        torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), samples)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_samples)
    largest = exact_gradient.abs().max()
    if largest < holds.max / 10:
        torch.testing.assert_close(gradient.double() / largest, exact_gradient / largest, rtol=0, atol=2e-6)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_subtracted_in_float32_under_autocast(dtype):
    """Against float64 on the same halves; the same formula in halves is off by far more than the tolerance."""
    samples, target = torch.randn(50, 2, 64).to(dtype), torch.randn(50, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = energy_loss(samples, target, tau=0.5, reduction="none")
    exact = energy_loss(samples.double(), target.double(), tau=0.5, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)

    def half_norm(v):
        return (v * v).sum(dim=-1).sqrt()

    x1, x2 = samples.unbind(dim=1)
    in_halves = half_norm(x1 - target) + half_norm(x2 - target) - 0.5 * half_norm(x1 - x2)
    assert (in_halves.double() / exact - 1).abs().max() > 1e-4


def test_half_gradients_come_back_in_half():
    samples = torch.randn(5, 2, 4).half().requires_grad_()
    energy_loss(samples, torch.randn(5, 4)).backward()
    assert samples.grad.dtype == torch.float16
    assert samples.grad.abs().max() > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_masked_rows_are_inert(poison, reduction, eps):
    mask = torch.tensor([True, False, True, False])
    samples, target = torch.randn(4, 3, 5), torch.randn(4, 5)
    poisoned, poisoned_target = samples.clone(), target.clone()
    poisoned[~mask], poisoned_target[~mask] = poison, poison
    weights = torch.rand(4)
    poisoned_weights = weights.clone()
    poisoned_weights[~mask] = poison
    poisoned.requires_grad_()
    loss = energy_loss(poisoned, poisoned_target, mask, weights=poisoned_weights, reduction=reduction, eps=eps)
    expected = energy_loss(samples[mask], target[mask], weights=weights[mask], reduction=reduction, eps=eps)
    if reduction == "none":
        assert torch.equal(loss[~mask], torch.zeros(2))
        loss_kept = loss[mask]
    else:
        loss_kept = loss
    torch.testing.assert_close(loss_kept, expected)
    loss.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert torch.equal(poisoned.grad[~mask], torch.zeros(2, 3, 5))


def test_all_masked_is_zero_without_nan():
    samples = torch.full((3, 2, 4), float("nan"), requires_grad=True)
    loss = energy_loss(samples, torch.full((3, 4), float("nan")), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(samples.grad, torch.zeros_like(samples))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    samples = torch.empty(0, 2, 4, requires_grad=True)
    loss = energy_loss(samples, torch.empty(0, 4), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert samples.grad.shape == samples.shape


def test_one_row_without_leading_dimensions():
    samples, target = torch.randn(2, 3), torch.randn(3)
    expected = (samples[0] - target).norm() + (samples[1] - target).norm() - (samples[0] - samples[1]).norm()
    torch.testing.assert_close(energy_loss(samples, target), expected)


@pytest.mark.parametrize("sample_dim", [0, 1, -2])
def test_the_sample_dimension_may_be_anywhere(sample_dim):
    samples, target = torch.randn(4, 5, 3, 6), torch.randn(4, 5, 2, 6)
    moved = samples.movedim(-2, sample_dim)
    assert not (sample_dim == 0 and moved.is_contiguous())
    torch.testing.assert_close(
        energy_loss(moved, target, sample_dim=sample_dim), energy_loss(samples, target), rtol=0, atol=0
    )
    target_first = target.movedim(-2, 0)
    torch.testing.assert_close(energy_loss(samples, target_first, target_dim=0), energy_loss(samples, target))


def test_expanded_incoming_gradient():
    samples = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64)
    (summed,) = torch.autograd.grad(energy_loss(samples, target, reduction="none").sum(), samples)
    (direct,) = torch.autograd.grad(energy_loss(samples, target, reduction="sum"), samples)
    torch.testing.assert_close(summed, direct)


def test_eps_keeps_gradients_bounded_below_alpha_1():
    samples = (torch.randn(4, 3, 5) * 1e-20).requires_grad_()
    energy_loss(samples, torch.zeros(4, 5), alpha=0.25, eps=1e-3).backward()
    assert samples.grad.abs().max() < 1


def test_compiles_as_one_graph_and_under_func_grad():
    samples, target = torch.randn(4, 3, 5), torch.randn(4, 5)
    compiled = torch.compile(energy_loss, backend="aot_eager", fullgraph=True)
    inputs = [samples.clone().requires_grad_() for _ in range(2)]
    compiled(inputs[0], target).backward()
    energy_loss(inputs[1], target).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(torch.func.grad(lambda x: energy_loss(x, target))(samples), inputs[1].grad)


def test_module_is_the_function():
    samples, target, mask = torch.randn(4, 3, 5), torch.randn(4, 5), torch.tensor([1, 0, 1, 1])
    module = FusedEnergyLoss(0.8, 0.9, 1, "sum", feature_weights=torch.ones(5))
    expected = energy_loss(samples, target, mask, alpha=0.8, tau=0.9, reduction="sum")
    torch.testing.assert_close(module(samples, target, mask), expected)
    first = FusedEnergyLoss(sample_dim=0)(samples.movedim(1, 0), target)
    torch.testing.assert_close(first, energy_loss(samples, target))
    assert module.state_dict() == {}


SAMPLES, TARGET = torch.randn(4, 3, 5), torch.randn(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((SAMPLES, TARGET), {"alpha": 0}, ValueError, "alpha is 0"),
        ((SAMPLES, TARGET), {"alpha": 2.01}, ValueError, "alpha is 2.01"),
        ((SAMPLES, TARGET), {"alpha": float("nan")}, ValueError, "alpha is nan"),
        ((SAMPLES, TARGET), {"alpha": "1"}, TypeError, "alpha is '1'"),
        ((SAMPLES, TARGET), {"tau": 0.0}, ValueError, "tau is 0.0"),
        ((SAMPLES, TARGET), {"tau": 1.5}, ValueError, "tau is 1.5"),
        ((SAMPLES, TARGET), {"eps": -1.0}, ValueError, "eps is -1.0"),
        ((SAMPLES, TARGET), {"reduction": "avg"}, ValueError, "'avg'"),
        ((SAMPLES[:, :1], TARGET), {}, ValueError, "at least 2"),
        ((SAMPLES, TARGET), {"sample_dim": -1}, ValueError, "before the last"),
        ((SAMPLES, TARGET), {"sample_dim": 3}, ValueError, "sample_dim is 3"),
        ((SAMPLES, TARGET[:3]), {}, ValueError, "(3, 5)"),
        ((SAMPLES, TARGET[:, :4]), {}, ValueError, "(4, 4)"),
        ((SAMPLES, torch.randn(4, 0, 5)), {}, ValueError, "(4, 0, 5)"),
        ((SAMPLES, TARGET[0]), {}, ValueError, "(5,)"),
        ((SAMPLES[0, 0], TARGET), {}, ValueError, "[..., n, D]"),
        ((SAMPLES, TARGET, torch.ones(3)), {}, ValueError, "mask has shape (3,)"),
        ((SAMPLES, TARGET), {"weights": torch.ones(2, 4)}, ValueError, "weights has shape (2, 4)"),
        ((SAMPLES, TARGET), {"feature_weights": torch.ones(4)}, ValueError, "(4,)"),
        ((SAMPLES.long(), TARGET), {}, TypeError, "torch.int64"),
        ((SAMPLES, TARGET.int()), {}, TypeError, "torch.int32"),
        ((SAMPLES, None), {}, TypeError, "NoneType"),
        ((SAMPLES, TARGET.to("meta")), {}, ValueError, "meta"),
    ],
)
def test_bad_input_is_named(arguments, options, error, named):
    with pytest.raises(error) as caught:
        energy_loss(*arguments, **options)
    assert named in str(caught.value)


def test_the_module_refuses_bad_options_at_once():
    with pytest.raises(ValueError, match="alpha is 3"):
        FusedEnergyLoss(alpha=3)
