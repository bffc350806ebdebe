"""accelerate()d models as files and copies; masks and draws as wide as the public ones."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.public_ear import PublicEAR, initialise
from ear_kernels import accelerate
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_generator_accelerate import (
    Calm,
    Ear,
    Mar,
    ScoreLoss,
    backend,
    loss_and_gradients,
    randomised,
    same,
)
from tests.kernels.test_public_blocks import TimmEar

__all__ = ["backend"]

INPUTS = {
    Ear: lambda: (torch.randn(3, 5, 4, device=DEVICE), torch.rand(3, 5, device=DEVICE)),
    TimmEar: lambda: (torch.randn(3, 5, 4, device=DEVICE), torch.rand(3, 5, device=DEVICE)),
    Mar: lambda: (
        torch.randn(6, 4, device=DEVICE),
        torch.arange(6, device=DEVICE),
        torch.randn(6, 12, device=DEVICE),
    ),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("kind", INPUTS)
def test_copies_are_accelerated_by_themselves(kind, copied) -> None:
    """The same loss and gradients; a copy's methods work on the copy, which can be accelerated again."""
    model, inputs = randomised(kind()), INPUTS[kind]()
    before = loss_and_gradients(model, *inputs)
    report = accelerate(model)
    other = copied(model)
    same(before, loss_and_gradients(other, *inputs))
    for path, module in other.named_modules():
        own = {name: method for name, method in vars(model.get_submodule(path)).items() if hasattr(method, "func")}
        assert {name: vars(module)[name].func for name in own} == {name: each.func for name, each in own.items()}
        assert all(vars(module)[name].args == (module,) for name in own)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    same(before, loss_and_gradients(model, *inputs))
    assert not torch.allclose(loss_and_gradients(other, *inputs)["loss"], before["loss"])
    assert accelerate(other).methods == report.methods


LOADING = """
import sys, numpy, torch
assert not any(name.startswith(("ear_kernels", "ear_model")) for name in sys.modules)
model = torch.load(sys.argv[1], weights_only=False)
inputs, labels = torch.load(sys.argv[2])
torch.manual_seed(1)
loss = model(inputs, labels)
model.eval()
numpy.random.seed(2)
torch.manual_seed(2)
with torch.no_grad():
    sample = model.sample_tokens(2, 3, 2.0, labels=labels[:2])
torch.save([loss.detach(), sample, "sample_tokens" in vars(model)], sys.argv[3])
"""


def test_a_new_process_loads_a_saved_model(tmp_path: Path) -> None:
    """One that has imported nothing of ours; sampling included."""
    import numpy

    from tests.model.conftest import TINY

    model = PublicEAR(TINY).train()
    initialise(model, int(torch.randint(1000, ())))
    accelerate(model)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([1, 0, 3, 2])
    torch.save(model, tmp_path / "model.pt")
    torch.save([images, labels], tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt", "inputs.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", LOADING, *files], check=True, cwd=Path(__file__).parents[2])
    loss, sample, is_ours = torch.load(files[2])
    assert is_ours
    torch.manual_seed(1)
    torch.testing.assert_close(model(images, labels).detach(), loss)
    numpy.random.seed(2)
    torch.manual_seed(2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().sample_tokens(2, 3, 2.0, labels=labels[:2]), sample)


MASKS = {
    "weights": lambda shape: torch.rand(shape),
    "quarter": lambda shape: torch.tensor([0.25, 1.0]).repeat(shape.numel())[: shape.numel()].view(shape),
    "some 0": lambda shape: torch.rand(shape) * (torch.rand(shape) < 0.5) + torch.eye(shape[0], 1).view(-1, 1)[0],
    "counts": lambda shape: torch.randint(1, 4, shape),
    "bool": lambda shape: torch.rand(shape) < 0.7,
    "large": lambda shape: 100 * torch.rand(shape),
    "double": lambda shape: torch.rand(shape, dtype=torch.float64),
    "half": lambda shape: torch.rand(shape).bfloat16(),
}


@pytest.mark.parametrize("mask_of", MASKS.values(), ids=MASKS)
def test_masks_weigh_as_in_the_public_code(backend, mask_of) -> None:
    """Loss and gradients of the loss alone and of the whole model, whatever numbers the mask has."""
    model = randomised(Ear())
    x = torch.randn(3, 5, 4, device=DEVICE)
    mask = mask_of(torch.Size((3, 5))).to(DEVICE)
    mask.view(-1)[0] = 1
    loss = model.scoreloss
    target, z, row_mask = x.view(15, 4), torch.randn(15, 12, device=DEVICE), mask.view(15)
    before = loss_and_gradients(model, x, mask), loss_and_gradients(loss, target, z, row_mask)
    accelerate(model)
    # bfloat16 masks are summed in bfloat16 there.
    limits = {"atol": 0.02, "rtol": 0.02} if mask.dtype == torch.bfloat16 else {"atol": 2e-6, "rtol": 2e-4}
    for expected, found in zip(
        before, (loss_and_gradients(model, x, mask), loss_and_gradients(loss, target, z, row_mask)), strict=True
    ):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, check_dtype=False, **limits, msg=name)


