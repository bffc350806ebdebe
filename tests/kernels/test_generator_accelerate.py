"""accelerate() on models of the public key layout (docs/model.md, Public files): same loss, gradients, samples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_kernels import accelerate
from ear_kernels.public_models import UnknownModelError
from tests.kernels.generator_fixtures import DEVICE


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).split(x.shape[-1], -1)
        if not self.training:
            shift = shift * temperature
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Final(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class EarNet(nn.Module):
    def __init__(self, channels: int, width: int, out: int, noise: int, depth: int) -> None:
        super().__init__()
        self.noise_embed, self.input_proj = nn.Linear(noise, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_layer = Final(width, out)

    def forward(self, z: Tensor, noise: Tensor, infer_temperature: float) -> Tensor:
        x, c = self.input_proj(z), self.noise_embed(noise)
        for block in self.res_blocks:
            x = block(x, c, infer_temperature)
        return self.final_layer(x, c)


class ScoreLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise_channels, self.alpha, self.train_temperature = 8, 1, 0.9
        self.net = EarNet(12, 16, 4, 8, 2)

    def forward(self, target: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = z.shape[0]
        noise = torch.rand((2 * rows, self.noise_channels), dtype=z.dtype, device=z.device) - 0.5
        first, second = self.net(torch.cat([z, z]), noise, 1).split(rows)
        loss = (first - target).norm(dim=-1) + (second - target).norm(dim=-1)
        loss = loss - self.train_temperature * (first - second).norm(dim=-1)
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()

    def sample(self, z: Tensor, temperature: float) -> Tensor:
        noise = torch.rand((z.shape[0], self.noise_channels), dtype=z.dtype, device=z.device) - 0.5
        return self.net(z, noise, temperature).float()


class Ear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z_proj = nn.Linear(4, 12)
        self.scoreloss, self.score_batch_mul = ScoreLoss(), 2

    def forward_loss(self, z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = self.score_batch_mul
        z, target = (t.reshape(-1, t.shape[-1]).repeat(count, 1) for t in (z, target))
        return self.scoreloss(z=z, target=target, mask=mask.reshape(-1).repeat(count))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.forward_loss(self.z_proj(x), x, mask)


class TimeEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(torch.cos(t[:, None].float() * torch.arange(6, device=t.device)))


class MarNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embed, self.cond_embed, self.input_proj = TimeEmbed(16), nn.Linear(12, 16), nn.Linear(4, 16)
        self.res_blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.final_layer = Final(16, 8)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class Mar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffloss = nn.Module()
        self.diffloss.net = MarNet()

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.diffloss.net(x, t, c).square().mean()


class Calm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.generative_head, self.beta = nn.Linear(4, 4), nn.Linear(4, 4), 1.0

    def energy_score(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        n = x.shape[0]
        y = mean + torch.randn((100, *mean.shape), device=mean.device) * log_std.exp()
        within = (x[:, None] - x[None]).norm(dim=-1).pow(self.beta).sum((0, 1)) / (n * (n - 1))
        return within - 2 * (x[:, None] - y[None]).norm(dim=-1).pow(self.beta).mean((0, 1))


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton" if request.param == "triton" and DEVICE == "cuda" else "eager")
    return request.param


def loss_and_gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(*inputs)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-6, rtol=2e-4, msg=name)


def test_ear_gives_the_same_loss_gradients_and_samples(backend: str) -> None:
    torch.manual_seed(0)
    model = randomised(Ear())
    x, mask = torch.randn(3, 5, 4, device=DEVICE), (torch.rand(3, 5, device=DEVICE) < 0.8).float()
    before = loss_and_gradients(model, x, mask)
    model.eval()
    z = torch.randn(7, 12, device=DEVICE)
    torch.manual_seed(2)
    with torch.no_grad():
        sample = model.scoreloss.sample(z, 0.7)
    model.train()
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    report = accelerate(model)
    assert report.kind == "EAR"
    assert "scoreloss.net.forward" in str(report)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.load_state_dict(state, strict=True)
    same(before, loss_and_gradients(model, x, mask))
    model.eval()
    torch.manual_seed(2)
    with torch.no_grad():
        torch.testing.assert_close(model.scoreloss.sample(z, 0.7), sample, atol=1e-5, rtol=1e-5)


def test_ear_loss_alone_and_optimiser_go_on(backend: str) -> None:
    torch.manual_seed(0)
    loss = randomised(ScoreLoss())
    optimiser = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    target, z, mask = (
        torch.randn(9, 4, device=DEVICE),
        torch.randn(9, 12, device=DEVICE),
        torch.ones(9, device=DEVICE),
    )
    before = loss_and_gradients(loss, target, z, mask)
    accelerate(loss)
    same(before, loss_and_gradients(loss, target, z, mask))
    optimiser.step()
    assert not torch.equal(loss_and_gradients(loss, target, z, mask)["loss"], before["loss"])


def test_mar_gives_the_same_loss_and_gradients(backend: str) -> None:
    torch.manual_seed(0)
    model = randomised(Mar())
    inputs = torch.randn(6, 4, device=DEVICE), torch.arange(6, device=DEVICE), torch.randn(6, 12, device=DEVICE)
    before = loss_and_gradients(model, *inputs)
    assert accelerate(model).kind == "MAR"
    same(before, loss_and_gradients(model, *inputs))


def test_calm_gives_the_same_score(backend: str) -> None:
    torch.manual_seed(0)
    model = Calm().to(DEVICE)
    x, mean, log_std = (torch.randn(*s, device=DEVICE) for s in ((8, 5, 4), (5, 4), (5, 4)))
    torch.manual_seed(3)
    before = model.energy_score(x, mean, log_std)
    assert accelerate(nn.Sequential(model)).kind == "CALM"
    torch.manual_seed(3)
    torch.testing.assert_close(model.energy_score(x, mean, log_std), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: setattr(m.scoreloss.net.res_blocks[0], "in_ln", nn.LayerNorm(16, eps=1e-5)),
        lambda m: setattr(m.scoreloss.net.res_blocks[1].mlp, "1", nn.GELU()),
        lambda m: setattr(m.scoreloss.net.res_blocks[1], "extra", nn.Linear(2, 2)),
        lambda m: setattr(m.scoreloss.net.final_layer, "linear", nn.Linear(16, 4, bias=False)),
        lambda m: setattr(m.scoreloss.net, "noise_embed", nn.Linear(9, 16)),
    ],
)
def test_a_model_it_does_not_know_is_left_untouched(spoil) -> None:
    model = Ear()
    spoil(model)
    with pytest.raises(UnknownModelError, match="Ear is not a model that"):
        accelerate(model)
    assert not any("forward" in vars(module) or "forward_loss" in vars(module) for module in model.modules())


def doubled(module, inputs, output):
    return 2 * output


def parametrised_linear(ear) -> None:
    nn.utils.parametrizations.orthogonal(ear.scoreloss.net.final_layer.linear)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.scoreloss.register_forward_hook(doubled),
        lambda m: m.scoreloss.net.register_forward_hook(doubled),
        lambda m: m.scoreloss.net.noise_embed.register_forward_hook(doubled),
        lambda m: m.scoreloss.net.res_blocks[1].register_forward_hook(doubled),
        lambda m: m.scoreloss.net.res_blocks[0].mlp[0].register_forward_hook(doubled),
        lambda m: setattr(m.scoreloss.net.res_blocks[0].mlp, "2", nn.Sequential(nn.Linear(16, 16, device=DEVICE))),
        lambda m: setattr(m.scoreloss.net.final_layer.linear, "forward", lambda x: x[..., :4]),
        parametrised_linear,
    ],
)
def test_nothing_of_a_head_is_bypassed(backend: str, spoil) -> None:
    """A head that does more than its weights say runs the public methods."""
    torch.manual_seed(0)
    model, plain = randomised(Ear()), Ear().to(DEVICE)
    plain.load_state_dict(model.state_dict())
    accelerate(model)
    for each in (model, plain):
        torch.manual_seed(2)
        spoil(each)
    x, mask = torch.randn(3, 5, 4, device=DEVICE), torch.ones(3, 5, device=DEVICE)
    same(loss_and_gradients(plain, x, mask), loss_and_gradients(model, x, mask))
    z, noise = torch.randn(7, 12, device=DEVICE), torch.randn(7, 8, device=DEVICE)
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        expected = plain.scoreloss.net(z, noise, 0.7)
        torch.testing.assert_close(model.scoreloss.net(z, noise, 0.7), expected, atol=1e-5, rtol=1e-5)


def test_a_hook_in_a_mar_net_runs(backend: str) -> None:
    torch.manual_seed(0)
    model = randomised(Mar())
    accelerate(model)
    inputs = torch.randn(6, 4, device=DEVICE), torch.arange(6, device=DEVICE), torch.randn(6, 12, device=DEVICE)
    before = loss_and_gradients(model, *inputs)["loss"]
    model.diffloss.net.final_layer.register_forward_hook(doubled)
    torch.testing.assert_close(loss_and_gradients(model, *inputs)["loss"], 4 * before)


def test_wrong_argument() -> None:
    with pytest.raises(TypeError, match="must be a torch"):
        accelerate(F.silu)  # type: ignore[arg-type]
