"""Nothing of a generator is bypassed: adapters, computed weights and hooks have eager's values and gradients."""

import pytest
import torch
from torch import nn

from ear_kernels import FusedAdaLNBlock, FusedMLPGenerator, accelerate, modules
from ear_kernels.runtime import plain
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_generator_accelerate import Block, Ear, EarNet, loss_and_gradients, randomised, same
from tests.spoilers import ANY, LINEAR, Spoiler, backward_hook, hook, lora, pre_hook, scaled_forward

BLOCK = ("mlp.0", "mlp.2", "adaLN_modulation.1")
LINEARS = [
    *("noise_embed", "input_proj", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    *(f"res_blocks.1.{name}" for name in BLOCK),
]
OTHERS = [
    *(
        "res_blocks.0",
        "res_blocks.0.in_ln",
        "res_blocks.0.mlp",
        "res_blocks.0.mlp.1",
        "res_blocks.1.adaLN_modulation",
    ),
    *("res_blocks.1.adaLN_modulation.0", "final_layer", "final_layer.adaLN_modulation"),
    "final_layer.adaLN_modulation.0",
]
CASES = [*((spoil, LINEARS) for spoil in LINEAR.values()), *((spoil, LINEARS + OTHERS) for spoil in ANY.values())]


@pytest.fixture(params=["block by block", "whole"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a generator, on a CPU, too."""
    if request.param == "whole":
        monkeypatch.setattr(modules, "choose_backend", lambda *arguments: "triton")
    return request.param


def both() -> tuple[EarNet, FusedMLPGenerator]:
    """A generator as the public code has it, which calls every module, and ours of the same weights."""
    eager = randomised(EarNet(12, 16, 4, 8, 2))
    ours = FusedMLPGenerator(12, 16, 4, depth=2, noise_dim=8).to(DEVICE)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def spoil_both(spoil: Spoiler, name: str, *models: nn.Module) -> None:
    """The same to each, with the same draws."""
    seed = int(torch.randint(1000, ()))
    for model in models:
        torch.manual_seed(seed)
        spoil(model, name)
        model.to(DEVICE)


def check(eager: EarNet, ours: FusedMLPGenerator) -> None:
    z, noise = torch.randn(5, 12, device=DEVICE), torch.rand(5, 3, 8, device=DEVICE)
    found = []
    for model, inputs in ((eager, z.unsqueeze(1).expand(-1, 3, -1)), (ours, z)):
        model.train().zero_grad()
        out = model(inputs, noise, 1.0)
        out.square().mean().backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.eval()
        with torch.no_grad():
            found.append({"out": out.detach(), **gradients, "eval": model(inputs, noise, 0.7)})
    same(*found)


@pytest.mark.parametrize(("spoil", "names"), CASES, ids=[*LINEAR, *ANY])
def test_a_generator_calls_what_is_not_plain(path, spoil, names) -> None:
    """Values and gradients of the public code, whichever module is spoiled, those of adapters included."""
    for name in names:
        eager, ours = both()
        inputs = torch.randn(1, 12, device=DEVICE), torch.randn(1, 8, device=DEVICE)
        before = ours(*inputs).detach()
        assert ours.plain_parameters() is not None
        spoil_both(spoil, name, eager, ours)
        assert ours.plain_parameters() is None
        check(eager, ours)
        assert "backward" in spoil.__name__ or not torch.allclose(ours(*inputs), before), name


def test_a_removed_hook_is_none(path) -> None:
    eager, ours = both()
    handle = hook(ours, "final_layer.linear")
    assert ours.plain_parameters() is None
    handle.remove()
    assert ours.plain_parameters() is not None
    check(eager, ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.res_blocks[0].in_ln, "eps", 0.5),
        lambda net: net.res_blocks[0].mlp.append(nn.Tanh()),
        lambda net: setattr(net.res_blocks[1].mlp, "1", nn.Tanh()),
        lambda net: setattr(net.res_blocks[1].adaLN_modulation, "0", nn.Tanh()),
        lambda net: setattr(net.final_layer.adaLN_modulation, "0", nn.Tanh()),
        lambda net: net.res_blocks[1].mlp[0].register_parameter("bias", None),
        lambda net: net.res_blocks[1].in_ln.register_parameter("bias", None),
    ],
)
def test_other_numbers_and_modules_count(path, change) -> None:
    """A norm's eps, another activation, a module more, a bias less."""
    eager, ours = both()
    change(eager)
    change(ours)
    check(eager, ours)


def test_each_block_has_its_own_mode(path) -> None:
    """The temperature applies to the blocks that are in eval mode."""
    eager, ours = both()
    inputs = torch.randn(5, 12, device=DEVICE), torch.rand(5, 8, device=DEVICE), 0.3
    for other in (True, False):
        for model in (eager, ours):
            model.train(other)
            model.res_blocks[0].train(not other)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), eager(*inputs), atol=1e-5, rtol=1e-5)


class Twice(FusedAdaLNBlock):
    def forward(self, hidden, conditioning, temperature=1.0, *, activated=False):
        return 2 * super().forward(hidden, conditioning, temperature, activated=activated)


def test_a_subclass_of_a_block_is_called(path) -> None:
    eager, ours = both()
    block = Twice(16).to(DEVICE)
    block.load_state_dict(ours.res_blocks[0].state_dict())
    ours.res_blocks[0] = block
    hook(eager, "res_blocks.0")
    check(eager, ours)


def test_shared_noise_goes_through_what_is_not_plain() -> None:
    """With about as many vectors as asked for, the same rows get the same ones."""
    ours = both()[1]
    z, noise = torch.randn(6, 12, device=DEVICE), torch.rand(6, 2, 8, device=DEVICE)
    expected = ours(z, noise, noise_pool=5)
    ours.res_blocks[0].mlp[1].register_forward_hook(lambda module, inputs, output: output.clone())
    assert ours.plain_parameters() is None
    torch.testing.assert_close(ours(z, noise, noise_pool=5), expected, atol=1e-5, rtol=1e-5)
    hook(ours, "res_blocks.1.mlp.0")
    assert not torch.allclose(ours(z, noise, noise_pool=5), expected)


def test_modulations_and_chain_refuse_what_they_would_leave_out() -> None:
    ours = both()[1]
    noise, z = torch.rand(3, 8, device=DEVICE), torch.rand(3, 12, device=DEVICE)
    made = ours.modulations(noise)
    lora(ours, "res_blocks.0.mlp.0")
    for call in (lambda: ours.modulations(noise), lambda: ours.chain(z, made)):
        with pytest.raises(ValueError, match="hooks, a wrapper or computed weights"):
            call()


@pytest.mark.parametrize("name", ["adaLN_modulation", "adaLN_modulation.0", "adaLN_modulation.1", "in_ln", "mlp.2"])
@pytest.mark.parametrize("spoil", [hook, pre_hook, scaled_forward, backward_hook])
def test_a_block_calls_what_is_not_plain(spoil, name) -> None:
    eager = randomised(Block(16))
    ours = FusedAdaLNBlock(16).to(DEVICE)
    ours.load_state_dict(eager.state_dict())
    spoil_both(spoil, name, eager, ours)
    hidden, conditioning = (torch.randn(7, 16, device=DEVICE) for _ in range(2))
    found = []
    for model in (eager, ours):
        leaves = [hidden.clone().requires_grad_(), conditioning.clone().requires_grad_()]
        out = model(*leaves)
        out.square().mean().backward()
        found.append({"out": out.detach(), "hidden": leaves[0].grad, "conditioning": leaves[1].grad})
    same(*found)
    if name in ("adaLN_modulation", "adaLN_modulation.0"):
        with pytest.raises(ValueError, match="activated is True"):
            ours(hidden, conditioning, activated=True)


@pytest.mark.parametrize("spoil", [hook, lora, scaled_forward])
def test_compiled_generators_call_what_is_not_plain(spoil) -> None:
    eager, ours = both()
    spoil_both(spoil, "res_blocks.1.mlp.2", eager, ours)
    torch._dynamo.reset()
    z, noise = torch.randn(5, 12, device=DEVICE), torch.rand(5, 8, device=DEVICE)
    found = torch.compile(ours, backend="aot_eager")(z, noise)
    torch.testing.assert_close(found, eager(z, noise, 1.0), atol=1e-5, rtol=1e-5)


def test_hooks_of_all_modules_and_patched_classes_see_the_same_calls(path, monkeypatch) -> None:
    eager, ours = both()
    z, noise = torch.randn(5, 12, device=DEVICE), torch.rand(5, 8, device=DEVICE)
    seen: list[list[str]] = []
    for model in (eager, ours):
        seen.append([])
        names = {each: name for name, each in model.named_modules() if isinstance(each, nn.Linear | nn.LayerNorm)}

        def note(module, inputs, output, names=names):
            if module in names and "norm_final" not in names[module]:
                seen[-1].append(names[module])

        with nn.modules.module.register_module_forward_hook(note):
            model(z, noise, 1.0)
    assert sorted(seen[0]) == sorted(seen[1])
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * linear(self, x))
    torch.testing.assert_close(ours(z, noise), eager(z, noise, 1.0), atol=1e-5, rtol=1e-5)


