"""The mixture score: its loss against torch.distributions, and guided samples against the density they are of."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import distributions

from ear_model.config import with_score
from ear_model.scores.mixture import TRIES, Mixture, MixtureScore, envelope, guided
from tests.model.conftest import TINY

ERROR_RATE = 1e-6  # of each statistical test


def make_score(token_dim: int, components: int, dtype=torch.float64) -> MixtureScore:
    config = replace(with_score(TINY, "mixture"), patch_size=1, channels=token_dim, components=components)
    score = MixtureScore(config).to(dtype)
    with torch.no_grad():
        for parameter in score.parameters():
            parameter.normal_()
    return score


def literal(score: MixtureScore, hidden: torch.Tensor) -> distributions.Distribution:
    """The same mixture in torch's words."""
    k, width = score.components, score.token_size
    output = hidden @ score.linear.weight.T + score.linear.bias
    means, raw = output[:, k : k + k * width], output[:, k + k * width :]
    scales = ((raw + (raw.square() + 4).sqrt()) / 2).clamp(min=1e-6)
    shape = (len(hidden), k, width)
    parts = distributions.Independent(distributions.Normal(means.view(shape), scales.view(shape)), 1)
    return distributions.MixtureSameFamily(distributions.Categorical(logits=output[:, :k]), parts)


@pytest.mark.parametrize(("rows", "token_dim", "components"), [(1, 1, 1), (7, 4, 3), (33, 5, 16)])
def test_loss_and_gradients_are_those_of_torch_distributions(rows, token_dim, components):
    score = make_score(token_dim, components)
    hidden = torch.randn(rows, TINY.width, dtype=torch.float64, requires_grad=True)
    targets = 2 * torch.randn(rows, token_dim, dtype=torch.float64)
    parameters = [hidden, *score.parameters()]
    loss = score.loss(hidden, targets)
    expected = -literal(score, hidden).log_prob(targets).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_float32_keeps_small_scales():
    """The square root's form of the scale loses all digits where it is small."""
    score = make_score(3, 4)
    hidden = torch.randn(9, TINY.width, dtype=torch.float64)
    with torch.no_grad():
        score.linear.bias[4 + 4 * 3 :] -= 3000
    means = score.mixture(hidden).means_RkD
    targets = means[:, 0] + 1e-3 * torch.randn(9, 3, dtype=torch.float64)
    exact, scales = score.loss(hidden, targets), score.mixture(hidden).log_scales_RkD
    assert scales.max() < -6
    single = score.float()
    torch.testing.assert_close(single.mixture(hidden.float()).log_scales_RkD.double(), scales, rtol=1e-4, atol=1e-4)
    assert single.loss(hidden.float(), targets.float()).isfinite()
    assert exact.isfinite()


def test_extreme_outputs_stay_finite():
    score = make_score(2, 3, torch.float32)
    with torch.no_grad():
        for parameter in score.parameters():
            parameter *= 1e4
    hidden = torch.randn(20, TINY.width, requires_grad=True)
    loss = score.loss(hidden, torch.randn(20, 2))
    gradients = torch.autograd.grad(loss, [hidden, *score.parameters()])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_components_begin_different():
    score = MixtureScore(with_score(TINY, "mixture"))
    means = score.mixture(torch.randn(1, TINY.width)).means_RkD[0]
    assert torch.pdist(means).min() > 0


def two_mixtures(dims: int, spread: float = 1.0) -> tuple[Mixture, Mixture]:
    """A mixture and a wider one near it, float64, one row: their guided density has finite mass."""
    shape = (1, 3, dims)
    weights, means = torch.randn(1, 3).double(), 1.5 * torch.randn(shape).double()
    scales = 0.2 * torch.randn(shape).double()
    given = Mixture(weights.log_softmax(-1), means, scales - 0.3)
    other = Mixture(
        (weights + torch.randn(1, 3)).log_softmax(-1), means + spread * 0.3 * torch.randn(shape), scales + 0.1
    )
    return given, other


def draw_guided(given: Mixture, null: Mixture, weight: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    many = [Mixture(*(part.expand(count, *part.shape[1:]) for part in each)) for each in (given, null)]
    uniform = torch.rand(2, count, TRIES, dtype=torch.float64)
    normal = torch.randn(count, TRIES, given.means_RkD.shape[-1], dtype=torch.float64)
    return guided(*many, weight, *uniform, normal)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, -0.4, -1.0])
def test_guided_samples_are_of_the_normalised_density_in_one_dimension(weight):
    given, null = two_mixtures(1)
    points, accepted = draw_guided(given, null, weight, 4000)
    grid = torch.linspace(-40, 40, 100_001, dtype=torch.float64)
    at = grid.view(1, -1, 1)
    log_density = (1 + weight) * given.log_density(at)[0] - weight * null.log_density(at)[0]
    cumulative = (log_density - log_density.max()).exp().cumsum(0)
    cumulative = cumulative / cumulative[-1]

    def distribution(values):
        index = torch.searchsorted(grid, torch.as_tensor(values).contiguous()).clamp(max=len(grid) - 1)
        return cumulative[index].numpy()

    # What was not accepted is of another density by a little: too few of them to be seen.
    assert (~accepted).double().mean() < 0.02
    assert stats.kstest(points[accepted, 0].numpy(), distribution).pvalue > ERROR_RATE


