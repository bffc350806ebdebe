"""Random calls of the energy loss against float64: the count of them is EAR_ENERGY_CASES.

On a GPU a structure, which costs a compilation, serves twelve calls. 1,500 of them take some minutes there:
``EAR_ENERGY_CASES=1500 pytest -n 10 -m gpu -s tests/kernels/test_energy_loss_random.py``.
"""

import os
import random
from collections import Counter

import pytest
import torch

from tests.conftest import SESSION_SEED
from tests.kernels.conftest import HAS_GPU
from tests.kernels.problems import random_problem
from tests.kernels.test_energy_loss_triton import check

CASES = int(os.environ.get("EAR_ENERGY_CASES", "300" if HAS_GPU else "20"))
CALLS_A_STRUCTURE = 12 if HAS_GPU else 1
PARTS = 10 if HAS_GPU else 1  # xdist's workers compile side by side
# The interpreter's bfloat16 arithmetic is wrong.
DTYPES = (torch.float32, torch.float16, torch.float64, *((torch.bfloat16,) if HAS_GPU else ()))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases(triton_backend, device, capsys, part) -> None:
    """n, m, D, dtype, strides, alpha, tau, eps, fair, weights, coincident points, masked NaN: none may fail."""
    draw = random.Random(f"{SESSION_SEED} {part}")
    seen: Counter[str] = Counter()
    failures = []
    for case in range(CASES // PARTS):
        if case % CALLS_A_STRUCTURE == 0:
            structure, dtype = draw.randrange(2**31), draw.choice(DTYPES)
        data = draw.randrange(2**31)
        problem = random_problem(structure, data, large=HAS_GPU)
        seen[str(dtype).removeprefix("torch.")] += 1
        try:
            check(problem, dtype, device)
        except Exception as error:  # a failed compiler pass counts like a wrong number
            failures.append(f"{dtype} {problem}: {type(error).__name__}: {error}".splitlines()[0])
    with capsys.disabled():
        print(f"\nenergy loss: {CASES // PARTS} random cases ({dict(seen)}), {len(failures)} failures")
    assert not failures, "\n".join(failures[:20])