def test_tensors_of_another_dtype_or_kind_are_not_read() -> None:
    ours = both()[1]
    ours.res_blocks[0].mlp[0].double()
    assert ours.plain_parameters() is None
    ours.double()
    assert ours.plain_parameters() is not None

    class Special(torch.Tensor):
        pass

    ours.input_proj.weight = nn.Parameter(ours.input_proj.weight.detach().as_subclass(Special))
    assert ours.plain_parameters() is None


def test_only_our_methods_are_known_as_ours() -> None:
    module = nn.Linear(2, 2)
    plain.replace_method(module, "extra_repr", accelerate)
    assert not plain.is_replaced(module, "extra_repr")
    module.extra_repr = lambda: ""
    assert plain.is_replaced(module, "extra_repr")
    assert not plain.is_replaced(module, "forward")


@pytest.mark.parametrize("is_late", [True, False], ids=["after accelerate", "before"])
@pytest.mark.parametrize("spoil", [*LINEAR.values(), *ANY.values()], ids=[*LINEAR, *ANY])
def test_an_accelerated_model_calls_what_is_not_plain(spoil, is_late) -> None:
    """Loss and gradients of the public code; before accelerate(), it may refuse such a model, but never bypass."""
    for name in ("noise_embed", "input_proj", "res_blocks.1.mlp.0", "final_layer.linear", "final_layer"):
        if name == "final_layer" and spoil in LINEAR.values():
            continue
        eager, model = randomised(Ear()), Ear().to(DEVICE)
        model.load_state_dict(eager.state_dict())
        if is_late:
            accelerate(model)
        spoil_both(spoil, f"scoreloss.net.{name}", eager, model)
        if not is_late:
            try:
                accelerate(model)
            except ValueError:
                assert spoil in LINEAR.values()
        x, mask = torch.randn(3, 5, 4, device=DEVICE), torch.rand(3, 5, device=DEVICE)
        same(loss_and_gradients(eager, x, mask), loss_and_gradients(model, x, mask))


@pytest.mark.parametrize("name", ["scoreloss", "scoreloss.net"])
@pytest.mark.parametrize("is_late", [True, False])
def test_a_forward_of_somebody_else_is_left_alone(name, is_late) -> None:
    """On the instance, before accelerate() or after it."""
    eager, model = randomised(Ear()), Ear().to(DEVICE)
    model.load_state_dict(eager.state_dict())
    scaled_forward(eager, name)
    if is_late:
        report = accelerate(model)
        model.get_submodule(name).__dict__.pop("forward")
        scaled_forward(model, name)
    else:
        scaled_forward(model, name)
        report = accelerate(model)
        assert f"{name}.forward" not in report.methods
    x, mask = torch.randn(3, 5, 4, device=DEVICE), torch.ones(3, 5, device=DEVICE)
    same(loss_and_gradients(eager, x, mask), loss_and_gradients(model, x, mask))
