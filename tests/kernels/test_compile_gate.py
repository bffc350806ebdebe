"""Every shipped kernel, in every shipped configuration, compiles without spills for four GPUs; no GPU needed."""

import os
import subprocess
import sys

import pytest

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_shipped_kernels_compile(target):
    """In a process of its own: the interpreter, which the other tests switch on, cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ear_kernels.runtime.compile_gate", "--target", target],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    failed = [line for line in result.stdout.splitlines() if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join(failed) + result.stderr[-3000:]
