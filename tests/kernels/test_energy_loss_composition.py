"""The Triton energy loss with the rest of PyTorch: autograd, compilation, graphs, autocast, DDP, refusals."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ear_kernels
from ear_kernels import FusedEnergyLoss, GaussianTarget, energy_loss
from tests.kernels.conftest import HAS_GPU
from tests.kernels.problems import Problem
from tests.kernels.test_energy_loss_triton import evaluate

gpu_only = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _backend(triton_backend):
    """Every test here asks for Triton; ``evaluate`` asks for others by name."""


def _pair(device, dtype=torch.float32, rows=5):
    samples = torch.randn(rows, 2, 16, device=device, dtype=dtype, requires_grad=True)
    return samples, torch.randn(rows, 16, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_retained_graph_and_different_incoming_gradients(dtype, device):
    samples, target = _pair(device, dtype)
    loss = energy_loss(samples, target)
    (once,) = torch.autograd.grad(loss, samples, retain_graph=True)
    kept = once.clone()
    for factor in (3.0, 0.0, 1.0, -2.0):
        (again,) = torch.autograd.grad(loss, samples, torch.tensor(factor, device=device), retain_graph=True)
        torch.testing.assert_close(again, kept * factor)
        again.fill_(7.0)  # the caller owns what it gets
    torch.testing.assert_close(once, kept)
    (last,) = torch.autograd.grad(loss, samples, torch.tensor(3.0, device=device))
    torch.testing.assert_close(last, kept * 3)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_accumulation_into_grad_and_scaled_loss(device):
    samples, target = _pair(device)
    energy_loss(samples, target).backward()
    first = samples.grad.clone()
    (energy_loss(samples, target) * 0.5).backward()
    torch.testing.assert_close(samples.grad, first * 1.5)


def test_the_gradient_buffer_is_handed_on_without_a_copy(device):
    """The saved gradient is what the leaf gets."""
    samples, target = _pair(device)
    loss = energy_loss(samples, target)
    pointer = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert samples.grad.data_ptr() == pointer


def test_create_graph_raises(device):
    samples, target = _pair(device)
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(energy_loss(samples, target), samples, create_graph=True)


@pytest.mark.parametrize("form", ["expanded", "transposed", "per row"])
def test_incoming_gradients_of_any_stride(form, device):
    samples = torch.randn(3, 4, 2, 6, device=device)
    target = torch.randn(3, 4, 6, device=device)
    incoming = {
        "expanded": torch.ones((), device=device).expand(3, 4),
        "transposed": torch.randn(4, 3, device=device).t(),
        "per row": torch.randn(3, 4, device=device),
    }[form]
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "eager")):
        os.environ["EAR_KERNELS_BACKEND"] = backend
        x = samples.detach().clone().to(dtype).requires_grad_()
        rows = energy_loss(x, target.to(dtype), reduction="none")
        rows.backward(incoming.to(dtype))
        results.append(x.grad)
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-6)


def test_float16_gradients_survive_a_gradient_scaler(device):
    """The mean over many rows would underflow in float16; the saved gradients must not."""
    samples = torch.randn(4000, 2, 1, device=device).half().requires_grad_()
    target = torch.randn(4000, 1, device=device).half()
    weights = torch.full((4000,), 1e-4, device=device)
    loss = energy_loss(samples, target, weights=weights, reduction="mean") * 2.0**-10
    (loss * 2.0**16).backward()
    exact = evaluate(
        "eager",
        {"samples": samples.detach(), "target": target.unsqueeze(1), "mask": None, "weights": weights,
         "feature_weights": None},
        {"reduction": "mean"}, upcast=True,
    )[1]  # fmt: skip
    torch.testing.assert_close(samples.grad.double(), exact * 64, rtol=2e-3, atol=1e-7)


def test_no_gradient_wanted(device):
    samples, target = _pair(device)
    with torch.no_grad():
        loss = energy_loss(samples, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, energy_loss(samples, target).detach())


def test_same_input_same_bits(device):
    problem = Problem((7, 9), 5, 3, 33, -2, False, 1.3, 1.0, 0.0, "mean", "some", True, True, False, 1.0, 3)
    arguments = problem.build(torch.float32, device)
    first, second = (evaluate("triton", arguments, problem.options()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_weights_are_refused_not_dropped(device):
    samples, target = _pair(device)
    weights = torch.rand(5, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="weights"):
        energy_loss(samples, target, weights=weights)


def test_functional_transforms(device, monkeypatch):
    samples, target = _pair(device)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: energy_loss(x, target))(samples)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    gradient = torch.func.grad(lambda x: energy_loss(x, target))(samples)
    (expected,) = torch.autograd.grad(energy_loss(samples, target), samples)
    torch.testing.assert_close(gradient, expected)


def test_activation_checkpointing(device):
    samples, target = _pair(device)
    weight = torch.randn(16, 16, device=device, requires_grad=True)

    def head(x):
        return energy_loss(x @ weight, target)

    (expected,) = torch.autograd.grad(head(samples), weight)
    for use_reentrant in (False, True):
        weight.grad = None
        checkpoint(head, samples, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("gaussian", [False, True])
def test_compile_full_graph(gaussian, device):
    """One graph, no break, same numbers as eager."""
    samples, target = _pair(device)
    weight = torch.randn(16, 16, device=device, requires_grad=True)
    wanted = GaussianTarget(target, torch.full_like(target, -30.0), 3) if gaussian else target

    def step(x):
        if gaussian:
            return energy_loss(x @ weight, GaussianTarget(wanted.mean, wanted.log_std, 3), alpha=1.0)
        return energy_loss(x @ weight, target, alpha=1.0)

    expected = step(samples)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    loss = compiled(samples)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, device):
    from ear_kernels.ops.energy_loss import autograd  # noqa: F401

    samples = torch.randn(8, 5, 16, device=device).movedim(0, -2)
    target = torch.randn(5, 1, 16, device=device)
    mask = torch.rand(5, device=device) > 0.5
    torch.library.opcheck(
        torch.ops.ear_kernels.energy_loss_forward,
        (samples, target, mask, None, None, 1.0, 1.0, 0.0, reduction, "", True, True),
    )
    torch.library.opcheck(
        torch.ops.ear_kernels.energy_loss_forward,
        (samples, target, mask, None, None, 0.5, 1.0, 0.0, reduction, "laplace", True, True),
    )
    seed = torch.tensor([3], device=device)
    torch.library.opcheck(
        torch.ops.ear_kernels.energy_gaussian_forward,
        (samples, target[:, 0], target[:, 0], seed, 3, mask, None, None, 1.0, 1.0, 0.0, reduction, True, True),
    )


def test_autocast(device):
    """Halves from an autocast linear, a float32 target: float32 arithmetic, gradients in the inputs' dtypes."""
    dtype = torch.bfloat16 if HAS_GPU else torch.float16
    linear = torch.nn.Linear(16, 16, device=device)
    x = torch.randn(5, 2, 16, device=device)
    target = torch.randn(5, 16, device=device)
    with torch.autocast(device.type, dtype=dtype):
        samples = linear(x)
        assert samples.dtype == dtype
        loss = energy_loss(samples, target)
    assert loss.dtype == torch.float32
    loss.backward()
    reference_linear = copy.deepcopy(linear)
    os.environ["EAR_KERNELS_BACKEND"] = "eager"
    reference_linear.zero_grad()
    with torch.autocast(device.type, dtype=dtype):
        energy_loss(reference_linear(x), target).backward()
    torch.testing.assert_close(linear.weight.grad, reference_linear.weight.grad, rtol=2e-2, atol=2e-3)


