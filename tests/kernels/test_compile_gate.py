"""Every launch compiles for four GPUs within the limits; no GPU needed. Recorded is every entry of every table."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from ear_kernels.compile_gate import example_calls
from ear_kernels.ops.energy_loss import launch as launch_loss
from ear_kernels.ops.energy_loss import launch_distance, launch_gaussian
from ear_kernels.ops.generator import launch_adaln, launch_chain, launch_few_rows, launch_ffn, launch_inference
from ear_kernels.ops.transformer import launch as launch_block
from ear_kernels.ops.transformer import launch_attention
from ear_kernels.runtime import compile_gate
from ear_kernels.runtime.compile_gate import TARGETS, Compiled, KnownSpill, Record
from ear_kernels.runtime.launching import recording
from tests.conftest import SESSION_SEED


def run_compiling(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: the interpreter, which the other tests switch on, cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_launches_compile(target):
    """All of the selection for the GPU that tables are made on; of the others' another third in each session."""
    part = () if target == "sm_90" else ("--part", str(SESSION_SEED % 3), "3")
    result = run_compiling("-m", "ear_kernels.compile_gate", "--target", target, *part)
    failed = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(failed) + result.stderr[-3000:]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_selection_compiles(target):
    result = run_compiling("-m", "ear_kernels.compile_gate", "--target", target)
    failed = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(failed) + result.stderr[-3000:]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_launches_compile_for_the_gpu_that_tables_are_made_on():
    result = run_compiling("-m", "ear_kernels.compile_gate", "--target", "sm_90", "--all")
    failed = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(failed) + result.stderr[-3000:]


SPECIALISED = """
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from ear_kernels.runtime.compile_gate import TARGETS, gpu_target, recorded
from ear_kernels.compile_gate import example_calls
from ear_kernels.runtime.launching import recording

calls, kernels = list(example_calls()), {}
for target in TARGETS:
    launches, bound = [], set()
    with recording(lambda *launch: launches.append(launch), TARGETS[target].processor):
        for _, call in calls:
            call()
    for kernel, arguments, options in launches:
        binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(gpu_target(target)))
        values, specialisation, launch_options = binder(*arguments, **options)
        types = {name: kind for name, (kind, _) in zip(values, specialisation)}
        given = {name: values[name] for name in values if kernel.params[kernel.arg_names.index(name)].is_constexpr}
        divisible = [value for kind, value in specialisation if kind != "constexpr"]
        bound.add(str((kernel.__name__, types, given, divisible, launch_options)))
    records = recorded(target, calls)
    assert len(records) == len(bound), (target, len(records), len(bound))
    for record in records[::7]:
        start = str((record.name, record.signature, record.parameters))[:-1]
        assert any(text.startswith(start) for text in bound), start
    kernels[target] = {record.name for record in records}

first = records[0]
names, types = list(first.signature), first.signature
assert (first.name, first.call) == ("energy_rows_kernel", "energy loss, EAR, torch.float64"), first
assert types["x_ptr"] == "*fp64" and types["rows"] == "i32" and types["alpha_"] == "fp64", types
assert types["gy_ptr"] == types["m"] == types["N"] == "constexpr", types
assert first.constexprs[names.index("m"),] == 1 and first.constexprs[names.index("gy_ptr"),] is None, first
assert first.parameters["N"] == 2 and first.options == {"num_warps": 4}, first
assert all(["tt.divisibility", 16] in first.attributes[names.index(name),] for name in ("x_ptr", "rows")), first
assert {"linear_kernel", "generator_kernel"} <= kernels["sm_90"]
assert "linear_kernel" not in kernels["sm_80"] and "generator_kernel" in kernels["sm_80"]
"""


@pytest.mark.slow
def test_records_are_what_triton_specialises():
    result = run_compiling("-c", SPECIALISED)
    assert result.returncode == 0, result.stderr[-3000:]


def a_record(name: str = "kernel", constexprs: dict[str, Any] | None = None, **options: Any) -> Record:
    parameters = constexprs or {}
    signature = {"x": "*bf16", **dict.fromkeys(parameters, "constexpr")}
    values = {(1 + position,): value for position, value in enumerate(parameters.values())}
    return Record("module", name, "a call", signature, values, {}, options, parameters)


