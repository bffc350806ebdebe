"""The way from host code to a kernel: devices, recording, and the static launches."""

import pytest
import torch

from ear_kernels import energy_loss
from ear_kernels.runtime import launching
from ear_kernels.runtime.launching import Processor, launch, processor, recording


class _Kernel:
    """Remembers its launches."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


def test_a_launch_reaches_the_kernel_as_it_is():
    kernel, x = _Kernel(), torch.zeros(3)
    launch(kernel, (2, 3), x, None, 5, on=x, BLOCK=4, num_warps=1)
    assert kernel.calls == [((2, 3), (x, None, 5), {"BLOCK": 4, "num_warps": 1})]


@pytest.mark.parametrize("kind", [Processor(8, 108), Processor(9, 132), Processor(0, 304, is_amd=True)])
def test_recording_launches_nothing_and_stands_for_the_processor(kind):
    kernel, x, seen = _Kernel(), torch.zeros(3), []
    with recording(lambda *launched: seen.append(launched), kind):
        assert launching.is_recording()
        assert processor(x) == kind
        assert launching.is_on_hopper(x) == (kind.major == 9)
        launch(kernel, (1,), x, on=x, N=3)
    assert seen == [(kernel, (x,), {"N": 3})]
    assert not kernel.calls
    assert not launching.is_recording()


def test_recording_ends_with_an_exception():
    with pytest.raises(KeyError), recording(lambda *launched: None, Processor(9, 132)):
        raise KeyError
    assert not launching.is_recording()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_recording_an_operation_on_tensors_without_memory(dtype, reduction):
    """Forward and backward, on a device that has no kernels: every launch is seen, whatever the backend variable."""
    samples = torch.empty(300, 2, 16, dtype=dtype, device="meta", requires_grad=True)
    target = torch.empty(300, 16, dtype=dtype, device="meta", requires_grad=True)
    names = []
    with recording(lambda kernel, arguments, options: names.append(kernel.__name__), Processor(9, 132)):
        loss = energy_loss(samples, target, reduction=reduction)
        loss.sum().backward()
    scaled = reduction != "none" and dtype != torch.float16
    forward = ["energy_rows_kernel", *(["sum_partials_kernel"] if reduction != "none" else [])]
    assert names == [*forward, *(["scale_gradient_kernel"] * 2 if scaled else [])]
    assert samples.grad.shape == samples.shape
    assert samples.grad.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_repeated_calls_follow_their_inputs(dtype, reduction):
    """Nothing of a call is kept for the next one of the same shape: new tensors, other incoming gradients."""
    target = torch.randn(300, 16, device="cuda").to(dtype)
    for factor in (1.0, 1.0, 3.0):
        samples = torch.randn(300, 2, 16, device="cuda").to(dtype)
        results = []
        for part in (samples, samples.double()):
            leaf = part.clone().requires_grad_()
            loss = energy_loss(leaf, target.to(part.dtype), alpha=1.3, reduction=reduction)
            (loss * factor).backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            results[0][1], results[1][1].to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    samples = torch.randn(30, 2, 16, device="cuda:1", requires_grad=True)
    target = torch.randn(30, 16, device="cuda:1")
    with torch.cuda.device(0):
        energy_loss(samples, target).backward()
    assert torch.isfinite(samples.grad).all()
