"""Nothing of an EAR is bypassed by its blocks, its engines or its graphs; it works in other dtypes, too."""

import copy
import dataclasses

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from benchmarks.public_ear import PublicEAR, initialise
from ear_kernels import accelerate
from ear_model.ear import EAR
from ear_model.model import backbone as backbones
from ear_model.sampling import public
from ear_model.sampling.engine import Engines, compute_dtype, is_plain
from ear_model.training import graphs
from ear_model.training.loss import TrainingLoss
from tests.model.conftest import TINY
from tests.spoilers import ANY, LINEAR, Doubled, backward_hook, hook, lora

CONFIG = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0, width=32, depth=2)
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
OTHERS = ("norm1", "norm2", "attn", "mlp", "mlp.act", "attn.attn_drop", "mlp.drop2", "ls1", "drop_path2")


def model_of(config=CONFIG) -> EAR:
    model = EAR(config)
    initialise(model, int(torch.randint(1000, ())))
    return model


def eager(backbone: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The blocks and the norm by timm's own forward, which calls every submodule."""
    for block in backbone.decoder_blocks:
        hidden = Block.forward(block, hidden)
    return backbone.decoder_norm(hidden)


def check_backbone(model: EAR) -> None:
    hidden = torch.randn(2, 5, CONFIG.width)
    found = []
    for run in (lambda x: eager(model.backbone, x), model.backbone.run_blocks):
        model.zero_grad()
        leaf = hidden.clone().requires_grad_()
        torch.manual_seed(5)
        out = run(leaf)
        out.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"out": out.detach(), "hidden": leaf.grad, **gradients})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("spoil", [*LINEAR.values(), *ANY.values()], ids=[*LINEAR, *ANY])
def test_a_block_calls_what_is_not_plain(spoil) -> None:
    """Values and gradients of timm's forward, whichever submodule is spoiled; engine and graphs step aside."""
    for name in LINEARS if spoil in LINEAR.values() else (*LINEARS, *OTHERS):
        model = model_of()
        assert is_plain(model)
        assert graphs.is_plain(model)
        spoil(model, f"backbone.decoder_blocks.{int(torch.randint(2, ()))}.{name}")
        assert not is_plain(model)
        assert not graphs.is_plain(model)
        check_backbone(model)


@pytest.mark.parametrize("spoil", ANY.values(), ids=ANY)
def test_the_final_norm_is_called(spoil) -> None:
    model = model_of()
    spoil(model, "backbone.decoder_norm")
    assert not is_plain(model)
    assert not graphs.is_plain(model)
    check_backbone(model)


def change_mode(model: EAR) -> None:
    model.backbone.decoder_blocks[0].eval()


def change_last_mode(model: EAR) -> None:
    model.backbone.decoder_blocks[1].eval()


def change_rate(model: EAR) -> None:
    model.backbone.decoder_blocks[0].mlp.drop2.p = 0.7


def change_attention_rate(model: EAR) -> None:
    model.backbone.decoder_blocks[1].attn.attn_drop.p = 0.7


def change_eps(model: EAR) -> None:
    model.backbone.decoder_blocks[1].norm1.eps = 0.3


def change_act(model: EAR) -> None:
    model.backbone.decoder_blocks[1].mlp.act = nn.ReLU()


def drop_bias(model: EAR) -> None:
    model.backbone.decoder_blocks[0].mlp.fc2.bias = None


@pytest.mark.parametrize(
    "change", [change_mode, change_last_mode, change_rate, change_attention_rate, change_eps, change_act, drop_bias]
)
def test_each_submodules_numbers_and_mode_count(change) -> None:
    """Dropout is drawn as timm draws it, block by block."""
    model = model_of(dataclasses.replace(CONFIG, dropout=0.3, attention_dropout=0.2)).train()
    change(model)
    check_backbone(model)


