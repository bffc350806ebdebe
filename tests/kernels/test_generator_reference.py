"""adaln_modulate, gated_silu_ffn and FusedMLPGenerator against literal formulas and finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels import FusedAdaLNBlock, FusedMLPGenerator, adaln_modulate, gated_silu_ffn


def _literal_adaln(hidden, shift, scale, weight, bias, eps):
    mean = hidden.mean(dim=-1, keepdim=True)
    variance = ((hidden - mean) ** 2).mean(dim=-1, keepdim=True)
    normalised = (hidden - mean) / (variance + eps) ** 0.5
    if weight is not None:
        normalised = normalised * weight + bias
    return normalised * (1 + scale) + shift


@st.composite
def adaln_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    width = draw(st.integers(2, 9))

    def normal(*shape):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
        return wide[..., ::2].requires_grad_() if draw(st.booleans()) else wide[..., : shape[-1]].requires_grad_()

    modulation_rows = (1,) * len(rows) if draw(st.booleans()) else rows
    affine = draw(st.booleans())
    hidden, shift, scale = normal(*rows, width), normal(*modulation_rows, width), normal(*modulation_rows, width)
    return hidden, shift, scale, normal(width) if affine else None, normal(width) if affine else None


@settings(max_examples=60, deadline=None)
@given(adaln_cases())
def test_adaln_matches_the_formula_and_finite_differences(case):
    torch.testing.assert_close(adaln_modulate(*case), _literal_adaln(*case, 1e-6))
    assert torch.autograd.gradcheck(lambda *tensors: adaln_modulate(*tensors, eps=1e-3), case)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_gated_ffn_matches_the_formula_and_finite_differences(seed, rows, width, inner, has_bias):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, modulated, gate = normal(rows, width), normal(rows, width + 1), normal(1, width)
    weight_in, weight_out = normal(inner, width + 1), normal(width, inner)
    bias_in, bias_out = (normal(inner), normal(width)) if has_bias else (None, None)
    before = modulated @ weight_in.T + (bias_in if has_bias else 0)
    after = (before / (1 + torch.exp(-before))) @ weight_out.T + (bias_out if has_bias else 0)
    arguments = (hidden, modulated, gate, weight_in, bias_in, weight_out, bias_out)
    torch.testing.assert_close(gated_silu_ffn(*arguments), hidden + gate * after)
    assert torch.autograd.gradcheck(gated_silu_ffn, arguments)


def _randomise(module):
    """Fresh values for every parameter: at initialisation the output is zero and hides mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def _public_head(state, z, noise, temperature, depth):
    """The head of docs/model.md (Generator) from its public state dict, in the public code's order of operations."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    conditioning, hidden = linear(noise, "noise_embed"), linear(z, "input_proj")
    for index in range(depth):
        name = f"res_blocks.{index}"
        shift, scale, gate = linear(silu(conditioning), f"{name}.adaLN_modulation.1").split(hidden.shape[-1], dim=-1)
        modulated = _literal_adaln(
            hidden, temperature * shift, scale, state[f"{name}.in_ln.weight"], state[f"{name}.in_ln.bias"], 1e-6
        )
        hidden = hidden + gate * linear(silu(linear(modulated, f"{name}.mlp.0")), f"{name}.mlp.2")
    shift, scale = linear(silu(conditioning), "final_layer.adaLN_modulation.1").split(hidden.shape[-1], dim=-1)
    return linear(_literal_adaln(hidden, shift, scale, None, None, 1e-6), "final_layer.linear")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_generator_matches_the_public_head(temperature):
    generator = _randomise(FusedMLPGenerator(6, 8, 3, depth=2, noise_dim=5)).double().eval()
    z, noise = torch.randn(7, 6, dtype=torch.float64), torch.rand(7, 5, dtype=torch.float64) - 0.5
    expected = _public_head(generator.state_dict(), z, noise, temperature, depth=2)
    torch.testing.assert_close(generator(z, noise, temperature), expected)


def test_several_samples_are_the_same_as_repeated_rows():
    generator = _randomise(FusedMLPGenerator(6, 8, 3, depth=2, noise_dim=5)).double()
    z, noise = torch.randn(2, 7, 6, dtype=torch.float64), torch.rand(2, 7, 4, 5, dtype=torch.float64)
    expected = generator(z.unsqueeze(2).repeat(1, 1, 4, 1), noise)
    assert expected.shape == (2, 7, 4, 3)
    torch.testing.assert_close(generator(z, noise), expected)


def test_input_projection_runs_once_a_token():
    generator = FusedMLPGenerator(6, 8, 3, depth=1)
    seen = []
    generator.input_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    generator(torch.randn(7, 6), torch.rand(7, 4, 64))
    assert seen == [(7, 8)]


def test_temperature_counts_in_eval_mode_only():
    generator = _randomise(FusedMLPGenerator(6, 8, 3, depth=2))
    z, noise = torch.randn(7, 6), torch.rand(7, 64)
    generator.train()
    assert torch.equal(generator(z, noise, 0.5), generator(z, noise))
    generator.eval()
    assert not torch.allclose(generator(z, noise, 0.5), generator(z, noise))
    as_tensor = generator(z, noise, torch.tensor(0.5))
    torch.testing.assert_close(as_tensor, generator(z, noise, 0.5))


def test_initial_values():
    generator = FusedMLPGenerator(32, 48, 16, depth=2)
    state = generator.state_dict()
    zero = ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    zero += [f"res_blocks.{index}.adaLN_modulation.1" for index in range(2)]
    for name, tensor in state.items():
        if name.endswith("in_ln.weight"):
            assert torch.equal(tensor, torch.ones(48))
        elif name.endswith("bias") or name.rsplit(".", 1)[0] in zero:
            assert not tensor.any(), name
        else:
            limit = math.sqrt(6 / sum(tensor.shape))
            assert 0.9 * limit < tensor.abs().max() <= limit, name


def test_state_dict_has_the_public_keys():
    expected = {"noise_embed", "input_proj", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    for index in range(3):
        names = ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")
        expected |= {f"res_blocks.{index}.{name}" for name in names}
    keys = FusedMLPGenerator(4, 8, 2, depth=3).state_dict().keys()
    assert set(keys) == {f"{name}.{kind}" for name in expected for kind in ("weight", "bias")}


def test_block_takes_the_activated_conditioning_too():
    block = _randomise(FusedAdaLNBlock(8))
    hidden, conditioning = torch.randn(5, 8), torch.randn(5, 8)
    activated = torch.nn.functional.silu(conditioning)
    torch.testing.assert_close(block(hidden, conditioning), block(hidden, activated, activated=True))


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_any_number_of_rows(shape):
    generator = FusedMLPGenerator(6, 8, 3, depth=1)
    output = generator(torch.randn(*shape, 6), torch.rand(*shape, 4, 64))
    assert output.shape == (*shape, 4, 3)
    output.sum().backward()


@pytest.mark.parametrize(
    ("z", "noise", "error", "named"),
    [
        (torch.randn(4, 5), torch.rand(4, 64), ValueError, "z has shape (4, 5)"),
        (torch.randn(4, 6), torch.rand(4, 63), ValueError, "noise has shape (4, 63)"),
        (torch.randn(4, 6), torch.rand(3, 64), ValueError, "noise has shape (3, 64)"),
        (torch.randn(4, 6), torch.rand(4, 2, 2, 64), ValueError, "(4, 2, 2, 64)"),
        (torch.ones(4, 6).long(), torch.rand(4, 64), TypeError, "torch.int64"),
        (torch.randn(4, 6), torch.rand(4, 64, device="meta"), ValueError, "meta"),
    ],
)
def test_bad_generator_input_is_named(z, noise, error, named):
    with pytest.raises(error) as caught:
        FusedMLPGenerator(6, 8, 3)(z, noise)
    assert named in str(caught.value)


@pytest.mark.parametrize(("sizes", "error"), [((0, 8, 3), ValueError), ((6, 8.0, 3), TypeError)])
def test_bad_sizes_are_named(sizes, error):
    with pytest.raises(error, match=r"is (0|8\.0)"):
        FusedMLPGenerator(*sizes)


def test_bad_operation_input_is_named():
    hidden, row = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"shift has shape \(3, 8\)"):
        adaln_modulate(hidden, torch.randn(3, 8), hidden)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
        adaln_modulate(hidden, hidden, hidden, torch.randn(7), row)
    with pytest.raises(TypeError, match=r"scale has dtype torch.int64"):
        adaln_modulate(hidden, hidden, hidden.long())
    square = torch.randn(8, 8)
    with pytest.raises(ValueError, match=r"weight_out has shape \(8, 7\)"):
        gated_silu_ffn(hidden, hidden, hidden, square, row, torch.randn(8, 7), row)
    with pytest.raises(ValueError, match=r"weight_in has shape \(8, 7\)"):
        gated_silu_ffn(hidden, hidden, hidden, torch.randn(8, 7), row, square, row)
    with pytest.raises(ValueError, match=r"bias_out has shape \(7,\)"):
        gated_silu_ffn(hidden, hidden, hidden, square, row, square, torch.randn(7))
    with pytest.raises(ValueError, match=r"modulated has shape \(3, 8\)"):
        gated_silu_ffn(hidden, torch.randn(3, 8), hidden, square, row, square, row)
