"""The assembled model: sizes, initial values, masked training and sampling."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ear_kernels import energy_loss
from ear_model import EAR
from ear_model.config import SamplingConfig
from ear_model.draws import ImageDraws
from ear_model.model import masking
from ear_model.model.weights import our_key, public_key
from ear_model.sampling.decoding import decode_tokens
from ear_model.tokenizers.patches import PixelPatches
from ear_model.training.loss import TrainingLoss
from tests.model.conftest import TINY, randomise


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [("ear_base", 205_608_720, 352), ("ear_large", 474_755_088, 464), ("ear_huge", 937_314_576, 592)],
)
def test_presets_have_the_papers_sizes(preset, parameters, tensors):
    with torch.device("meta"):
        model = EAR.from_preset(preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_public_key_layout():
    """Keys and shapes of the public files for EAR-B, written out."""
    with torch.device("meta"):
        model = EAR.from_preset("ear_base")
    shapes = {public_key(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    c, w = 768, 1024
    expected = {
        "fake_latent": (1, c),
        "mask_token": (1, 1, c),
        "decoder_pos_embed_learned": (1, 64 + 256, c),
        "class_emb.weight": (1000, c),
        "z_proj.weight": (c, 16),
        "z_proj.bias": (c,),
        "decoder_norm.weight": (c,),
        "decoder_norm.bias": (c,),
        "scoreloss.net.noise_embed.weight": (w, 64),
        "scoreloss.net.noise_embed.bias": (w,),
        "scoreloss.net.input_proj.weight": (w, c),
        "scoreloss.net.input_proj.bias": (w,),
        "scoreloss.net.final_layer.adaLN_modulation.1.weight": (2 * w, w),
        "scoreloss.net.final_layer.adaLN_modulation.1.bias": (2 * w,),
        "scoreloss.net.final_layer.linear.weight": (16, w),
        "scoreloss.net.final_layer.linear.bias": (16,),
    }
    for index in range(24):
        layers = (
            ("norm1", (c,)),
            ("attn.qkv", (3 * c, c)),
            ("attn.proj", (c, c)),
            ("norm2", (c,)),
            ("mlp.fc1", (4 * c, c)),
            ("mlp.fc2", (c, 4 * c)),
        )
        for name, shape in layers:
            expected[f"decoder_blocks.{index}.{name}.weight"] = shape
            expected[f"decoder_blocks.{index}.{name}.bias"] = shape[:1]
    for index in range(6):
        layers = (("in_ln", (w,)), ("mlp.0", (w, w)), ("mlp.2", (w, w)), ("adaLN_modulation.1", (3 * w, w)))
        for name, shape in layers:
            expected[f"scoreloss.net.res_blocks.{index}.{name}.weight"] = shape
            expected[f"scoreloss.net.res_blocks.{index}.{name}.bias"] = shape[:1]
    assert shapes == expected
    assert all(our_key(public_key(name)) == name for name, _ in model.named_parameters())


def test_initial_values():
    """Normal 0.02 embeddings, xavier-uniform linears, zero biases; the generator has its own test."""
    model = EAR(replace(TINY, width=64, num_classes=200))
    for name, tensor in model.backbone.named_parameters():
        if name in ("class_emb.weight", "fake_latent", "mask_token", "decoder_pos_embed_learned"):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.5 if tensor.numel() < 100 else 0.1), name
            assert abs(tensor.mean()) < 0.02, name
        elif "norm" in name and name.endswith("weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            limit = math.sqrt(6 / sum(tensor.shape))
            assert 0.9 * limit < tensor.abs().max() <= limit, name
    block = model.backbone.decoder_blocks[0]
    assert block.norm1.eps == block.norm2.eps == model.backbone.decoder_norm.eps == 1e-6
    assert block.attn.qkv.bias is not None


def test_positions_start_from_a_sinusoid_that_knows_neighbours(tiny_config):
    config = replace(tiny_config, image_size=16, channels=2, patch_size=1, width=62, num_heads=2)
    torch.manual_seed(0)
    plain = EAR(config).backbone.decoder_pos_embed_learned[0]
    torch.manual_seed(0)
    positions = EAR(replace(config, position_init="sinusoid")).backbone.decoder_pos_embed_learned[0]
    classes = config.class_tokens
    assert positions[:classes].equal(plain[:classes])
    assert positions[:, 60:].equal(plain[:, 60:])  # 62 = 4 * 15 + 2
    added = (positions - plain)[classes:]
    assert added[:, :60].square().mean().sqrt().item() == pytest.approx(0.25, rel=0.02)
    for half in (slice(0, 30), slice(30, 60)):  # rows, then columns
        varies = added[:, half].unflatten(0, (16, 16))
        along = [varies.diff(dim=dim).abs().max().item() for dim in (0, 1)]
        assert min(along) < 1e-6 < 0.1 < max(along)
    distances = (positions[classes:] - positions[classes + 8 * 16 + 8]).norm(dim=1).unflatten(0, (16, 16))
    # Nearest to the token in row 8, column 8: itself, then those beside, above and below it.
    assert distances.flatten().argsort()[0] == 8 * 16 + 8
    assert (distances <= distances[[7, 9, 8, 8], [8, 8, 7, 9]].max()).sum() == 5


def test_masks_are_drawn_as_configured(tiny_config, monkeypatch):
    monkeypatch.setattr(
        masking.torch,
        "rand",
        lambda *sizes, real=torch.rand, **options: torch.tensor(0.9) if sizes == ((),) else real(*sizes, **options),
    )
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    for name, expected in (("truncated_normal", 16), ("cosine", 3)):  # 16 cos(0.9 pi/2) = 2.5
        model = EAR(replace(tiny_config, masking=name))
        seen = []
        monkeypatch.setattr(model.score, "loss", lambda hidden, target, draws, seen=seen: seen.append(len(target)))
        model(images, labels)
        assert seen == [2 * expected]


def test_dropout_is_where_the_paper_has_it():
    block = EAR(replace(TINY, dropout=0.1, attention_dropout=0.2)).backbone.decoder_blocks[0]
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.1
    assert block.attn.attn_drop.p == 0.2


def test_patches_are_channel_row_column():
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4).float()
    patches = PixelPatches(4, 2, 2)
    tokens = patches.encode(images)
    # Second patch of the first row of patches: columns 2, 3 of rows 0, 1, channel 0 then channel 1.
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(patches.decode(tokens), images)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 5\)"):
        patches.encode(torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"\(1, 3, 8\)"):
        patches.decode(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="size 5 is not divisible by the patch size 2"):
        PixelPatches(5, 1, 2)


def test_training_loss_is_the_energy_loss_of_the_masked_tokens(tiny_model, monkeypatch):
    """Recomputed with all rows through backbone and generator and a 0/1 mask, as the public code does."""
    model = tiny_model.eval()
    images, labels = torch.rand(5, 1, 8, 8), torch.randint(0, 10, (5,))
    orders, noise = torch.rand(5, 16).argsort(dim=-1), torch.rand(5 * 12, 2, 8) - 0.5
    monkeypatch.setattr(masking, "random_orders", lambda *arguments: orders)
    monkeypatch.setattr(model.score, "draw_noise", lambda *shape, like, draws: noise)
    loss = model(images, labels, num_masked=12)

    tokens = model.tokenizer.encode(images)
    masked = torch.zeros(5, 16, dtype=torch.bool)
    all_noise = torch.zeros(5, 16, 2, 8)
    for image in range(5):
        for place in range(12):
            masked[image, orders[image, place]] = True
            all_noise[image, orders[image, place]] = noise[12 * image + place]
    hidden = model.backbone(tokens, masked, model.backbone.class_emb(labels))
    samples = model.score.generator(hidden, all_noise)
    torch.testing.assert_close(loss, energy_loss(samples, tokens, masked.float()))


def test_generator_sees_masked_rows_only(tiny_model):
    seen = []
    tiny_model.score.generator.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    tiny_model(torch.rand(5, 1, 8, 8), torch.randint(0, 10, (5,)), num_masked=12)
    assert seen == [(5 * 12, 2, 4)]


def test_contents_of_masked_tokens_are_not_read(tiny_model):
    model = tiny_model.eval()
    tokens, masked = torch.rand(2, 16, 4), torch.zeros(2, 16, dtype=torch.bool)
    masked[:, ::2] = True
    changed = torch.where(masked.unsqueeze(-1), torch.tensor(float("nan")), tokens)
    classes = model.backbone.null_class(2)
    assert torch.equal(model.backbone(tokens, masked, classes), model.backbone(changed, masked, classes))


def test_classes_are_dropped_in_training_only(tiny_config):
    model = randomise(EAR(replace(tiny_config, label_dropout=0.3)))
    classes = torch.randn(4000, 16)
    dropped = (model.backbone.drop_classes(classes) == model.backbone.fake_latent).all(dim=-1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.035)
    calls = []
    model.backbone.drop_classes = lambda tensor, draws: calls.append(1) or tensor
    images, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    model.train()(images, labels)
    model.eval()(images, labels)
    assert len(calls) == 1


@pytest.mark.parametrize(("noise", "low", "high", "std"), [("uniform", -0.5, 0.5, 12**-0.5), ("gaussian", -9, 9, 1)])
def test_noise_distributions(tiny_config, noise, low, high, std):
    drawn = EAR(replace(tiny_config, noise=noise)).score.draw_noise(5000, like=torch.zeros(1))
    assert drawn.shape == (5000, 8)
    assert low <= drawn.min()
    assert drawn.max() <= high
    assert drawn.std().item() == pytest.approx(std, rel=0.02)
    assert abs(drawn.mean()) < 0.03


def test_tau_is_used_and_checked(tiny_model):
    model = tiny_model.eval()
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)

    def loss(tau):
        torch.manual_seed(3)
        model.score.tau = tau
        return model(images, labels).item()

    assert loss(1.0) < loss(0.5)
    with pytest.raises(ValueError, match=r"tau is 1\.2"):
        model.score.tau = 1.2


@pytest.mark.parametrize("steps", [1, 4, 16, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_predicts_every_token_once(tiny_model, monkeypatch, steps, guidance):
    """The stand-in generator numbers its rows; every token must hold a number of its own."""
    count = [0]

    def numbered(hidden, null_hidden, scale, temperature, noise):
        assert (null_hidden is None) == (guidance == 1.0)
        first = count[0]
        count[0] += hidden.shape[0]
        return (torch.arange(first, count[0]).float() + 1).unsqueeze(-1).expand(-1, 4)

    monkeypatch.setattr(tiny_model.score, "sample", numbered)
    images = tiny_model.sample(torch.tensor([1, 2, 3]), steps=steps, guidance=guidance)
    numbers = tiny_model.tokenizer.encode(images)[:, :, 0].flatten()
    assert sorted(numbers.tolist()) == list(range(1, 49))
    assert images.shape == (3, 1, 8, 8)


def test_masks_of_the_loop_follow_the_schedule(tiny_model, monkeypatch):
    seen = []
    forward = tiny_model.backbone.forward
    monkeypatch.setattr(
        tiny_model.backbone,
        "forward",
        lambda t, m, c, **more: seen.append(m.sum(dim=-1).tolist()) or forward(t, m, c),
    )
    tiny_model.sample(torch.tensor([1, 2]), steps=4)
    assert seen == [[16, 16], [14, 14], [11, 11], [6, 6]]


def test_sampling_is_a_function_of_the_seed(tiny_model):
    labels = torch.tensor([0, 5, 9])

    def images(seed):
        return tiny_model.sample(labels, steps=5, guidance=2.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


def test_guidance_1_is_no_guidance(tiny_model, monkeypatch):
    """Both halves of the guided computation at scale 1 give what the unguided one gives."""
    labels = torch.tensor([0, 5, 9])
    plain = tiny_model.sample(labels, steps=5, guidance=1.0, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("ear_model.sampling.decoding.guidance_scale", lambda *arguments: 1.0)
    guided = tiny_model.sample(labels, steps=5, guidance=1.5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(guided, plain)


def test_guidance_mixes_hidden_states(tiny_model):
    hidden, null_hidden = torch.randn(6, 16), torch.randn(6, 16)
    noise = tiny_model.score.draw_noise(6, like=hidden)
    guided = tiny_model.eval().score.sample(hidden, null_hidden, 2.5, 1.0, noise)
    mixed = tiny_model.score.sample(2.5 * hidden - 1.5 * null_hidden, None, 1.0, 1.0, noise)
    torch.testing.assert_close(guided, mixed)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_and_temperature_change_the_images(tiny_model, schedule):
    labels = torch.tensor([0, 5, 9])

    def images(**options):
        return tiny_model.sample(labels, steps=5, generator=torch.Generator().manual_seed(1), **options)

    assert not torch.allclose(images(), images(guidance=3.0, guidance_schedule=schedule))
    assert not torch.allclose(images(), images(temperature=0.3))


def test_sampling_leaves_the_mode_alone(tiny_model):
    tiny_model.train()
    tiny_model.sample(torch.tensor([1]), steps=2)
    assert tiny_model.training
    tiny_model.eval().sample(torch.tensor([1]), steps=2)
    assert not tiny_model.training


class _RefuseHostReads(TorchDispatchMode):
    """Raises at every operation that would make a GPU's host wait for a value or a count."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            raise AssertionError(f"{name} reads a tensor on the host")
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("order", ["masked", "random"])
def test_no_host_reads_in_step_and_loop(order, monkeypatch):
    """The CPU stand-in for the GPU script's sync debug mode (benchmarks/gpu_check_eager.py)."""
    tiny_model = randomise(EAR(replace(TINY, order=order)))
    monkeypatch.setattr(EAR, "_check_labels", lambda *arguments: None)  # looks at values on a CPU only
    monkeypatch.setattr(masking, "draw_num_masked", lambda *arguments: 13)  # reads a CPU generator
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    with _RefuseHostReads():
        tiny_model.train()(images, labels).backward()
        with torch.no_grad():
            sampling = SamplingConfig(6, 2.0, guidance_from=0.25)
            decode_tokens(tiny_model.eval(), labels, sampling, ImageDraws(1, range(4)))