def test_distributed_data_parallel(device, tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if HAS_GPU else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        linear = torch.nn.Linear(16, 16, device=device)
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(linear))
        x, target = torch.randn(5, 2, 16, device=device), torch.randn(5, 16, device=device)
        loss_module = FusedEnergyLoss()
        for model in (linear, wrapped):
            loss_module(model(x), target).backward()
        torch.testing.assert_close(wrapped.module.weight.grad, linear.weight.grad)
    finally:
        dist.destroy_process_group()


def test_importing_needs_no_triton():
    code = "import sys, ear_kernels; assert 'triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        energy_loss(torch.randn(3, 2, 4), torch.randn(3, 4))


def test_automatic_backend(device, monkeypatch):
    from ear_kernels.runtime import backend as dispatch

    monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    expected = "triton" if HAS_GPU else "eager"
    assert dispatch.choose_backend("energy_loss", torch.ones(1, device=device)) == expected
    assert dispatch.choose_backend("gated_silu_ffn", torch.ones(1, device=device)) in ("eager", "triton")


@gpu_only
def test_cuda_graph(device):
    """Replays read new inputs, and draw new Gaussian targets that follow the generator."""
    samples, target = _pair(device, rows=64)
    static_x, static_y = samples.detach().clone().requires_grad_(), target.clone()
    log_std = torch.zeros_like(target)

    def step():
        static_x.grad = None
        plain = energy_loss(static_x, static_y)
        drawn = energy_loss(static_x.detach(), GaussianTarget(static_y, log_std, 5))
        plain.backward()
        return plain.detach(), drawn.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain, drawn = step()
    new_x, new_y = torch.randn_like(static_x), torch.randn_like(static_y)
    with torch.no_grad():
        static_x.copy_(new_x)
        static_y.copy_(new_y)
    graph.replay()
    expected_x = new_x.clone().requires_grad_()
    expected = energy_loss(expected_x, new_y)
    expected.backward()
    torch.testing.assert_close(plain, expected.detach())
    torch.testing.assert_close(static_x.grad, expected_x.grad)
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["samples first", "many rows"])
def test_more_than_2_to_the_31_elements(layout, device):
    rows = 2**27 + 3
    samples = torch.empty(
        (2, rows, 9) if layout == "samples first" else (rows, 2, 9), dtype=torch.bfloat16, device=device
    ).normal_()
    samples = samples.requires_grad_()
    target = torch.empty(rows, 9, dtype=torch.bfloat16, device=device).normal_()
    dim = 0 if layout == "samples first" else -2
    energy_loss(samples, target, sample_dim=dim, reduction="sum").backward()
    tail = samples.detach().movedim(dim, -2)[-100:].float().requires_grad_()
    energy_loss(tail, target[-100:].float(), reduction="sum").backward()
    torch.testing.assert_close(samples.grad.movedim(dim, -2)[-100:].float(), tail.grad, rtol=1e-2, atol=1e-2)


def test_public_names():
    assert ear_kernels.GaussianTarget is GaussianTarget
