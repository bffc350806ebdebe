"""16-bit copies of weights: what a scope reads, when a copy is stale, and what an update writes along."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from ear_kernels import FusedAdamW, LowCopies
from ear_kernels.ops.transformer.functional import project
from ear_kernels.runtime.copies import low
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_adamw import LOW, draw, groups_of, parameters_of, run  # noqa: F401


def is_current(parameter: Tensor) -> bool:
    """Whether what operations read of a parameter is its value."""
    return torch.equal(low(parameter, LOW), parameter.detach().to(LOW))


def test_copies_are_brought_along(monkeypatch) -> None:
    """What an update has written is not cast again, and lies where it did."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((3, 5), (2048,), (2050,))]
    copies = LowCopies(parameters[:2], LOW)
    optimizer = FusedAdamW(parameters, lr=0.1)
    with copies:
        kept = [low(parameter, LOW) for parameter in parameters[:2]]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        versions = [parameter._version for parameter in parameters]
        optimizer.update(copies=copies)
        assert all(parameter._version > version for parameter, version in zip(parameters, versions, strict=True))
        versions = [tensor._version for tensor in kept]
        with copies:
            assert [tensor._version for tensor in kept] == versions
            for parameter, tensor in zip(parameters, kept, strict=False):
                assert low(parameter, LOW) is tensor
                assert is_current(parameter)
            assert low(parameters[2], LOW) is not low(parameters[2], LOW)
    assert low(parameters[0], LOW) is not kept[0]


def test_an_update_inside_the_scope_brings_copies_along(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameter = nn.Parameter(torch.randn(3, 5, device=DEVICE))
    copies, optimizer = LowCopies([parameter], LOW), FusedAdamW([parameter], lr=0.1)
    parameter.grad = torch.randn_like(parameter)
    with copies:
        kept, before = low(parameter, LOW), low(parameter, LOW).clone()
        optimizer.update(copies=copies)
        assert low(parameter, LOW) is kept
        assert is_current(parameter)
        assert not torch.equal(kept, before)
        optimizer.update()  # without them: they are out of date
        assert low(parameter, LOW) is not kept
        assert is_current(parameter)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_change_after_the_update_is_seen(monkeypatch, backend) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    parameter = nn.Parameter(torch.randn(3, 5, device=DEVICE))
    copies, optimizer = LowCopies([parameter], LOW), FusedAdamW([parameter], lr=0.1)
    with copies:
        kept = low(parameter, LOW)
    parameter.grad = torch.randn_like(parameter)
    optimizer.update(copies=copies)
    assert torch.equal(kept, parameter.detach().to(LOW))
    with torch.no_grad():
        parameter.mul_(2)
    with copies:
        assert low(parameter, LOW) is kept
        assert is_current(parameter)


def test_a_stale_copy_is_not_taken() -> None:
    parameter = nn.Parameter(torch.randn(4, 4, device=DEVICE))
    copies = LowCopies([parameter, nn.Parameter(torch.zeros(2, dtype=torch.float64))], LOW)
    with copies:
        kept = low(parameter, LOW)
        assert low(parameter, LOW) is kept
        assert low(parameter, torch.float32) is parameter
        with torch.no_grad():
            parameter.add_(1)
        assert is_current(parameter)
        assert low(parameter, LOW) is not kept
        copies.refresh()
        assert low(parameter, LOW) is kept
        parameter.data = torch.ones(4, 4, device=DEVICE)  # of which autograd's counter knows nothing
        assert torch.equal(low(parameter, LOW), torch.ones(4, 4, device=DEVICE, dtype=LOW))
    assert copy.deepcopy(parameter).__dict__ == {}
    with pytest.raises(ValueError, match=r"dtype is torch\.float32"):
        LowCopies([parameter], torch.float32)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_of_torchs_optimiser_outside_is_never_missed(options) -> None:
    """Its fused form changes parameters without telling autograd."""
    parameter = nn.Parameter(torch.randn(4, 4, device=DEVICE))
    copies = LowCopies([parameter], LOW)
    with copies:
        kept = low(parameter, LOW)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, **options).step()
    with copies:
        assert low(parameter, LOW) is kept
        assert is_current(parameter)
        parameter.data.zero_()  # which nothing tells
        assert (low(parameter, LOW) != 0).all()
        copies.refresh(everything=True)
        assert (low(parameter, LOW) == 0).all()


def test_refreshing_outside_vouches_for_nothing() -> None:
    parameter = nn.Parameter(torch.randn(4, device=DEVICE))
    copies = LowCopies([parameter], LOW)
    with copies:
        kept = low(parameter, LOW)
    parameter.data.fill_(2)
    copies.refresh()
    assert (kept == 2).all()
    assert low(parameter, LOW) is not kept
    parameter.data.fill_(3)
    with copies:
        assert (low(parameter, LOW) == 3).all()


def test_scopes_are_nested() -> None:
    """The innermost that has a copy serves; the outer one holds after the inner."""
    one, two, three = (nn.Parameter(torch.randn(4, device=DEVICE)) for _ in range(3))
    outer, inner = LowCopies([one, two], LOW), LowCopies([two, three], LOW)
    with outer:
        kept = low(one, LOW), low(two, LOW)
        version = kept[0]._version
        with inner:
            assert low(one, LOW) is kept[0]
            assert low(two, LOW) is not kept[1]
            assert low(two, LOW) is low(two, LOW)
            with outer:
                assert low(two, LOW) is kept[1]
            assert low(two, LOW) is not kept[1]
            assert low(one, LOW) is kept[0]
        assert low(two, LOW) is kept[1]
        assert low(three, LOW) is not low(three, LOW)
        assert kept[0]._version == version  # a backward that needs it may run
    assert low(one, LOW) is not kept[0]


