"""AdamW, average and 16-bit copies in one pass: against float64 and torch's AdamW; the scope of the copies."""

import copy
import pickle
import threading

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ear_kernels import FusedAdamW, LowCopies
from ear_kernels.ops.transformer.functional import project
from ear_kernels.runtime import launching
from ear_kernels.runtime.copies import low
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE

LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter gets bf16 wrong
SHAPES = st.lists(
    st.sampled_from([(), (1,), (3,), (0,), (5, 7), (64, 64), (2049,), (3, 2048)]), min_size=1, max_size=4
)


def draw(shapes: list[tuple], scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(shape, device=DEVICE) for shape in shapes]


def parameters_of(values: list[Tensor], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(value.detach().to(dtype).clone()) for value in values]


def groups_of(parameters: list[nn.Parameter]) -> list[dict]:
    """Two groups with their own rates."""
    half = len(parameters) // 2
    return [
        {"params": parameters[:half], "lr": 0.02, "weight_decay": 0.1},
        {"params": parameters[half:], "lr": 3e-4, "weight_decay": 0.0},
    ]


def run(
    kind: str,
    values: list[Tensor],
    steps: list[list[Tensor | None]],
    divisor: float,
    decay: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Weights, moments and averages after ``steps`` of gradients."""
    parameters = parameters_of(values, dtype)
    averages = {parameter: parameter.detach().clone() for parameter in parameters}
    options = {"betas": (0.9, 0.95)}
    if kind == "ours":
        optimizer: torch.optim.AdamW = FusedAdamW(groups_of(parameters), **options)
    else:
        optimizer = torch.optim.AdamW(groups_of(parameters), **options, foreach=False)
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(dtype).clone()
        if kind == "ours":
            optimizer.update(torch.tensor(divisor, device=DEVICE), averages, decay)
            continue
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(divisor)
        optimizer.step()
        for parameter, average in averages.items():
            average.lerp_(parameter.detach(), 1 - decay)
    moments = [
        optimizer.state[parameter][name]
        for parameter in parameters
        if parameter in optimizer.state
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return [*(parameter.detach() for parameter in parameters), *moments, *averages.values()]


@given(SHAPES, st.sampled_from([1e-12, 1e-3, 1.0, 1e4]), st.sampled_from([1.0, 7.3]), st.integers(0, 999))
@settings(max_examples=100 if DEVICE == "cuda" else 15)
def test_one_pass_is_adamw_and_average(shapes, scale, divisor, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        torch.manual_seed(seed)
        values = draw(shapes)
        steps: list[list[Tensor | None]] = [draw(shapes, scale) for _ in range(3)]
        steps[1][0] = None  # a parameter that a step does not reach
        found = [
            run(kind, values, steps, divisor, 0.9, dtype)
            for kind, dtype in (("ours", torch.float32), ("torch", torch.float32), ("torch", torch.float64))
        ]
        for number, (ours, eager, exact) in enumerate(zip(*found, strict=True)):
            assert_close_to_eager(f"result {number} of {shapes}", ours, eager, exact)


def test_extreme_gradients(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    values = [torch.ones(6, device=DEVICE)]
    steps = [[torch.tensor([0.0, -0.0, 1e-30, 3e38, 1e-45, -1.0], device=DEVICE)] for _ in range(3)]
    ours, eager = (run(kind, values, steps, 1.0, 0.9, torch.float32) for kind in ("ours", "torch"))
    for one, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=1e-30)


def test_nan_goes_through_and_stays_where_it_is(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    values = [torch.ones(5000, device=DEVICE)]
    gradient = torch.ones(5000, device=DEVICE)
    gradient[4321] = float("nan")
    weight, *_ = run("ours", values, [[gradient]], 1.0, 0.9, torch.float32)
    assert torch.equal(weight.isnan().nonzero().flatten(), torch.tensor([4321], device=DEVICE))


def test_neighbours_are_not_written(monkeypatch) -> None:
    """Parameters, moments and averages that lie in the middle of poisoned memory."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    pools = [torch.full((4096 + 64,), float("inf"), device=DEVICE) for _ in range(4)]
    inner = [pool[32 : 32 + 2051] for pool in pools]
    for tensor in inner:
        tensor.normal_()
    parameter = nn.Parameter(inner[0])
    parameter.grad = torch.randn(2051, device=DEVICE)
    optimizer = FusedAdamW([parameter])
    inner[2].abs_()
    optimizer.state[parameter] = {
        "step": torch.ones((), device=DEVICE),
        "exp_avg": inner[1],
        "exp_avg_sq": inner[2],
    }
    before = inner[0].clone()
    optimizer.update(None, {parameter: inner[3]}, 0.5)
    assert not torch.equal(inner[0], before)
    for pool in pools:
        assert pool[:32].isinf().all()
        assert pool[32 + 2051 :].isinf().all()
        assert pool[32 : 32 + 2051].isfinite().all()


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


def test_what_the_kernel_does_not_take_is_torchs(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    torch.manual_seed(0)
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        torch.manual_seed(1)
        parameters = [
            nn.Parameter(torch.randn(6, 4, device=DEVICE).t()),
            nn.Parameter(torch.randn(3, device=DEVICE, dtype=torch.float64)),
        ]
        averages = {parameter: parameter.detach().clone() for parameter in parameters}
        optimizer = kind(parameters, lr=0.1, weight_decay=0.01)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if kind is FusedAdamW:
                optimizer.update(torch.tensor(2.0, device=DEVICE), averages, 0.9)
            else:
                for parameter in parameters:
                    parameter.grad /= 2
                optimizer.step()
                for parameter, average in averages.items():
                    average.lerp_(parameter.detach(), 0.1)
        results.append([*parameters, *averages.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    optimizer = FusedAdamW([parameter := nn.Parameter(torch.zeros(3, device=DEVICE, dtype=torch.float64))])
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(NotImplementedError, match="float64"):
        optimizer.update()


def test_state_goes_on_in_torchs_optimiser_and_back(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    torch.manual_seed(2)
    gradients = [torch.randn(9, device=DEVICE) for _ in range(4)]
    ends = []
    for kinds in ((FusedAdamW, torch.optim.AdamW), (torch.optim.AdamW, FusedAdamW), (torch.optim.AdamW,) * 2):
        parameter = nn.Parameter(torch.ones(9, device=DEVICE))
        state = None
        for half, kind in enumerate(kinds):
            optimizer = kind([parameter], lr=0.1, **({} if kind is FusedAdamW else {"fused": True}))
            if state is not None:
                optimizer.load_state_dict(state)
            for gradient in gradients[2 * half : 2 * half + 2]:
                parameter.grad = gradient.clone()
                optimizer.update() if kind is FusedAdamW else optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        ends.append((parameter.detach(), state["state"][0]["step"]))
    for weight, step in ends:
        torch.testing.assert_close(weight, ends[-1][0], rtol=2e-6, atol=1e-7)
        assert step == 4
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_state_of_any_adamw_goes_on(monkeypatch, options, backend) -> None:
    """Our pass does what torch's step does in float64; without it the step is that of torch's fused form, as told.

    On a GPU the fused form takes the betas in float32: its step from a state of the others, or the others' from one
    of its own, is off by 2e-5 of its size, whoever makes it. So each is compared with its own kind.
    """
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    first = torch.optim.AdamW([nn.Parameter(torch.linspace(-1, 1, 9, device=DEVICE))], lr=0.1, **options)
    (parameter,) = first.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    first.step()
    weights = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        is_ours = kind is FusedAdamW
        dtype = torch.float64 if backend == "triton" and not is_ours else torch.float32
        other = nn.Parameter(parameter.detach().to(dtype, copy=True))
        state = copy.deepcopy(first.state_dict())
        if not is_ours:
            state["param_groups"][0].update({"fused": backend == "eager", "foreach": None})
        second = kind([other], lr=0.1)
        second.load_state_dict(state)
        other.grad = torch.linspace(1, 2, 9, device=DEVICE, dtype=dtype)
        if is_ours:
            second.update(torch.tensor(2.0, device=DEVICE))
        else:
            other.grad /= 2
            second.step()
        assert float(second.state[other]["step"]) == 2
        weights.append(other.detach().double())
    torch.testing.assert_close(*weights, rtol=2e-6, atol=1e-7)


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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_the_launch_is_recorded_on_meta_tensors(dtype) -> None:
    """No host code reads what a tensor holds."""
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 4), (3000,), (0,))]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    copies = None if dtype is None else LowCopies(parameters, dtype)
    averages = {parameters[0]: torch.empty_like(parameters[0])}
    found = []
    with launching.recording(lambda *launch: found.append(launch), launching.Processor(9, 132)):
        FusedAdamW(parameters).update(torch.empty((), device="meta"), averages, copies=copies)
    ((_, arguments, options),) = found
    assert [argument.device.type for argument in arguments[:3]] == ["meta"] * 3
    assert options["LOW"] == {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def test_averages_of_other_parameters_move_too(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    mine, other = (nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    mine.grad, other.grad = torch.ones_like(mine), torch.ones_like(other)
    averages = {mine: torch.zeros(3, device=DEVICE), other: torch.zeros(3, device=DEVICE)}
    FusedAdamW([mine]).update(averages=averages, decay=0.5)
    assert (averages[other] == 0.5).all()


def test_bad_input_is_named() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([parameter])
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"decay is 1\.5; it must be in \[0, 1\]"):
        optimizer.update(decay=1.5)
    for average, what in (
        (torch.zeros(2), r"shape torch.Size\(\[2\]\)"),
        (torch.zeros(3).double(), "dtype torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"an average has {what}; its parameter has"):
            optimizer.update(averages={parameter: average})
    with pytest.raises(ValueError, match=r"divisor has shape \(2,\); it must be a scalar"):
        optimizer.update(torch.ones(2))
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"layout torch\.sparse_coo; it must be dense"):
        optimizer.update()
    assert torch.equal(parameter.detach(), torch.zeros(3))
