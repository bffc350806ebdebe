"""MAR's backbone and diffusion loss against the public model as tests/model/mar_reference.py has it."""

from dataclasses import replace

import pytest
import torch

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, from_dict, to_dict
from ear_model.draws import Draws, ImageDraws
from ear_model.ear import EAR
from ear_model.model.masking import guidance_scale, unmasking_schedule
from ear_model.model.weights import our_key, public_key
from ear_model.presets import MODELS, RUNS, with_model
from ear_model.sampling.decoding import decode_tokens
from ear_model.scores.diffusion_process import respaced_times
from tests.model import mar_reference
from tests.model.conftest import TINY, randomise

TINY_MAR = ModelConfig(
    **{name: getattr(TINY, name) for name in ("image_size", "channels", "patch_size", "num_classes", "width")},
    **{name: getattr(TINY, name) for name in ("num_heads", "class_tokens", "dropout", "attention_dropout")},
    **{"generator_width": 16, "generator_depth": 2, "num_samples": 3, "diffusion_steps": 37},
    **{"score": "diffusion", "backbone": "mar", "encoder_depth": 2, "depth": 1},
)
DEPTHS = TINY_MAR.encoder_depth, TINY_MAR.depth


def public_weights(model):
    return {public_key(name, "diffusion"): parameter for name, parameter in model.named_parameters()}


def double_model(**changes):
    return randomise(EAR(replace(TINY_MAR, **changes))).double()


class Recorded(Draws):
    """Draws that remember what they gave."""

    def __init__(self):
        super().__init__()
        self.given = []

    def _draw(self, draw, shape, device):
        self.given.append(super()._draw(draw, shape, device))
        return self.given[-1]


@pytest.mark.parametrize("known", [0, 1, 7, 16])
def test_hidden_states(known):
    model = double_model()
    tokens, classes = torch.randn(3, 16, 4).double(), torch.randn(3, 16).double()
    masked = torch.rand(3, 16).argsort(1) >= known
    expected = mar_reference.hidden_states(public_weights(model), tokens, masked, classes, 2, DEPTHS)
    for number in (None, 16 - known):
        hidden = model.backbone(tokens, masked, classes, num_masked=number)
        torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
    changed = torch.where(masked.unsqueeze(2), torch.nan, tokens)
    assert torch.equal(model.backbone(changed, masked, classes), hidden)


def test_numbers_of_masked_tokens_must_be_equal():
    model = EAR(TINY_MAR)
    masked = torch.rand(2, 16).argsort(1) >= torch.tensor([[3], [4]])
    with pytest.raises(ValueError, match=r"\[12, 13\] masked tokens"):
        model.backbone(torch.randn(2, 16, 4), masked, torch.randn(2, 16))


