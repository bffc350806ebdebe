"""accelerate() on timm's blocks in a model of the public layout: same loss and gradients, and nothing bypassed."""

import copy
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ear_kernels import accelerate, public_blocks
from ear_kernels.functional import BlockOptions, transformer_block
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_generator_accelerate import Ear, backend, loss_and_gradients, randomised, same

__all__ = ["backend"]


class TimmEar(Ear):
    """The stand-in with two timm blocks and the public loop over them."""

    def __init__(self, **options) -> None:
        super().__init__()
        options = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6)} | options
        self.decoder_blocks = nn.ModuleList(TimmBlock(12, 3, 2.0, **options) for _ in range(2))
        self.is_checkpointed = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = self.z_proj(x)
        for block in self.decoder_blocks:
            z = checkpoint(block, z, use_reentrant=False) if self.is_checkpointed else block(z)
        return self.forward_loss(z, x, mask)


def timm_problem(**options) -> tuple[TimmEar, Tensor, Tensor]:
    torch.manual_seed(0)
    model = randomised(TimmEar(**options))
    return model, torch.randn(3, 5, 4, device=DEVICE), (torch.rand(3, 5, device=DEVICE) < 0.8).float()


@pytest.fixture
def fused(monkeypatch) -> list[BlockOptions]:
    """The options of each call of the operation for a block."""
    calls: list[BlockOptions] = []

    def counted(x, block, options):
        calls.append(options)
        return transformer_block(x, block, options)

    monkeypatch.setattr(public_blocks, "transformer_block", counted)
    return calls


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "proj_bias": False}], ids=["biases", "no biases"])
def test_timm_blocks_give_the_same_loss_and_gradients(backend, fused, options, is_checkpointed) -> None:
    model, x, mask = timm_problem(**options)
    model.is_checkpointed = is_checkpointed
    before = loss_and_gradients(model, x, mask)
    state = list(model.state_dict())
    report = accelerate(model)
    assert "decoder_blocks.*.forward" in str(report)
    assert list(model.state_dict()) == state
    same(before, loss_and_gradients(model, x, mask))
    assert len(fused) == 2 * (1 + is_checkpointed)
    assert accelerate(copy.deepcopy(model)).kind == "EAR"


@pytest.mark.skipif(DEVICE == "cuda", reason="the reference draws as timm does, the kernels from their own counters")
def test_timm_blocks_drop_what_timm_drops(fused) -> None:
    model, x, mask = timm_problem(proj_drop=0.3, attn_drop=0.2)
    before = loss_and_gradients(model, x, mask)
    accelerate(model)
    same(before, loss_and_gradients(model, x, mask))
    assert fused[0] == BlockOptions(3, 0.2, (0.3, 0.3, 0.3))
    model.eval()
    hidden = torch.randn(2, 7, 12)
    with torch.no_grad():
        expected = type(model.decoder_blocks[0]).forward(model.decoder_blocks[0], hidden)
        torch.testing.assert_close(model.decoder_blocks[0](hidden), expected, atol=2e-6, rtol=2e-4)
    assert fused[-1] == BlockOptions(3, 0.0, (0.0, 0.0, 0.0))
    # Each module's own switch counts.
    model.decoder_blocks[0].mlp.drop1.train()
    model.decoder_blocks[0](hidden)
    assert fused[-1].dropouts == (0.0, 0.3, 0.0)


class Lora(nn.Module):
    """What adapters put in the place of a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False, device=base.weight.device)
        self.up = nn.Linear(2, base.out_features, bias=False, device=base.weight.device)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def doubled(module, inputs, output):
    return 2 * output


def set_lora(block) -> None:
    block.mlp.fc1 = Lora(block.mlp.fc1)


def set_forward(block) -> None:
    inner = block.attn.proj.forward
    block.attn.proj.forward = lambda x: 2 * inner(x)


def set_weight_norm(block) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(block.attn.qkv)
    # Another weight than the last one computed.
    with torch.no_grad():
        block.attn.qkv.weight_g.mul_(2)


SPOILERS = {
    "hook of a linear": lambda block: block.mlp.fc2.register_forward_hook(doubled),
    "pre-hook of a norm": lambda block: block.norm1.register_forward_pre_hook(
        lambda module, inputs: (2 * inputs[0],)
    ),
    "backward hook": lambda block: block.norm2.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    "hook of the attention": lambda block: block.attn.register_forward_hook(doubled),
    "LoRA": set_lora,
    "another forward": set_forward,
    "weight norm": set_weight_norm,
    "parametrisation": lambda block: nn.utils.parametrizations.orthogonal(block.mlp.fc1),
    "pruning": lambda block: prune.l1_unstructured(block.mlp.fc1, "weight", 0.5),
    "tanh GELU": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "SiLU": lambda block: setattr(block.mlp, "act", nn.SiLU()),
    "norm of queries": lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(4, device=DEVICE)),
    "layer scale": lambda block: setattr(block, "ls1", LayerScale(12, device=DEVICE)),
    "no weight of a norm": lambda block: setattr(block, "norm1", nn.LayerNorm(12, elementwise_affine=False)),
    "everything dropped": lambda block: setattr(block.mlp.drop2, "p", 1.0),
    "scale": lambda block: (setattr(block.attn, "scale", 0.1), setattr(block.attn, "fused_attn", False)),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
@pytest.mark.parametrize("is_late", [True, False], ids=["after accelerate", "before"])
def test_nothing_of_a_block_is_bypassed(fused, spoil, is_late) -> None:
    """A block that does more than its weights say runs timm's forward, the other one stays fused."""
    model, x, mask = timm_problem()
    if is_late:
        accelerate(model)
    spoil(model.decoder_blocks[1])
    if not is_late:
        accelerate(model)
    found = loss_and_gradients(model, x, mask)
    assert len(fused) == 1
    for block in model.decoder_blocks:
        block.__dict__.pop("forward", None)
    same(found, loss_and_gradients(model, x, mask))