def test_names_tell_records_apart():
    records = [
        a_record(constexprs={"N": n, "MANY": many, "D": 4}, num_warps=4) for n in (1, 2) for many in (True, False)
    ]
    assert compile_gate.labels(records) == ["kernel[N=1 MANY]", "kernel[N=1]", "kernel[N=2 MANY]", "kernel[N=2]"]


def test_a_cover_has_every_value():
    records = [a_record(constexprs={"N": n}, num_warps=warps) for n in (1, 2, 3) for warps in (1, 2)]
    kept = compile_gate.covering([*records, a_record("other")])
    assert {record.parameters.get("N") for record in kept} == {1, 2, 3, None}
    assert {record.options.get("num_warps") for record in kept} == {1, 2, None}
    assert len(kept) == 5


def test_known_spills_are_bounded(monkeypatch):
    known = KnownSpill(("kernel",), {"N": ("2", "3")}, 16, "the fastest", ("sm_90",))
    monkeypatch.setattr(compile_gate, "KNOWN_SPILLS", (known,))

    def problems(n: int, spilled: int, target: str = "sm_90", **numbers: int) -> list[str]:
        compiled = Compiled(**{"registers": 255, "spilled": spilled, "shared": 0, "unsafe": 0} | numbers)
        return compile_gate.problems_of(a_record(constexprs={"N": n}), target, compiled)

    assert problems(2, 16) == problems(1, 0) == []
    assert problems(2, 17) == problems(1, 8) == problems(2, 16, "sm_80") == ["spills"]
    assert problems(1, 0, shared=2**18) == ["shared memory over 232448 B"]
    assert problems(1, 0, unsafe=3) == ["3 WGMMAs with A in registers"]


def _raise(record, target):
    raise RuntimeError("PassManager::run failed\nmore")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (_raise, "RuntimeError: PassManager::run failed"),
        (lambda *_: os._exit(3), "the compiler ended its process with status 3"),
    ],
    ids=["raised", "ended"],
)
def test_a_failure_of_the_compiler_is_a_line(monkeypatch, failure, message):
    monkeypatch.setattr(compile_gate, "compile_record", failure)
    ((failed, line),) = compile_gate.lines([a_record()], ["kernel[]"], "sm_90", 1)
    assert failed
    assert line.startswith("FAIL sm_90")
    assert message in line


def record_all(target: str = "sm_90") -> list[tuple[Any, tuple, dict[str, Any]]]:
    """What the example calls launch on a target."""
    launches: list[tuple[Any, tuple, dict[str, Any]]] = []
    with recording(lambda *launch: launches.append(launch), TARGETS[target].processor):
        for _, call in example_calls():
            call()
    return launches


@pytest.fixture(scope="module")
def launches() -> list[tuple[Any, tuple, dict[str, Any]]]:
    return record_all()


def options_of(launches, kernel: str, *names: str) -> set[tuple]:
    """Values of constexprs and launch options in all launches of a kernel."""
    found = {
        tuple(options.get(name) for name in names)
        for launched, _, options in launches
        if launched.fn.__name__ == kernel
    }
    assert found
    return found


def answers(monkeypatch, module: Any, name: str, key: Callable[..., Any]) -> set[Any]:
    """``key(answer, *arguments)`` of every call of a function of ``module`` that the example calls come to."""
    found, function = set(), getattr(module, name)

    def noting(*arguments):
        answer = function(*arguments)
        found.add(key(answer, *arguments))
        return answer

    monkeypatch.setattr(module, name, noting)
    record_all()
    return found


def test_every_entry_of_the_gemms_is_used(monkeypatch):
    used = set()

    class Noting:
        def __init__(self, epilogue, entry):
            self.rows, self.width, self._epilogue, self._entry = entry.rows, entry.width, epilogue, entry

        def __getattr__(self, name):
            used.add((self._epilogue, self.rows, self.width, name))
            return getattr(self._entry, name)

    table = launch_ffn.HOPPER
    noting = {epilogue: tuple(Noting(epilogue, entry) for entry in entries) for epilogue, entries in table.items()}
    monkeypatch.setattr(launch_ffn, "HOPPER", noting)
    record_all()
    assert used == {
        (epilogue, entry.rows, entry.width, name)
        for epilogue, entries in table.items()
        for entry in entries
        for name in ("config", "saving")
    }


