"""Parameter groups, schedule and moving average."""

from dataclasses import replace

import pytest
import torch

from ear_kernels import FusedAdamW
from ear_model.config import TrainConfig
from ear_model.ear import EAR
from ear_model.training import optim


def _names(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]


def test_paper_groups(tiny_config):
    model = EAR(tiny_config)
    groups = optim.parameter_groups(model, TrainConfig())
    plain, decayed, generator = _names(model, groups)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.0, 1.0), (0.02, 1.0), (0.0, 0.25)]
    everything = {name for name, _ in model.named_parameters()}
    assert set(generator) == {name for name in everything if name.startswith("score.")}
    embeddings = {"class_emb.weight", "fake_latent", "mask_token", "decoder_pos_embed_learned"}
    assert {f"backbone.{name}" for name in embeddings} < set(decayed)
    assert "backbone.decoder_blocks.0.attn.qkv.weight" in decayed
    assert "backbone.decoder_blocks.0.attn.qkv.bias" in plain
    assert "backbone.decoder_blocks.1.norm2.weight" in plain
    assert sorted(plain + decayed + generator) == sorted(everything)


def test_public_groups(tiny_config):
    model = EAR(tiny_config)
    plain, _, generator = _names(model, optim.parameter_groups(model, TrainConfig(parameter_groups="public")))
    assert "score.generator.res_blocks.0.in_ln.weight" in plain
    assert "score.generator.noise_embed.bias" in plain
    assert "score.generator.noise_embed.weight" in generator
    assert all(name.endswith("weight") and "in_ln" not in name for name in generator)


def test_learning_rates():
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, finetune_steps=20, finetune_lr=0.1)
    assert optim.learning_rate(0, config) == pytest.approx(0.1)
    assert optim.learning_rate(9, config) == pytest.approx(1.0)
    assert optim.learning_rate(50, config) == 1.0
    assert optim.learning_rate(80, config) == 0.1
    assert not optim.is_finetuning(79, config)
    assert optim.is_finetuning(80, config)
    cosine = replace(config, schedule="cosine")
    assert optim.learning_rate(10, cosine) == pytest.approx(1.0)
    assert optim.learning_rate(45, cosine) == pytest.approx(0.5)
    assert optim.learning_rate(79, cosine) < 0.01
    assert optim.learning_rate(99, cosine) == 0.1


def test_scaled_rate_reaches_the_groups(tiny_config):
    optimizer = optim.make_optimizer(EAR(tiny_config), TrainConfig())
    optim.set_learning_rate(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.4, 0.1])
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_moving_average(tiny_model):
    start = {name: parameter.detach().clone() for name, parameter in tiny_model.named_parameters()}
    ema = optim.ExponentialMovingAverage(tiny_model, 0.9)
    expected = dict(start)
    for _ in range(3):
        with torch.no_grad():
            for parameter in tiny_model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update()
        expected = {name: 0.9 * expected[name] + 0.1 * p.detach() for name, p in tiny_model.named_parameters()}
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, expected[name])
    assert {id(average) for average in ema.by_parameter().values()} == set(map(id, ema.averages.values()))


def test_clipping():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 10.0)
    assert optim.clipped_step(torch.optim.SGD([parameter], lr=1.0), 3.0).item() == pytest.approx(20.0)
    assert parameter.norm().item() == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("limit", [0.5, 1e6])
@pytest.mark.parametrize("kind", ["ours", "fused", "plain"])
def test_clipped_step_is_clip_step_and_average(tiny_config, limit, kind):
    results = []
    for together in (True, False):
        torch.manual_seed(3)
        model = EAR(tiny_config)
        groups = optim.parameter_groups(model, TrainConfig())
        options = {"lr": 1e-2, "betas": (0.9, 0.95)}
        if kind == "ours":
            optimizer = FusedAdamW(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options, fused=kind == "fused")
        ema = optim.ExponentialMovingAverage(model, 0.8)
        norms = []
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            next(model.parameters()).grad = None
            if together:
                norms.append(optim.clipped_step(optimizer, limit, ema))
            else:
                norms.append(torch.nn.utils.clip_grad_norm_(list(model.parameters()), limit))
                optimizer.step()
                ema.update()
            assert not hasattr(optimizer, "grad_scale")
        results.append([*norms, *model.parameters(), *ema.averages.values()])
        assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert results[0][0] > 0.5
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def test_clipped_step_of_nan_is_told():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.tensor([1.0, float("nan"), 0.0, 0.0])
    assert optim.clipped_step(optimizer, 3.0).isnan()
    assert parameter.isnan().all()
    assert not hasattr(optimizer, "grad_scale")
    parameter.grad = None
    assert optim.clipped_step(optimizer, 3.0).item() == 0
