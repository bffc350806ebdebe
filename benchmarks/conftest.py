"""GPU-timed pytest-benchmark: device, copy rate of the card, and the environment in every saved file."""

import pytest
import torch

from benchmarks import timing


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_rate() -> float:
    return timing.copy_rate()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["ear"] = timing.environment()
