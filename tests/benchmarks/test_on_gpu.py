"""What a GPU must show at real sizes: training as in eager, a public model as before, and no host that waits."""

import copy
import functools
import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.public_ear import PublicEAR, initialise
from ear_kernels import accelerate
from ear_kernels.testing import errors
from ear_model.ear import EAR
from ear_model.presets import EAR_BASE, RUNS
from ear_model.training.trainer import Trainer

WINDOW = 20


def digits_curve(monkeypatch, folder, backend: str, factor: float = 1.0, steps: int = 200) -> torch.Tensor:
    """Means over 20 steps of the losses of `ear train digits` in float32, from weights times ``factor``."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    config = RUNS["digits"]
    config = replace(config, train=replace(config.train, precision="fp32"))
    trainer = Trainer(config, folder / f"{backend}-{factor}", device="cuda")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter *= factor
    losses = torch.stack([trainer.train_step()[0] for _ in range(steps)])
    return losses.unflatten(0, (-1, WINDOW)).mean(dim=1)


@pytest.mark.gpu
def test_digits_learn_as_with_the_eager_backend(monkeypatch, tmp_path):
    """Only rounding differs, and training amplifies it: as much as it does weights that are off by 1e-6, or 0.5 %."""
    curves = [digits_curve(monkeypatch, tmp_path, *how) for how in (("eager",), ("auto",), ("eager", 1 + 1e-6))]
    ours, perturbed = (((curves[0] - other).abs() / curves[0]).max().item() for other in curves[1:])
    assert ours <= max(2 * perturbed, 0.005), (ours, perturbed)


def public_gradients(model: PublicEAR, latents, labels, *, low: bool) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=low):
        loss = model(latents, labels)
    loss.backward()
    # In eval mode no image gets the null class.
    found = {name: p.grad.float() for name, p in model.named_parameters() if name != "fake_latent"}
    return {"loss": loss.detach().float(), **found}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_accelerated_public_model_has_the_same_gradients(device):
    """EAR-B on a GPU, bf16 against float32, no further off than twice what the public code itself is."""
    config, low = EAR_BASE, device == "cuda"
    if not low:
        small = {"width": 48, "depth": 2, "num_heads": 4, "generator_width": 40, "generator_depth": 2}
        config = replace(config, image_size=4, num_classes=5, **small)
    public = PublicEAR(config).to(device)
    initialise(public)
    public.eval()  # no dropout; the masks come from the same state of the generator
    ours = copy.deepcopy(public)
    assert "scoreloss" in str(accelerate(ours))
    latents = torch.randn(16, config.channels, config.image_size, config.image_size, device=device)
    labels = torch.randint(config.num_classes, (16,), device=device)
    exact = public_gradients(public, latents, labels, low=False)
    eager, found = (public_gradients(model, latents, labels, low=low) for model in (public, ours))
    for name, truth in exact.items():
        size = truth.square().mean().sqrt().item()
        allowed = 2 * (errors(eager[name], truth)[1] + 1e-3 * size)
        assert errors(found[name], truth)[1] <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_neither_the_loss_nor_a_step_of_sampling_makes_the_host_wait(monkeypatch, backend):
    """A call of ``sample`` waits before its steps and after them, when it looks for what is not finite."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    model = EAR(replace(EAR_BASE, depth=2)).cuda().train()
    latents, labels = torch.randn(8, 16, 16, 16, device="cuda"), torch.randint(0, 1000, (8,), device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model(latents, labels, num_masked=200)

    def sample(steps: int) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model.sample(labels, steps=steps, guidance=3.0, temperature=0.7, generator=generator)

    works = [loss, functools.partial(sample, 4), functools.partial(sample, 16)]
    waits = []
    for work in works:
        work()  # libraries and compilers wait once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                found = work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.isfinite().all()
        waits.append(sum("synchronizing CUDA operation" in str(each.message) for each in seen))
    assert waits[0] == 0
    assert 0 < waits[1] == waits[2] < 10