def test_a_mask_with_a_gradient_gets_it() -> None:
    found = []
    loss = randomised(ScoreLoss())
    target, z, mask = (
        torch.randn(6, 4, device=DEVICE),
        torch.randn(6, 12, device=DEVICE),
        torch.rand(6, device=DEVICE),
    )
    for is_ours in (False, True):
        if is_ours:
            accelerate(loss)
        leaf = mask.clone().requires_grad_()
        torch.manual_seed(1)
        loss(target, z, leaf).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_options_out_of_range_are_the_public_codes() -> None:
    """Set after accelerate(): the public code computes with them."""
    model, inputs = randomised(Ear()), INPUTS[Ear]()
    model.scoreloss.train_temperature = 1.5
    before = loss_and_gradients(model, *inputs)
    model.scoreloss.train_temperature = 1.0
    accelerate(model)
    model.scoreloss.train_temperature = 1.5
    same(before, loss_and_gradients(model, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_calm_draws_in_the_default_dtype(dtype) -> None:
    """The same numbers as the public code, whose draws do not follow the dtype of the mean."""
    model = Calm().to(DEVICE)
    x, mean, log_std = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((8, 5, 4), (5, 4), (5, 4)))
    torch.manual_seed(3)
    before = model.energy_score(x, mean, log_std)
    accelerate(model)
    torch.manual_seed(3)
    found = model.energy_score(x, mean, log_std)
    # The public code rounds each sample's distances to bfloat16, ours does not.
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, before, atol=limit, rtol=limit, check_dtype=False)


def test_one_sample_is_calms_own() -> None:
    model = Calm().to(DEVICE)
    accelerate(model)
    inputs = [torch.randn(1, 5, 4, device=DEVICE), *(torch.randn(5, 4, device=DEVICE) for _ in range(2))]
    assert model.energy_score(*inputs).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_dtypes(backend, monkeypatch, dtype) -> None:
    """Loss near that of the public code in the same dtype; kernels that are demanded and missing are an error."""
    model = randomised(TimmEar()).to(dtype)
    x, mask = torch.randn(3, 5, 4, device=DEVICE, dtype=dtype), torch.rand(3, 5, device=DEVICE, dtype=dtype)
    before = loss_and_gradients(model, x, mask)
    accelerate(model)
    if os.environ["EAR_KERNELS_BACKEND"] == "triton" and dtype == torch.float64:
        with pytest.raises(NotImplementedError, match="float64"):
            loss_and_gradients(model, x, mask)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    found = loss_and_gradients(model, x, mask)
    limit = 0.1 if dtype == torch.bfloat16 else 1e-6
    for name, value in before.items():
        error, scale = (found[name].double() - value.double()).norm(), value.double().norm()
        assert error <= limit * scale + 0.1 * limit, name