def test_every_entry_of_few_rows_is_launched(launches):
    names = ("BM", "BN", "BK", "STAGES", "BN_MOD", "BK_MOD", "STAGES_MOD", "PARTS", "AHEAD")
    configs = [config for *_, half, single in launch_few_rows.TABLE for config in (half, single)]
    assert options_of(launches, "generator_kernel", *names) == {
        tuple(getattr(config, name.lower()) for name in names) for config in configs
    }
    chains = [config for *_, half, single in launch_chain.CHAIN for config in (half, single) if config]
    products = [config for _, *configs in launch_chain.MODULATIONS for config in configs]
    for kernel, table, names in (
        ("chain_kernel", chains, ("BM", "BN", "PARTS")),
        ("modulations_kernel", products, ("BM", "BN", "BK", "STAGES")),
    ):
        assert options_of(launches, kernel, *names) == {
            tuple(getattr(config, name.lower()) for name in names) for config in table
        }


def test_every_entry_of_the_norms_is_launched(launches):
    """For one row a modulation and for longer runs."""
    seen = options_of(launches, "adaln_bwd_kernel", "BLOCK", "SINGLE")
    table = launch_adaln.BACKWARD_ROWS
    assert {(max(min(table), block), single) for block, single in seen} == set(
        itertools.product(table, (True, False))
    )


def test_every_plan_of_inference_is_used(monkeypatch):
    used = answers(monkeypatch, launch_inference, "plan_for", lambda plan, *_: plan)
    assert used == {plan for _, plan in launch_inference.TABLE}


# Samples and features of rows of the energy loss.
SIZES = list(itertools.product((2, 3, 8, 16, 33, 64), (1, 2, 7, 16, 64, 128, 129, 512, 1024, 2048, 4096)))


@pytest.mark.parametrize(
    ("module", "name", "variants"),
    [(launch_loss, "rows_config", [()]), (launch_gaussian, "gaussian_config", [(False,), (True,)])],
    ids=["rows", "gaussian"],
)
def test_every_launch_of_the_energy_loss_is_used(monkeypatch, module, name, variants):
    """In both widths: every number of warps and unrolling, for one row and for several, and what fits none."""

    def kind(config, n, features, double, *variant):
        return double, variant, config and (config.num_warps, config.unroll, config.block_r > 1)

    function = getattr(module, name)
    every = {
        kind(function(*size, double, *variant), *size, double, *variant)
        for size in SIZES
        for double in (False, True)
        for variant in variants
    }
    # Whether a row fits is asked before there is a configuration of drawn targets.
    every = {each for each in every if each[2] is not None or not variants[0]}
    missing = every - answers(monkeypatch, module, name, kind)
    assert not missing


def test_every_tile_of_pairs_is_launched(launches):
    exact, product = ("pairwise_exact_kernel", "pairwise_product_kernel")
    for kernel, configs in (
        (exact, {launch_distance.EXACT}),
        (product, {launch_distance.PRODUCT, launch_distance.PRODUCT_GENERAL}),
    ):
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        assert options_of(launches, kernel, *names) == {
            tuple(getattr(config, name.lower()) for name in names) for config in configs
        }


def test_every_launch_of_the_block_is_used(launches, monkeypatch):
    heads = options_of(launches, "attention_fwd_kernel", "BN", "num_warps", "EVEN", "CAUSAL")
    assert heads == {
        (*launch_attention.keys_and_warps(dim), even, causal)
        for dim, even, causal in itertools.product((64, 80), (True, False), (True, False))
    }
    rows = answers(monkeypatch, launch_block, "norm_backward_config", lambda config, width: config)
    assert rows >= {launch_block.norm_backward_config(width) for width in (64, 768, 1024, 1280, 2048)}


def test_what_amd_does_not_launch():
    """The host code decides: no descriptors, no persistent kernel, no heads of two blocks."""
    launches = record_all("gfx942")
    assert not {"linear_kernel", "generator_kernel", "chain_kernel"} & {kernel.fn.__name__ for kernel, *_ in launches}
    assert max(options_of(launches, "attention_fwd_kernel", "DIM")) == (64,)