@pytest.mark.parametrize("weight", [0.7, 2.0])
def test_guided_samples_are_of_the_normalised_density_in_two_dimensions(weight):
    given, null = two_mixtures(2, spread=0.5)
    points, accepted = draw_guided(given, null, weight, 4000)
    # Cells far smaller than the narrowest density's quantiles are apart, over all points and a fifth beyond.
    low, high = points[accepted].amin(dim=0), points[accepted].amax(dim=0)
    steps = torch.linspace(-0.2, 1.2, 1201, dtype=torch.float64)
    axes = [low[i] + (high[i] - low[i]) * steps for i in (0, 1)]
    cells = torch.cartesian_prod(*axes)
    log_density = (1 + weight) * given.log_density(cells.unsqueeze(0))[0] - weight * null.log_density(
        cells.unsqueeze(0)
    )[0]
    density = (log_density - log_density.max()).exp()
    density = (density / density.sum()).view(1201, 1201)
    # Eight by eight cells at the marginal quantiles.
    edges = [torch.quantile(points[:, i], torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1]) for i in (0, 1)]
    place = [torch.bucketize(axis, edge) for axis, edge in zip(axes, edges, strict=True)]
    expected = torch.zeros(8, 8, dtype=torch.float64).index_put_(
        (place[0].unsqueeze(1), place[1].unsqueeze(0)), density, accumulate=True
    )
    found = torch.bucketize(points[:, 0].contiguous(), edges[0]) * 8 + torch.bucketize(
        points[:, 1].contiguous(), edges[1]
    )
    counts = found[accepted].bincount(minlength=64).double()
    expected = expected.flatten() * counts.sum()
    many = expected >= 5
    observed = torch.cat([counts[many], counts[~many].sum().view(1)])
    wanted = torch.cat([expected[many], expected[~many].sum().view(1)])
    assert (~accepted).double().mean() < 0.05
    kept = wanted > 0
    statistic = ((observed - wanted).square() / wanted)[kept].sum().item()
    assert stats.chi2.sf(statistic, int(kept.sum()) - 1) > ERROR_RATE


@pytest.mark.parametrize("weight", [0.1, 1.0, 3.0, -0.5, -1.0])
@pytest.mark.parametrize("dims", [1, 3])
def test_the_envelope_bounds_the_density(weight, dims):
    given, null = two_mixtures(dims, spread=3.0)
    points = 4 * torch.randn(1, 5000, dims, dtype=torch.float64)
    bound, log_factor = envelope(given, null, weight)
    log_density = (1 + weight) * given.log_density(points) - weight * null.log_density(points)
    assert (log_density - bound.log_density(points) - log_factor).max() < 1e-9


def test_no_finite_mass_gives_finite_points():
    """A class's mixture wider than that of the null class; its samples stay near the class."""
    given, null = two_mixtures(4)
    points, _ = draw_guided(null, given, 4.0, 500)
    assert points.isfinite().all()
    points, _ = draw_guided(null._replace(log_scales_RkD=null.log_scales_RkD + 9), given, 4.0, 50)
    assert points.isfinite().all()


def test_what_is_not_accepted_is_counted():
    score = make_score(4, 8, torch.float32).eval()
    hidden, null = torch.randn(2, 40, TINY.width)
    noise = score.draw_noise(40, like=hidden)
    assert score.sampling_report() == ""
    noise[:, TRIES : 2 * TRIES] = 1  # accepts nothing
    tokens = score.sample(hidden, null, 3.0, 1.0, noise)
    assert tokens.isfinite().all()
    score.sample(hidden[:7], null[:7], 3.0, 1.0, score.draw_noise(7, like=hidden))
    report = score.sampling_report()
    fallen_back = int(report.split()[1])
    assert 40 <= fallen_back <= 47
    assert "of 47 guided tokens" in report
    assert score.sampling_report() == ""


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.5])
def test_temperature_scales_both(temperature):
    """Scales times t and means as they are: guided samples are those of mixtures of such scales."""
    score = make_score(3, 4, torch.float32).eval()
    hidden, null = torch.randn(2, 50, TINY.width)
    noise = score.draw_noise(50, like=hidden)
    tokens = score.sample(hidden, None, 1.0, temperature, noise)
    mixture = score.mixture(hidden)
    chosen = (noise[:, :1] >= mixture.log_weights_Rk.softmax(-1).cumsum(-1)).sum(-1).clamp(max=3)
    rows = torch.arange(50)
    means, scales = mixture.means_RkD[rows, chosen], mixture.log_scales_RkD[rows, chosen].exp()
    normal = noise[:, 2 * TRIES : 2 * TRIES + 3]
    torch.testing.assert_close(tokens, means + temperature * scales * normal, rtol=1e-4, atol=1e-4)
    assert score.sample(hidden, null, 2.0, temperature, noise).isfinite().all()


def test_components_out_of_range():
    with pytest.raises(ValueError, match="components is 0; it must be at least 1"):
        replace(with_score(TINY, "mixture"), components=0)
