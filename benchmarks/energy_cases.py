"""Callables of the energy-loss benchmarks: eager, compiled and ours, on the same inputs."""

import os
from collections.abc import Callable

import torch

from benchmarks import rivals
from benchmarks.shapes import DistanceShape, EnergyShape
from ear_kernels import GaussianTarget, energy_distance, energy_loss
from ear_kernels.ops.energy_loss import reference

ROTATE_BELOW = 120 * 2**20  # twice the L2 cache of an H200


def make_inputs(shape: EnergyShape, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Samples (a leaf that wants a gradient) and target, or samples-first samples, mean and log_std."""
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device)

    if shape.gaussian:
        samples = normal(shape.n, shape.rows, shape.features)
        return samples.requires_grad_(), normal(shape.rows, shape.features), 0.1 * normal(shape.rows, shape.features)
    return normal(shape.rows, shape.n, shape.features).requires_grad_(), normal(shape.rows, shape.features)


def loss_function(shape: EnergyShape, which: str) -> Callable[..., torch.Tensor]:
    """The loss of ``make_inputs``' tensors: "eager", "compiled" or "ours"."""
    if shape.gaussian:

        def ours(x, mean, log_std):
            return energy_loss(x, GaussianTarget(mean, log_std, shape.m), sample_dim=0)

        def rival(x, mean, log_std):
            return rivals.calm_loss(x, mean, log_std, shape.m)
    else:
        ours, rival = energy_loss, rivals.ear_loss
    if which == "ours":
        return ours
    return torch.compile(rival) if which == "compiled" else rival


def step_calls(shape: EnergyShape, which: str, device: torch.device) -> list[Callable[[], object]]:
    """Forward and backward calls on as many inputs as it takes to leave the cache."""
    function = loss_function(shape, which)
    copies = max(1, min(64, -(-ROTATE_BELOW // shape.ours_bytes)))
    calls = []
    for seed in range(copies):
        tensors = make_inputs(shape, device, seed)

        def call(tensors=tensors):
            tensors[0].grad = None
            function(*tensors).backward()

        calls.append(call)
    return calls


def check_step(shape: EnergyShape, device: torch.device) -> float:
    """Relative error of our loss and gradient; raises AssertionError if they are wrong. No time without it."""
    previous = torch.backends.cuda.matmul.allow_tf32
    tensors = make_inputs(shape, device)
    ours = loss_function(shape, "ours")(*tensors)
    (gradient,) = torch.autograd.grad(ours, tensors[0])
    torch.backends.cuda.matmul.allow_tf32 = previous
    if not shape.gaussian:
        x = tensors[0].detach().double().requires_grad_()
        options = {"alpha": 1.0, "tau": 1.0, "eps": 0.0, "reduction": "mean"}
        exact = reference.energy_loss(x, tensors[1].double().unsqueeze(1), None, None, None, **options)
        (wanted,) = torch.autograd.grad(exact, x)
        error = ((gradient - wanted).abs().max() / wanted.abs().max()).item()
        loss_error = abs(ours.item() - exact.item()) / abs(exact.item())
        assert error < 1e-5, (shape.name, error)
        assert loss_error < 1e-5, (shape.name, loss_error)
        return max(error, loss_error)
    # On the kernel's own draws, for the first rows.
    few = min(64, shape.rows)
    x, mean, log_std = (t.detach() for t in tensors)
    x, mean, log_std = x[:, :few].contiguous(), mean[:few], log_std[:few]
    if device.type != "cuda":
        return 0.0
    from ear_kernels.ops.energy_loss import autograd, launchers

    seed = torch.tensor([7], device=device)
    normals = launchers.gaussian_normals(seed, few, shape.m, shape.features, torch.float32)
    leaf = x.clone().requires_grad_()
    options = {"alpha": 1.0, "tau": 1.0, "eps": 0.0, "reduction": "mean"}
    loss = autograd.energy_loss_gaussian(
        leaf.movedim(0, -2), mean, log_std, shape.m, None, None, None, **options, seed=seed
    )
    loss.backward()
    x64 = x.double().requires_grad_()
    y = mean.double().unsqueeze(1) + log_std.double().exp().unsqueeze(1) * normals.double()
    exact = reference.energy_loss(x64.movedim(0, -2), y, None, None, None, **options)
    exact.backward()
    error = ((leaf.grad - x64.grad).abs().max() / x64.grad.abs().max()).item()
    assert error < 1e-5, (shape.name, error)
    return error


def distance_call(shape: DistanceShape, which: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """One energy distance: "cdist" in chunks, or "ours"."""
    g = torch.Generator(device=device).manual_seed(0)
    x, y = (torch.randn(shape.points, shape.features, generator=g, device=device) for _ in range(2))
    y = y * 1.02 + 0.01
    function = energy_distance if which == "ours" else rivals.cdist_energy_distance
    return lambda: function(x, y)


def distance_bytes(shape: DistanceShape) -> int:
    return 2 * shape.points * shape.features * 4


def rows_without_a_gpu() -> str:
    return "" if torch.cuda.is_available() else "Triton rows need a GPU"


def use_backend(name: str) -> None:
    os.environ["EAR_KERNELS_BACKEND"] = name
