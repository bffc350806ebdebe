"""PreparedLaunch: the second call hands the compiled kernel what Triton would have handed it."""

import pytest
import torch

from ear_kernels import energy_loss
from ear_kernels.prepared import PreparedLaunch


class _Compiled:
    """What ``kernel[grid](...)`` returns on a GPU, as far as PreparedLaunch knows it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls):
        self.run = lambda *arguments: calls.append(arguments)


class _Kernel:
    arg_names = ("x_ptr", "y_ptr", "rows", "alpha", "FIRST", "SECOND")

    def __init__(self, result):
        self.result, self.calls = result, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self.result

        return launch


def test_later_calls_pass_pointers_scalars_and_constexprs_in_the_kernels_order(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    direct: list[tuple] = []
    kernel = _Kernel(_Compiled(direct))
    launch = PreparedLaunch(kernel, (7,), (5, 0.5), {"SECOND": 2, "FIRST": 1}, {"num_warps": 4})
    tensors = [torch.zeros(3) for _ in range(3)]
    launch(0, tensors[0], None)
    launch(0, tensors[1], None)
    launch(0, tensors[2], tensors[0])
    assert kernel.calls == [((7, 1, 1), (tensors[0], None, 5, 0.5), {"SECOND": 2, "FIRST": 1, "num_warps": 4})]
    head = (7, 1, 1, 100, "function", "metadata", None, None, None)
    assert direct == [
        (*head, tensors[1].data_ptr(), None, 5, 0.5, 1, 2),
        (*head, tensors[2].data_ptr(), tensors[0].data_ptr(), 5, 0.5, 1, 2),
    ]


def test_without_a_compiled_kernel_every_call_goes_through_triton():
    """The interpreter compiles nothing and returns None."""
    kernel = _Kernel(None)
    launch = PreparedLaunch(kernel, (1,), (), {}, {"num_warps": 1})
    for _ in range(3):
        launch(0, torch.zeros(1))
    assert len(kernel.calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_planned_calls_repeat_the_first_one_on_new_inputs(dtype, reduction, monkeypatch):
    """The first call makes a plan, the others take it: on new tensors, with other incoming gradients."""
    from ear_kernels.ops.energy_loss import plans

    target = torch.randn(300, 16, device="cuda").to(dtype)
    for factor in (1.0, 1.0, 3.0):
        samples = torch.randn(300, 2, 16, device="cuda").to(dtype)
        results = []
        for planned in (True, False):
            leaf = samples.clone().requires_grad_()
            with monkeypatch.context() as patch:
                if not planned:
                    patch.setattr(plans, "key_of", lambda *arguments: None)
                loss = energy_loss(leaf, target, alpha=1.3, reduction=reduction)
            (loss * factor).backward()
            results.append((loss.detach(), leaf.grad))
        # The sum of the partial losses is another kernel without a plan.
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(results[0][1], results[1][1])
    assert plans.PLANS