@pytest.mark.parametrize("num_masked", [1, 12, 16])
def test_loss_and_all_gradients(num_masked):
    """A whole training step: orders, dropped classes, times and noise as they were drawn."""
    model, draws = double_model(label_dropout=0.5), Recorded()
    images, labels = torch.rand(5, 1, 8, 8).double() * 2.2 - 1.1, torch.randint(0, 10, (5,))
    loss = model(images, labels, num_masked=num_masked, draws=draws)
    loss.backward()
    orders, dropped, times, noise = draws.given
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in public_weights(model).items()}
    classes = torch.where(dropped < 0.5, weights["fake_latent"], weights["class_emb.weight"][labels])
    tokens = model.tokenizer.encode(images)
    positions = orders.argsort(dim=1, stable=True)[:, :num_masked]
    masked = torch.zeros(5, 16, dtype=torch.bool).scatter(1, positions, True)
    hidden = mar_reference.hidden_states(weights, tokens, masked, classes, 2, DEPTHS)
    image = torch.arange(5)[:, None]
    hidden, targets = hidden[image, positions].flatten(0, 1), tokens[image, positions].flatten(0, 1)
    process = mar_reference.Diffusion(37)
    losses = []
    for copy in range(3):
        t, e = (times[:, copy] * 37).long(), noise[:, copy].double()
        output = mar_reference.head(weights, process.noisy(targets, t, e), t, hidden)
        losses.append(process.loss(output, targets, t, e))
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        gradient = weights[public_key(name, "diffusion")].grad
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-7, atol=1e-9 * scale, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("guidance", [1.0, 2.9])
@torch.no_grad()
def test_a_whole_decode(guidance):
    """All steps with their orders and noise; ours are kept in float32 between the steps, so theirs are."""
    model, draws = double_model().eval(), Recorded()
    # Untrained, tokens grow by what the schedule takes off the noise; predict about the noise itself.
    model.score.net.final_layer.linear.weight.mul_(0.1)
    labels, setting = torch.tensor([3, 0, 3]), SamplingConfig(5, guidance, temperature=0.8, diffusion_steps=9)
    tokens = decode_tokens(model, labels, setting, draws)
    weights = public_weights(model)
    times = respaced_times(37, 9)
    process = mar_reference.Diffusion(37).respaced(times)
    orders = draws.given[0].argsort(dim=1, stable=True)
    expected, masked = torch.zeros(3, 16, 4), torch.ones(3, 16, dtype=torch.bool)
    null_classes = weights["fake_latent"].expand(3, -1)
    for step, (left, keep) in enumerate(unmasking_schedule(16, 5)):
        assert int(masked[0].sum()) == left
        both = [
            mar_reference.hidden_states(weights, expected.double(), masked, classes, 2, DEPTHS)
            for classes in (weights["class_emb.weight"][labels], null_classes)
        ]
        places = torch.zeros_like(masked).scatter(1, orders[:, keep:left], True)
        # Rows by place in the image, as the public code has them; each with the noise of its place in the order.
        rank = orders.argsort(1)[places].view(3, -1) - keep
        noise = draws.given[step + 1].double().unflatten(2, (9, 4))
        noise = noise[torch.arange(3)[:, None], rank].flatten(0, 1).transpose(0, 1)
        hidden, null = (each[places] for each in both)
        scale = guidance_scale(guidance, "linear", 16, keep)
        null = None if guidance == 1 else null
        expected[places] = mar_reference.sample_tokens(
            weights, hidden, null, scale, 0.8, noise, process, times
        ).float()
        masked &= ~places
    assert not masked.any()
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_an_image_is_its_own():
    """Image i of a batch is that of a smaller batch, by the seed alone."""
    model = randomise(EAR(TINY_MAR)).eval()
    setting = {"steps": 3, "guidance": 2.0, "diffusion_steps": 4}
    labels = torch.tensor([3, 1, 9])
    images = model.sample(labels, draws=ImageDraws(5, range(3)), **setting)
    alone = model.sample(labels[2:], draws=ImageDraws(5, [2]), **setting)
    torch.testing.assert_close(alone, images[2:], rtol=1e-3, atol=1e-4 * float(images.abs().max()))
    assert not torch.equal(images[:1], images[2:])


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("mar_base", 364, 207_924_768), ("mar_large", 476, 478_326_304), ("mar_huge", 604, 942_403_104)],
)
def test_sizes_of_the_public_models(name, tensors, parameters):
    """The public README counts 208, 479 and 943 million."""
    with torch.device("meta"):
        model = EAR(MODELS[name])
    found = dict(model.named_parameters())
    assert (len(found), sum(parameter.numel() for parameter in found.values())) == (tensors, parameters)
    assert all(our_key(public_key(each, "diffusion"), "diffusion") == each for each in found)
    keys = list(public_weights(model))
    assert keys[:6] == [
        *("fake_latent", "encoder_pos_embed_learned", "mask_token", "decoder_pos_embed_learned"),
        *("diffusion_pos_embed_learned", "class_emb.weight"),
    ]
    head = [key for key in keys if key.startswith("diffloss")]
    assert head[0] == "diffloss.net.time_embed.mlp.0.weight"


def test_the_preset_brings_its_training_and_sampling():
    run = with_model(RUNS["imagenet256"], "mar_base")
    assert run.model == MODELS["mar_base"]
    assert (run.sampling.guidance, run.sampling.temperature, run.sampling.diffusion_steps) == (2.9, 1.0, 100)
    assert (run.train.generator_lr_scale, run.train.finetune_steps) == (1.0, 0)
    assert from_dict(RunConfig, to_dict(run), "here") == run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "vit"}, "must be 'ear' or 'mar'"),
        ({"encoder_depth": 3}, "encoder_depth is 3; the ear backbone has no encoder"),
        ({"backbone": "mar", "order": "causal"}, "the mar backbone has the order 'masked' alone"),
        ({"backbone": "mar", "encoder_depth": 0}, "encoder_depth is 0"),
        ({"diffusion_steps": 10}, "the energy score has no diffusion_steps"),
        ({"score": "diffusion", "diffusion_steps": 0}, "diffusion_steps is 0"),
        ({"score": "diffusion", "alpha": 1.5}, "the diffusion score has no alpha"),
        ({"score": "diffusion", "num_samples": 0}, "num_samples is 0"),
    ],
)
def test_refused_configurations(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(ModelConfig(), **changes)


def test_sinusoid_positions():
    model = EAR(replace(TINY_MAR, position_init="sinusoid"))
    for positions in (model.backbone.encoder_pos_embed_learned, model.backbone.decoder_pos_embed_learned):
        assert positions[0, 2:].std() > 0.1 > positions[0, :2].std()


def test_a_step_of_training_moves_every_parameter():
    model = EAR(replace(TINY_MAR, label_dropout=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(5):  # the last linear, the modulations and the hidden state begin at no gradient
        optimizer.zero_grad()
        model(torch.rand(16, 1, 8, 8), torch.arange(16) % 10, num_masked=12).backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