def test_masks_compilers_and_global_hooks_get_timms_forward(fused) -> None:
    model = timm_problem()[0]
    block, hidden = model.decoder_blocks[0], torch.randn(2, 5, 12, device=DEVICE)
    accelerate(model)
    mask = torch.eye(5, dtype=torch.bool, device=DEVICE)
    expected = type(block).forward(block, hidden, attn_mask=mask)
    for arguments, named in (((mask,), {}), ((), {"attn_mask": mask}), ((None,), {"attn_mask": mask})):
        if not (arguments and named):
            torch.testing.assert_close(block(hidden, *arguments, **named), expected)
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None):
        block(hidden)
    with FlopCounterMode(display=False) as counter:
        block(hidden)
    assert counter.get_total_flops() > 0
    with pytest.raises(RuntimeError, match=r"dtype|expected scalar type"):
        block(hidden.double())
    assert not fused
    block(hidden, attn_mask=None)
    assert len(fused) == 1


class Parallel(TimmBlock):
    """The same submodules, another arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


def test_a_block_with_a_forward_of_its_own_is_left_alone() -> None:
    model, _, _ = timm_problem()
    model.decoder_blocks[1] = Parallel(12, 3)
    accelerate(model)
    assert "forward" in vars(model.decoder_blocks[0])
    assert "forward" not in vars(model.decoder_blocks[1])


@pytest.mark.gpu
def test_timm_blocks_under_autocast_are_within_the_bf16_error(fused) -> None:
    """Loss and gradients without dropout: at most twice as far from float32 as timm's own blocks under autocast."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(TimmBlock(768, 12, qkv_bias=True) for _ in range(3))).cuda().train()
    for block in blocks:
        block.norm1, block.norm2 = (nn.LayerNorm(768, eps=1e-6, device="cuda") for _ in range(2))
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
    x, grad = (torch.randn(4, 320, 768, device="cuda") for _ in range(2))
    found = []
    for enabled, is_ours in ((False, False), (True, False), (True, True)):
        for block in blocks:
            block.forward = MethodType(public_blocks.forward if is_ours else TimmBlock.forward, block)
        blocks.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            out = blocks(x)
        out.backward(grad)
        gradients = {name: parameter.grad.clone() for name, parameter in blocks.named_parameters()}
        found.append({"out": out.detach(), **gradients})
    assert len(fused) == 3
    exact, eager, ours = found
    for name, truth in exact.items():
        assert (ours[name] - truth).norm() <= 2 * (eager[name] - truth).norm() + 1e-3 * truth.norm(), name


@pytest.mark.gpu
def test_timm_blocks_drop_the_same_share_on_a_gpu(fused) -> None:
    """Over many draws the mean output is timm's within six standard errors, and so is its deviation."""
    torch.manual_seed(0)
    block = TimmBlock(64, 2, qkv_bias=True, proj_drop=0.2, attn_drop=0.1).cuda().train()
    block.norm1, block.norm2 = nn.LayerNorm(64, device="cuda"), nn.LayerNorm(64, device="cuda")
    x = torch.randn(1, 40, 64, device="cuda").expand(2048, -1, -1)
    outs = []
    for function in (TimmBlock.forward, public_blocks.forward):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outs.append(function(block, x).double())
    assert len(fused) == 1
    (mean, other), deviations = (out.mean(0) for out in outs), [out.std(0) for out in outs]
    error = (mean - other).abs() / (2 / 2048) ** 0.5 / deviations[0].clamp_min(1e-3)
    assert error.max() < 6
    assert (deviations[1] / deviations[0] - 1).abs().mean() < 0.05