def test_no_images_and_one_image(tiny_model):
    for batch in (0, 1):
        labels = torch.zeros(batch, dtype=torch.long)
        tiny_model(torch.rand(batch, 1, 8, 8), labels).backward()
        assert tiny_model.sample(labels, steps=3, guidance=2.0).shape == (batch, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "error", "named"),
    [
        (torch.rand(2, 1, 8, 8), torch.tensor([0, 10]), ValueError, "label 10 is out of range; classes are 0..9"),
        (torch.rand(2, 1, 8, 8), torch.tensor([-1, 1]), ValueError, "label -1"),
        (torch.rand(2, 1, 8, 8), torch.tensor([1]), ValueError, "labels have shape (1,)"),
        (torch.rand(2, 1, 8, 8), torch.tensor([1.0, 2.0]), TypeError, "torch.float32"),
        (torch.rand(2, 1, 8, 9), torch.tensor([1, 2]), ValueError, "(2, 1, 8, 9)"),
        (torch.ones(2, 1, 8, 8).int(), torch.tensor([1, 2]), TypeError, "torch.int32"),
    ],
)
def test_bad_training_input_is_named(tiny_model, images, labels, error, named):
    with pytest.raises(error) as caught:
        tiny_model(images, labels)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"guidance_schedule": "cosine"}, "'cosine'"),
    ],
)
def test_bad_sampling_options_are_named(tiny_model, options, named):
    with pytest.raises(ValueError, match=named):
        tiny_model.sample(torch.tensor([1]), **options)
    with pytest.raises(ValueError, match="label 10"):
        tiny_model.sample(torch.tensor([10]))


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"'ear_tiny'.*digits, ear_base, ear_large, ear_huge"):
        EAR.from_preset("ear_tiny")


def test_loss_in_chunks_is_the_same_loss():
    """Loss and every gradient, whatever the number of parts; also scaled, as gradient accumulation does."""
    torch.manual_seed(0)
    model = EAR.from_preset("digits").train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.score.generator.noise_embed.bias.requires_grad_(False)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    found = []
    for chunks in (1, 4, 100):
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(images, labels, num_masked=13, score_loss=TrainingLoss(model.score, chunks))
        (loss / 3).backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == sum(1 for _ in model.parameters())  # the loss, and all gradients but the frozen one
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
