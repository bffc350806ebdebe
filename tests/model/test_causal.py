"""Causal orders: what a token sees, training against a plain loop, sampling from a cache, runs, bad input."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ear_kernels import energy_loss
from ear_model import EAR
from ear_model.config import SamplingConfig
from ear_model.draws import Draws, ImageDraws
from ear_model.evaluation.digits import evaluate_digits
from ear_model.model.masking import guidance_scale, token_order
from ear_model.presets import RUNS
from ear_model.run_dir import checkpoint_steps
from ear_model.sampling.decoding import decode_tokens
from ear_model.sampling.images import sample_images
from ear_model.sampling.memory import sampling_bytes
from ear_model.sampling.preview import Preview
from ear_model.training.public_checkpoint import export_run
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, randomise, tiny_run

ORDERS = ("causal", "random")
PINNED = [6, 5, 9, 11, 14, 10, 12, 7, 1, 13, 2, 15, 4, 8, 3, 0]
"""The random order of 16 tokens."""


def model_of(order: str = "random", dtype: torch.dtype = torch.float64, **options) -> EAR:
    return randomise(EAR(replace(TINY, order=order, **options))).to(dtype).eval()


def a_batch(model: EAR, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    shape = (count, config.channels, config.image_size, config.image_size)
    dtype = model.backbone.z_proj.weight.dtype
    return 2 * torch.rand(shape, dtype=dtype) - 1, torch.randint(config.num_classes, (count,))


def plain_hidden(model: EAR, tokens_BLT: torch.Tensor, classes_BC: torch.Tensor) -> torch.Tensor:
    """The causal backbone written out, with a mask: hidden states ``[B, L, C]`` in the model's order."""
    backbone, config = model.backbone, model.config
    order = token_order(config.order, config.num_tokens).tolist()
    position = backbone.decoder_pos_embed_learned[0]
    inputs = [classes_BC + position[copy] for copy in range(config.class_tokens)]
    inputs += [backbone.z_proj(tokens_BLT[:, place]) + position[config.class_tokens + place] for place in order[:-1]]
    x = torch.stack(inputs, 1)
    visible = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    for block in backbone.decoder_blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(2, 3) / math.sqrt(qkv.shape[-1])).masked_fill(~visible, -math.inf)
        x = x + block.attn.proj((weights.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return backbone.decoder_norm(x)[:, config.class_tokens - 1 :]


def test_orders():
    assert token_order("causal", 5).tolist() == [0, 1, 2, 3, 4]
    # Written out: images of trained models would change with it.
    assert token_order("random", 16).tolist() == PINNED
    for count in (1, 2, 17, 256, 1024):
        order = token_order("random", count)
        assert order.dtype == torch.int64
        assert order.sort().values.equal(torch.arange(count))
        assert order.equal(token_order("random", count))
    assert not token_order("random", 256).equal(torch.arange(256))


@pytest.mark.parametrize("order", ORDERS)
def test_parameters_are_those_of_the_masked_model_but_for_its_mask_token(order):
    masked, causal = EAR(TINY), EAR(replace(TINY, order=order))
    names = [name for name, _ in masked.named_parameters() if name != "backbone.mask_token"]
    assert names == [name for name, _ in causal.named_parameters()] == list(causal.state_dict())
    assert all(causal.state_dict()[name].shape == masked.state_dict()[name].shape for name in names)
    randomise(causal)
    images, labels = a_batch(causal)
    causal(images.float(), labels).backward()
    assert all(parameter.grad is not None for parameter in causal.parameters())
    with pytest.raises(RuntimeError, match="mask_token"):
        masked.load_state_dict(causal.state_dict())


@given(
    st.sampled_from(ORDERS), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
@settings(max_examples=20, deadline=None)
def test_hidden_states_are_those_of_the_plain_loop(order, patch, class_tokens, batch, seed):
    torch.manual_seed(seed)
    model = model_of(order, patch_size=patch, class_tokens=class_tokens)
    images, labels = a_batch(model, batch)
    tokens, classes = model.tokenizer.encode(images), model.backbone.embed_classes(labels)
    hidden = model.backbone(tokens, classes)
    torch.testing.assert_close(hidden, plain_hidden(model, tokens, classes), atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_no_token_sees_a_later_one(order):
    model = model_of(order)
    images, labels = a_batch(model)
    tokens, classes = model.tokenizer.encode(images), model.backbone.embed_classes(labels)
    places, count = token_order(order, tokens.shape[1]).tolist(), tokens.shape[1]
    hidden = model.backbone(tokens, classes)
    for number, place in enumerate(places):
        changed = tokens.clone()
        changed[:, place] += torch.randn_like(changed[:, place])
        others = model.backbone(changed, classes)
        # Token `number` of the order is an input of the rows that predict those after it.
        torch.testing.assert_close(others[:, : number + 1], hidden[:, : number + 1], atol=1e-13, rtol=0)
        later = (others - hidden)[:, number + 1 :].abs().amax(-1)
        assert later.shape[1] == count - number - 1
        assert (later > 1e-9).all()
    leaf = tokens.clone().requires_grad_()
    for number in (0, 5, count - 1):
        (grad,) = torch.autograd.grad(model.backbone(leaf, classes)[:, number].square().sum(), leaf)
        seen = grad.abs().amax((0, 2))
        assert not seen[places[number:]].any()
        assert seen[places[:number]].all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_training_loss_is_that_of_a_plain_loop(order, training):
    """All tokens, classes dropped as the draws say; dropout is 0 in this model."""
    model = model_of(order).train(training)
    images, labels = a_batch(model, 4)
    loss = model(images, labels, draws=Draws(torch.Generator().manual_seed(5)))
    draws = Draws(torch.Generator().manual_seed(5))
    classes = model.backbone.embed_classes(labels)
    if training:
        classes = model.backbone.drop_classes(classes, draws)
    tokens = model.tokenizer.encode(images)
    hidden, config = plain_hidden(model, tokens, classes), model.config
    noise = draws.rand(4 * config.num_tokens, config.num_samples, config.noise_dim).double() - 0.5
    total = torch.zeros((), dtype=torch.float64)
    for image in range(4):
        for number, place in enumerate(token_order(order, config.num_tokens).tolist()):
            row = noise[image * config.num_tokens + number]
            samples = model.score.generator(hidden[image, number].expand(config.num_samples, -1), row)
            total += energy_loss(samples[None], tokens[image, place][None])
    torch.testing.assert_close(loss.double(), total / (4 * config.num_tokens), atol=1e-10, rtol=1e-6)
    wanted = [model.backbone.z_proj.weight, model.backbone.decoder_pos_embed_learned]
    ours = torch.autograd.grad(loss, wanted)
    plain = torch.autograd.grad(total / (4 * config.num_tokens), wanted)
    torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-6)
    # The position of the last token of the order is no input's.
    last = config.class_tokens + token_order(order, config.num_tokens)[-1]
    assert not ours[1][0, last].any()


def test_blocks_with_replaced_parts_are_causal_too():
    """What timm's forward would do for a masked model: a wrapped linear, a hook, dropout in training."""
    model = model_of(dropout=0.2, attention_dropout=0.2)
    images, labels = a_batch(model)
    tokens, classes = model.tokenizer.encode(images), model.backbone.embed_classes(labels)
    expected = model.backbone(tokens, classes)
    for block in model.backbone.decoder_blocks:
        block.attn.qkv = nn.Sequential(block.attn.qkv)
    torch.testing.assert_close(model.backbone(tokens, classes), expected, atol=1e-12, rtol=0)
    model.train()
    leaf = tokens.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model.backbone(leaf, classes)[:, 4].square().sum(), leaf)
    assert not grad[:, token_order("random", 16)[4:]].any()
    assert not model.backbone(tokens, classes).equal(model.backbone(tokens, classes))


@given(st.sampled_from(ORDERS), st.integers(1, 3), st.integers(0, 3), st.sampled_from([2, 4, 8]), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_cache_gives_what_the_whole_sequence_does(order, class_tokens, batch, patch, seed):
    torch.manual_seed(seed)
    model = model_of(order, class_tokens=class_tokens, patch_size=patch)
    images, labels = a_batch(model, batch)
    backbone, count = model.backbone, model.config.num_tokens
    tokens, classes = model.tokenizer.encode(images), backbone.embed_classes(labels)
    hidden, ordered = backbone(tokens, classes), tokens[:, backbone.order_L]
    cache = backbone.new_cache(batch).fill_(math.nan)
    assert cache.shape == (2, 2, batch, 2, class_tokens + count - 1, 8)
    one_by_one = [backbone.extend(backbone.embed_prefix(classes), cache, 0)]
    for number in range(count - 1):
        inputs = backbone.embed_tokens(ordered[:, number : number + 1], number)
        one_by_one.append(backbone.extend(inputs, cache, class_tokens + number))
    torch.testing.assert_close(torch.stack(one_by_one, 1), hidden, atol=1e-10, rtol=1e-10)
    middle = count // 2
    known = torch.cat([backbone.embed_prefix(classes), backbone.embed_tokens(ordered[:, :middle])], 1)
    torch.testing.assert_close(backbone.extend(known, cache, 0), hidden[:, middle], atol=1e-10, rtol=1e-10)


def plain_decoding(model: EAR, labels, sampling: SamplingConfig, draws: Draws) -> torch.Tensor:
    """Tokens by a whole forward pass a token, without a cache."""
    config, backbone = model.config, model.backbone
    batch, count = len(labels), config.num_tokens
    tokens = torch.zeros(batch, count, config.token_dim)
    classes = backbone.embed_classes(labels)
    for number, place in enumerate(token_order(config.order, count).tolist()):
        given = tokens.to(classes.dtype)
        hidden = backbone(given, classes)[:, number]
        null = None
        if sampling.guidance != 1 and sampling.guidance_from <= number / count < sampling.guidance_to:
            null = backbone(given, backbone.null_class(batch))[:, number]
        scale = guidance_scale(sampling.guidance, sampling.guidance_schedule, count, count - number - 1)
        noise = model.score.draw_noise(batch, 1, like=hidden, draws=draws).flatten(0, 1)
        tokens[:, place] = model.score.sample(hidden, null, scale, sampling.temperature, noise)
    return tokens


SAMPLINGS = [
    SamplingConfig(3, 1.0),
    SamplingConfig(3, 3.0),
    SamplingConfig(64, 2.0, "constant", 1.0),
    SamplingConfig(3, 3.0, guidance_from=0.3),
    SamplingConfig(3, 3.0, guidance_from=0.25, guidance_to=0.7),
    SamplingConfig(3, 3.0, guidance_to=0.5),
    SamplingConfig(3, 3.0, guidance_from=0.93),
]


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda each: f"{each.guidance}-{each.guidance_from}")
def test_sampling_is_the_plain_loop(order, sampling):
    model, labels = model_of(order), torch.tensor([3, 1, 1])
    tokens = decode_tokens(model, labels, sampling, ImageDraws(4, range(3)))
    expected = plain_decoding(model, labels, sampling, ImageDraws(4, range(3)))
    assert tokens.dtype == torch.float32
    # Tokens are rounded to float32 as they are made.
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    for name in ("guidance", "temperature"):
        other = replace(sampling, **{name: 1.7})
        assert not decode_tokens(model, labels, other, ImageDraws(4, range(3))).equal(tokens)


def test_without_guidance_the_null_class_is_not_computed(monkeypatch):
    model = model_of()
    rows = []
    extend = model.backbone.extend
    monkeypatch.setattr(
        model.backbone, "extend", lambda inputs, *rest: rows.append(len(inputs)) or extend(inputs, *rest)
    )
    for guidance, interval, expected in (
        (1.0, (0.0, 1.0), [2] * 16),
        (2.0, (0.0, 1.0), [4] * 16),
        (2.0, (0.25, 0.5), [2] * 4 + [2, 2] + [4] * 3 + [2] * 8),
    ):
        rows.clear()
        model.sample(torch.tensor([1, 2]), guidance=guidance, guidance_from=interval[0], guidance_to=interval[1])
        assert rows == expected


def test_images_do_not_depend_on_the_batch():
    model, labels = model_of("random", torch.float32), torch.tensor([5, 0, 9, 2, 2])
    whole = sample_images(model, labels, seed=7, guidance=2.0)
    for size in (1, 2):
        torch.testing.assert_close(
            sample_images(model, labels, seed=7, batch_size=size, guidance=2.0), whole, atol=1e-5, rtol=1e-4
        )
    assert not sample_images(model, labels, seed=8, guidance=2.0).allclose(whole, atol=1e-3)
    assert sample_images(model, labels[:0], seed=7).shape == (0, 1, 8, 8)
    model(torch.rand(0, 1, 8, 8), labels[:0]).backward()
    assert model.sample(labels[:0], guidance=2.0).shape == (0, 1, 8, 8)
    # The number of steps and the mode of the model change nothing.
    assert sample_images(model.train(), labels, seed=7, guidance=2.0, steps=2).equal(whole)
    assert all(module.training for module in model.modules())


def test_a_preview_sees_the_tokens_that_are_known():
    model, seen = model_of(dtype=torch.float32), []
    preview = Preview(lambda done, total, images: seen.append((done, total, images)), every=1)
    images = model.sample(torch.tensor([4]), guidance=2.0, progress=preview)
    assert [done for done, *_ in seen] == list(range(1, 17))
    assert {total for _, total, _ in seen} == {16}
    order, final = token_order("random", 16), model.tokenizer.encode(images)
    for done, _, shown in seen:
        tokens = model.tokenizer.encode(shown)
        assert tokens[:, order[:done]].equal(final[:, order[:done]])
        assert not tokens[:, order[done:]].any()
    steps = []
    model.sample(torch.tensor([4]), progress=lambda given: steps.extend(given) or steps)
    assert [(step.number, step.left, step.keep) for step in steps] == [(i, 16 - i, 15 - i) for i in range(16)]


def test_bad_input_is_named():
    model = model_of(dtype=torch.float32)
    images, labels = a_batch(model)
    with pytest.raises(ValueError, match=r"num_masked is 3 and the model's order is 'random'.*None"):
        model(images, labels, num_masked=3)
    with pytest.raises(ValueError, match=r"order is 'halton' and the model's order is 'random'"):
        model.sample(labels, order="halton")
    with pytest.raises(ValueError, match="order is 'raster'; it must be 'masked' or 'causal' or 'random'"):
        replace(TINY, order="raster")


def test_a_cache_takes_memory():
    masked, causal = TINY, replace(TINY, order="causal")
    options = {"guided": True, "itemsize": 2}
    assert sampling_bytes(causal, **options) - sampling_bytes(masked, **options) == 2 * 2 * 2 * 17 * 16 * 2


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_trains_resumes_samples_and_evaluates(tmp_path, order):
    """Six steps at once, and four and two, with dropout: the same weights; public files refuse them."""
    config = tiny_run()
    config = replace(config, model=replace(config.model, order=order, dropout=0.1, attention_dropout=0.1))
    Trainer(config, tmp_path / "whole", device="cpu").run(quiet=True)
    part = Trainer(config, tmp_path / "parts", device="cpu")
    for _ in range(4):
        part.train_step()
    part.save()
    resumed = Trainer(config, tmp_path / "parts", device="cpu", resume=True)
    resumed.run(quiet=True)
    assert checkpoint_steps(tmp_path / "parts")[-1] == 6
    models = [EAR.from_pretrained(tmp_path / name) for name in ("whole", "parts")]
    assert models[0].config.order == order
    for name, tensor in models[0].state_dict().items():
        assert tensor.equal(models[1].state_dict()[name]), name
    samples = models[0].sample(torch.arange(3), guidance=2.0)
    assert samples.isfinite().all()
    with pytest.raises(ValueError, match=rf"order '{order}'; public"):
        export_run(tmp_path / "whole", tmp_path / "public.pth")
    assert not (tmp_path / "public.pth").exists()
    if order == "random":
        (score,) = evaluate_digits(models[0], [SamplingConfig(3, 2.0)], num=20)
        assert asdict(score)["num_samples"] == 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", ORDERS)
def test_digits_are_learned(tmp_path, order):
    """A README-sized run, at its best guidance (docs/model.md, "Orders")."""
    run = RUNS["digits"]
    run = replace(run, model=replace(run.model, order=order), train=replace(run.train, checkpoint_every=2600))
    Trainer(run, tmp_path / "run", device="cpu").run(quiet=True)
    model = EAR.from_pretrained(tmp_path / "run")
    settings_ = [SamplingConfig(16, guidance, "linear", 0.7) for guidance in (1.0, 2.0, 3.0)]
    assert max(each.class_consistency for each in evaluate_digits(model, settings_, num=500)) > 0.9