def test_scopes_of_two_dtypes() -> None:
    parameter = nn.Parameter(torch.randn(4, device=DEVICE))
    other = torch.bfloat16 if LOW is torch.float16 else torch.float16
    with LowCopies([parameter], LOW), LowCopies([parameter], other):
        for dtype in (LOW, other):
            assert low(parameter, dtype).dtype == dtype
            assert low(parameter, dtype) is low(parameter, dtype)


def test_a_scope_holds_in_its_own_thread() -> None:
    parameter = nn.Parameter(torch.randn(4, device=DEVICE))
    found = []
    with LowCopies([parameter], LOW):
        thread = threading.Thread(target=lambda: found.append(low(parameter, LOW)))
        thread.start()
        thread.join()
        assert found[0] is not low(parameter, LOW)
        assert torch.equal(found[0], low(parameter, LOW))


def test_an_exception_leaves_the_scope() -> None:
    parameter = nn.Parameter(torch.randn(4, device=DEVICE))
    copies = LowCopies([parameter], LOW)
    with pytest.raises(KeyError), copies:
        {}[low(parameter, LOW)]
    assert low(parameter, LOW) is not low(parameter, LOW)
    parameter.data.fill_(5)
    with copies:
        assert (low(parameter, LOW) == 5).all()


def test_an_alias_has_the_copy_of_its_parameter(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameter, stranger = (nn.Parameter(torch.randn(4, 8, device=DEVICE)) for _ in range(2))
    copies = LowCopies([parameter], LOW)
    with copies:
        alias = copies.alias(parameter)
        assert alias is not parameter
        assert alias.is_leaf
        assert alias.data_ptr() == parameter.data_ptr()
        assert low(alias, LOW) is low(parameter, LOW)
        x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, LOW):
            project(x, alias).float().sum().backward()
        assert parameter.grad is None
        assert alias.grad is not None
        with torch.no_grad():
            parameter.add_(1)
        assert is_current(alias)
        copies.refresh()
        assert low(alias, LOW) is low(parameter, LOW)
        assert low(copies.alias(stranger), LOW) is not low(stranger, LOW)
        # Aliases follow a copy that has to move.
        parameter.data = torch.randn(3, 5, device=DEVICE)
        copies.refresh()
        assert is_current(parameter)
        assert is_current(alias)


def test_copies_keep_their_memory(monkeypatch) -> None:
    """A CUDA graph reads them there."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((4, 4), (7,))]
    copies, optimizer = LowCopies(parameters, LOW), FusedAdamW(parameters, lr=0.1)
    with copies:
        places = [low(parameter, LOW).data_ptr() for parameter in parameters]
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if step % 2:
            optimizer.step()
            copies.refresh()
        else:
            optimizer.update(copies=copies)
        with copies:
            assert [low(parameter, LOW).data_ptr() for parameter in parameters] == places
            assert all(is_current(parameter) for parameter in parameters)


def test_a_copied_owner_has_no_copies() -> None:
    owner = nn.Linear(3, 2, device=DEVICE)
    owner.copies = LowCopies(owner.parameters(), LOW)
    assert copy.deepcopy(owner).copies is None
    assert pickle.loads(pickle.dumps(owner)).copies is None
    assert owner.copies is not None


def test_operations_take_the_copy(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    weight = nn.Parameter(torch.randn(8, 8, device=DEVICE))
    x = torch.randn(4, 8, device=DEVICE, dtype=LOW)
    with torch.autocast(DEVICE, LOW):
        with LowCopies([weight], LOW):
            low(weight, LOW).zero_()  # nobody may do this, but it tells whether the copy is read
            assert (project(x, weight) == 0).all()
        assert (project(x, weight) != 0).any()


def test_a_backward_after_the_update_is_refused(monkeypatch) -> None:
    """It would take the new weights' copy for the old one."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    weight = nn.Parameter(torch.randn(8, 8, device=DEVICE))
    copies = LowCopies([weight], LOW)
    with copies, torch.autocast(DEVICE, LOW):
        out = project(torch.randn(4, 8, device=DEVICE, requires_grad=True), weight)
    weight.grad = torch.ones_like(weight)
    FusedAdamW([weight]).update(copies=copies)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


def test_a_copy_that_does_not_fit_is_not_written(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameters = [nn.Parameter(torch.randn(4, device=DEVICE)), nn.Parameter(torch.randn(6, 4, device=DEVICE).t())]
    copies = LowCopies(parameters, LOW)
    optimizer = FusedAdamW(parameters)
    with copies:
        parameters[0].data = torch.randn(4096, device=DEVICE)
        parameters[1].data = parameters[1].data.contiguous()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.update(copies=copies)
        for parameter in parameters:
            assert low(parameter, LOW) is not low(parameter, LOW)
            assert is_current(parameter)
        copies.refresh()
        for parameter in parameters:
            assert low(parameter, LOW) is low(parameter, LOW)
            assert is_current(parameter)


def test_copies_of_parameters_without_gradients(monkeypatch) -> None:
    """One parameter has no gradient and one no copy."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    parameters = [nn.Parameter(torch.randn(4, device=DEVICE)) for _ in range(3)]
    copies = LowCopies(parameters[:2], LOW)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    FusedAdamW(parameters).update(copies=copies)
    with copies:
        assert all(is_current(parameter) for parameter in parameters)


def test_parameters_with_copies_are_saved_as_any(tmp_path) -> None:
    module = nn.Linear(3, 2, device=DEVICE)
    with LowCopies(module.parameters(), LOW):
        torch.save(module.state_dict(keep_vars=True), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(loaded["weight"], module.weight)
