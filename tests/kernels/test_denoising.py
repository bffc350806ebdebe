"""A step back of a diffusion process: kernel against the reference, against the formula, errors."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_kernels import functional
from ear_kernels.head import head_parameters, linear_parameters
from ear_kernels.testing import assert_close_to_eager
from ear_model.scores.diffusion import DenoisingMLP
from ear_model.scores.diffusion_process import DiffusionProcess, cosine_betas
from tests.kernels.generator_fixtures import DEVICE, DTYPES

STEPS = 7


def problem(rows: int, size: int, guided: bool, dtype: torch.dtype) -> dict:
    """Random arguments; what is not to be read is NaN."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE)

    halves = 2 if guided else 1
    output = new(halves * rows, 2 * size)
    if guided:
        output[rows:, size:] = float("nan")
    noise = torch.full((rows, STEPS + 2, size), float("nan"), device=DEVICE)[:, 1:-1]
    noise.copy_(new(rows, STEPS, size))
    noise[:, 0] = float("nan")
    _, process = DiffusionProcess(cosine_betas(40)).respaced(STEPS)
    return {
        "output": output.to(dtype),
        "state": new(rows, size),
        "states": torch.full((halves * rows, size), float("nan"), dtype=dtype, device=DEVICE),
        "noise": noise,
        "table": process.table(0.8).to(DEVICE, torch.float32),
        "guidance": torch.tensor([2.5], device=DEVICE) if guided else None,
    }


@given(st.integers(1, 70), st.sampled_from([1, 4, 16, 37]), st.booleans(), st.sampled_from(DTYPES), st.data())
def test_the_kernel_does_what_the_reference_and_the_process_do(rows, size, guided, dtype, data) -> None:
    at = data.draw(st.integers(-2, STEPS - 1))
    offset = data.draw(st.integers(0, 5))
    given_ = problem(rows, size, guided, dtype)
    time = torch.tensor([at + offset], device=DEVICE)
    results = {}
    for backend in ("triton", "eager"):
        tensors = {name: None if each is None else each.clone() for name, each in given_.items()}
        tensors["noise"] = given_["noise"]  # with its strides
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EAR_KERNELS_BACKEND", backend)
            functional.denoise_step(**tensors, time=time, offset=offset)
        results[backend] = tensors
    ours, expected = results["triton"], results["eager"]
    if at < 0:
        assert torch.equal(ours["state"], given_["state"])
        return
    before = {name: None if each is None else each.double() for name, each in given_.items()}
    (predicted, place), noise = before["output"][:rows].chunk(2, 1), before["noise"][:, STEPS - at] if at else 0.0
    if guided:
        predicted = torch.lerp(before["output"][rows:, :size], predicted, 2.5)
    growth, error, least, most, temperature = before["table"][at]
    deviation = ((least + (most - least) * (place + 1) / 2) / 2).exp()
    exact = growth * before["state"] - error * predicted + deviation * temperature * noise
    assert_close_to_eager("state", ours["state"], expected["state"], exact, ulps=4)
    halves = len(ours["states"]) // rows
    assert torch.equal(ours["states"], ours["state"].to(dtype).repeat(halves, 1))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_net_in_its_halves(monkeypatch, rows, dtype) -> None:
    """Modulations of a given conditioning, and layers over the projected tokens."""
    net = DenoisingMLP(24, 48, 5, 2).to(DEVICE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    net = net.to(dtype)
    states, conditioning = (torch.randn(rows, size, device=DEVICE, dtype=dtype) for size in (5, 48))
    parameters, projection = head_parameters(net, 48), linear_parameters(net.input_proj)
    assert parameters is not None
    assert projection is not None
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    with torch.no_grad():
        mod = functional.generator_modulations(conditioning, [], parameters)
        ours = functional.generator_chain(states, mod, projection, parameters)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        eager = net.denoise(states, conditioning)
        halves = functional.generator_modulations(conditioning, [], parameters)
        halves = functional.generator_chain(states, halves, projection, parameters)
        exact = copy.deepcopy(net).double().denoise(states.double(), conditioning.double())
    assert_close_to_eager("out", ours, eager, exact, ulps=2)
    assert_close_to_eager("eager halves", halves, eager, exact, ulps=2)


def test_what_does_not_fit_is_named() -> None:
    whole = {**problem(3, 4, True, torch.float32), "time": torch.tensor([2], device=DEVICE), "offset": 0}
    for name, value, error, match in (
        ("output", whole["output"][:3], ValueError, r"output has shape \(3, 8\); it must be \[6, 8\]"),
        ("states", whole["states"][:, :3], ValueError, r"states has shape \(6, 3\)"),
        ("noise", whole["noise"][..., :3], ValueError, r"noise has shape \(3, 7, 3\)"),
        ("noise", whole["noise"].transpose(0, 1).contiguous().transpose(0, 1), ValueError, "noise has strides"),
        ("table", whole["table"][:5], ValueError, r"table has shape \(5, 5\); it must be \[7, 5\]"),
        ("guidance", None, ValueError, r"output has shape \(6, 8\); it must be \[3, 8\]"),
        ("time", whole["time"].int(), TypeError, "time torch.int32"),
        ("state", whole["state"].half(), TypeError, "noise has dtype torch.float32 and state torch.float16"),
        ("output", whole["output"].long(), TypeError, "output has dtype torch.int64"),
        ("output", np.zeros((6, 8)), TypeError, "output"),
    ):
        with pytest.raises(error, match=match):
            functional.denoise_step(**{**whole, name: value})


def test_no_rows() -> None:
    tensors = problem(0, 4, True, torch.float32)
    functional.denoise_step(**tensors, time=torch.tensor([2], device=DEVICE), offset=0)
