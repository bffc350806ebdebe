"""What starts quickly, and what works without the packages of the extra "train": each in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ear_model.cli import COMMANDS, EXTRA

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "numpy", "PIL", "sklearn", "timm", "safetensors", "matplotlib", "scipy")
# Modules that no finder finds, as if they were not installed.
WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)


QUICK = [
    ["--help"],
    [],
    ["smaple"],
    ["train", "--help"],
    ["train", "digits", "--help"],
    ["train", "digits", "--train.stepz", "3"],
    ["train", "digitz"],
    ["sample", "run", "--nmu", "3"],
    *([name, "--help"] for name in COMMANDS if name != "train"),
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_help_and_mistyped_words_answer_at_once(arguments) -> None:
    """Without torch, and in well under the seconds that importing it takes; 0.2 s on an idle machine."""
    answer = run(f"""
import json, resource, sys
from ear_model import cli
try:
    status = cli.main({arguments!r})
except SystemExit as stop:
    status = stop.code or 0
usage = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in {SLOW!r} if name in sys.modules]
print("\\n" + json.dumps([status, usage.ru_utime + usage.ru_stime, loaded]))
""")
    status, seconds, loaded = json.loads(answer.stdout.splitlines()[-1])
    assert loaded == []
    assert seconds < 1.5
    if "--help" in arguments:
        assert status == 0
        assert "usage" in answer.stdout
    else:
        assert status in (1, 2)
        assert answer.stderr.count("\n") == (1 if arguments else 0)


def test_the_kernels_need_nothing_of_the_extra() -> None:
    answer = run(
        WITHOUT.format(names=EXTRA)
        + """
import torch
from ear_kernels import FusedAdamW, FusedEnergyLoss, FusedMLPGenerator, accelerate
generator = FusedMLPGenerator(8, 16, 4, depth=1)
samples = generator(torch.randn(5, 8), torch.rand(5, 2, 64) - 0.5)
loss = FusedEnergyLoss()(samples, torch.randn(5, 4))
loss.backward()
FusedAdamW(generator.parameters()).update()
print(loss.item())
"""
    )
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) > 0


@pytest.mark.parametrize("missing", [EXTRA, ("timm",), ("tyro",)], ids="-".join)
@pytest.mark.parametrize("arguments", [["train", "digits"], ["--help"], ["sample", "--help"]], ids=" ".join)
def test_the_command_without_the_extra_says_what_to_install(missing, arguments) -> None:
    answer = run(
        WITHOUT.format(names=missing)
        + f"""
from ear_model import cli
sys.exit(cli.main({arguments!r}))
"""
    )
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert 'pip install "ear-kernels[train]"' in answer.stderr
    assert all(name in answer.stderr for name in missing)
    assert answer.stdout == ""


def test_the_extra_installs_what_the_command_asks_for() -> None:
    text = (ROOT / "setup.py").read_text()
    train = re.search(r"TRAIN = \[(.*?)\]", text, re.DOTALL)[1]
    core = re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL)[1]
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for name in EXTRA:
        assert f'"{distributions.get(name, name)}' in train
        assert f'"{distributions.get(name, name)}' not in core
    assert re.search(r'"test": \[\s*\*TRAIN', text)