def test_what_the_engine_bypasses_is_its_own() -> None:
    """Linears beside the blocks, computed parameters, methods of a subclass or of an instance."""

    class Other(backbones.Backbone):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    for path in ("backbone.z_proj", "score.generator.noise_embed", "score.generator.res_blocks.0.mlp.2"):
        model = model_of()
        lora(model, path)
        assert not is_plain(model), path
    model = model_of()
    model.backbone.__class__ = Other
    assert not is_plain(model)
    model = model_of()
    model.backbone.run_blocks = lambda hidden: hidden
    assert not is_plain(model)
    model = model_of()
    nn.utils.parametrize.register_parametrization(model.backbone, "mask_token", Doubled())
    assert not is_plain(model)
    model = model_of()
    assert is_plain(model)
    with nn.modules.module.register_module_forward_hook(lambda *arguments: None):
        assert not is_plain(model)
        assert not graphs.is_plain(model)
    assert not is_plain(model.double())


def test_the_whole_model_with_adapters_is_the_merged_one() -> None:
    """Loss, samples, and the adapters' gradients: those of the merged weights by the chain rule."""
    model = model_of()
    merged = copy.deepcopy(model)
    names = ["backbone.decoder_blocks.0.attn.qkv", "backbone.decoder_blocks.1.mlp.fc2", "backbone.z_proj"]
    names += ["score.generator.res_blocks.0.mlp.0", "score.generator.input_proj"]
    for name in names:
        lora(model, name)
        layer = model.get_submodule(name)
        merged.get_submodule(name).weight.data += layer.get_delta_weight("default")
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 3, 9, 1])
    found = []
    for each in (model, merged):
        torch.manual_seed(3)
        loss = each.train()(images, labels)
        loss.backward()
        torch.manual_seed(4)
        found.append((loss.detach(), each.eval().sample(labels, steps=3, guidance=2.0)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    for name in names:
        layer, whole = model.get_submodule(name), merged.get_submodule(name).weight.grad
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"]
        torch.testing.assert_close(up.grad, scale * whole @ down.T, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(down.grad, scale * up.T @ whole, atol=1e-5, rtol=1e-3)


def test_a_loss_in_parts_takes_wrapped_generators() -> None:
    """Gradients of adapters are those of the whole; of parameters that nothing uses they are 0."""
    model = model_of()
    lora(model, "score.generator.res_blocks.0.mlp.2")
    generator = model.score.generator
    generator.unused = nn.Parameter(torch.ones(2))
    hidden, targets = torch.randn(7, CONFIG.width), torch.randn(7, CONFIG.token_dim)
    found = []
    for chunks in (1, 3):
        model.zero_grad()
        torch.manual_seed(1)
        TrainingLoss(model.score, chunks)(hidden.requires_grad_(), targets).backward()
        found.append({name: p.grad for name, p in generator.named_parameters() if name != "unused"})
    assert not generator.unused.grad.any()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_capture_depends_on_where_parameters_lie_and_whether_they_are_trained() -> None:
    model = model_of()
    before = graphs._read_blocks(model.backbone), graphs._read_score(model.score)
    assert before == (graphs._read_blocks(model.backbone), graphs._read_score(model.score))
    block = model.backbone.decoder_blocks[1]
    changes = [
        lambda: block.mlp.fc1.weight.requires_grad_(False),
        lambda: setattr(block.mlp.fc1, "bias", nn.Parameter(torch.zeros_like(block.mlp.fc1.bias))),
        lambda: setattr(block.norm2, "eps", 0.1),
    ]
    for change in changes:
        known = graphs._read_blocks(model.backbone)
        change()
        assert graphs._read_blocks(model.backbone) != known
    generator = model.score.generator
    changes = [
        lambda: setattr(model.score, "tau", 0.9),
        lambda: generator.noise_embed.weight.requires_grad_(False),
        lambda: setattr(generator.noise_embed, "bias", nn.Parameter(torch.zeros_like(generator.noise_embed.bias))),
    ]
    for change in changes:
        known = graphs._read_score(model.score)
        change()
        assert graphs._read_score(model.score) != known


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["backbone.decoder_blocks.0.mlp.fc1", "score.generator.res_blocks.0.mlp.0"])
def test_graphs_of_training_step_aside(path) -> None:
    """A hook that comes after the capture runs, and its effect is in loss and gradients."""
    from ear_model.training.engine import Engine

    model = model_of(dataclasses.replace(CONFIG, width=64)).cuda().train()
    engine = Engine(model)
    engine.capture(4, use_bf16=True, num_masked=[5])
    images, labels = torch.rand(4, 1, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    for spoil in (hook, backward_hook):
        handle = spoil(model, path)
        found = []
        for options in (engine.options, {}):
            model.zero_grad()
            torch.manual_seed(2)
            with engine.scope(), torch.autocast("cuda", torch.bfloat16):
                loss = model(images, labels, num_masked=5, **options)
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*found, atol=2e-3, rtol=2e-2)
        handle.remove()
    hook(model, path)
    fresh = Engine(model)
    fresh.capture(4, use_bf16=True, num_masked=[5])
    assert fresh.blocks is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_train_and_sample(dtype) -> None:
    """Loss and gradients near those of float32, and finite images, whatever the images' dtype."""
    model = model_of()
    labels = torch.tensor([0, 3, 9, 1])
    other = copy.deepcopy(model).to(dtype)
    for images in (torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8).to(dtype)):
        losses = []
        for each in (model, other):
            each.train().zero_grad()
            torch.manual_seed(3)
            losses.append(each(images.float() if each is model else images, labels))
            losses[-1].backward()
        limit = 0.1 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(losses[1].float(), losses[0], atol=limit, rtol=limit)
        for (name, own), exact in zip(other.named_parameters(), model.parameters(), strict=True):
            assert own.grad.dtype == dtype
            assert (own.grad.float() - exact.grad).norm() <= limit * exact.grad.norm() + 1e-3, name
    assert compute_dtype("auto", next(other.parameters())) == dtype
    assert not Engines.takes(other, labels)
    sampled = other.eval().sample(labels, steps=4, guidance=2.0, temperature=0.8)
    assert sampled.dtype == torch.float32
    assert sampled.isfinite().all()


def public_model() -> PublicEAR:
    model = PublicEAR(dataclasses.replace(CONFIG, patch_size=1, channels=4, image_size=4, class_tokens=3)).eval()
    initialise(model, int(torch.randint(1000, ())))
    return model


@pytest.mark.parametrize("spoil", [*LINEAR.values(), *ANY.values()], ids=[*LINEAR, *ANY])
def test_sampling_of_public_models_sees_what_is_not_plain(spoil) -> None:
    """Such a head or block is not read, and the public method runs."""
    for path in (
        "scoreloss.net.noise_embed",
        "scoreloss.net.res_blocks.0.mlp.0",
        "decoder_blocks.0.attn.qkv",
        "z_proj",
    ):
        model = public_model()
        accelerate(model)
        view = public.PublicModel(model)
        assert public._is_read(model)
        assert is_plain(view)
        spoil(model, path)
        is_head = path.startswith("scoreloss")
        assert public._is_read(model) != is_head
        assert is_head or not is_plain(public.PublicModel(model))
        assert model.sample_tokens(2, 3, 2.0, labels=torch.tensor([1, 2])).shape == (2, 4, 4, 4)


def test_methods_that_the_engine_bypasses_may_be_replaced() -> None:
    for owner, name in (("", "forward_mae_decoder"), ("scoreloss", "sample")):
        model = public_model()
        accelerate(model)
        module = model.get_submodule(owner)
        inner = getattr(module, name)
        setattr(module, name, lambda *inputs, inner=inner, **named: 2 * inner(*inputs, **named))
        assert not public._is_read(model)


def test_tied_parameters_are_read() -> None:
    model = public_model()
    blocks = model.scoreloss.net.res_blocks
    blocks.append(blocks[0])
    accelerate(model)
    assert is_plain(public.PublicModel(model))
