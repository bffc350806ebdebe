"""The named shapes of the energy-loss benchmarks, and small ones for a machine without a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EnergyShape:
    """One shape: rows, n samples, m targets (0: Gaussian draws are not used), D features.

    ``ours_bytes`` is what a perfect kernel moves for forward and backward: samples and targets (or mean and log_std)
    read once, gradients of the samples written once.
    """

    name: str
    rows: int
    n: int
    m: int
    features: int
    gaussian: bool = False
    bytes_per_number: int = 4

    @property
    def ours_bytes(self) -> int:
        targets = 2 if self.gaussian else self.m
        return self.rows * self.features * (2 * self.n + targets) * self.bytes_per_number


@dataclass(frozen=True)
class DistanceShape:
    """Two point sets of ``points`` points each, D features."""

    name: str
    points: int
    features: int


GPU_SHAPES = [
    EnergyShape("EAR 32k", 32_768, 2, 1, 16),
    EnergyShape("EAR 1M", 1_048_576, 2, 1, 16),
    EnergyShape("CALM 2k", 2_048, 8, 100, 128, gaussian=True),
    EnergyShape("CALM 8k", 8_192, 8, 100, 128, gaussian=True),
    EnergyShape("ensemble", 1_000_000, 16, 1, 1),
    EnergyShape("whole field", 8, 8, 1, 1_000_000),
]
GPU_DISTANCES = [DistanceShape("energy distance", 50_000, 64)]
CPU_SHAPES = [
    EnergyShape("EAR small", 2_048, 2, 1, 16),
    EnergyShape("CALM small", 16, 8, 20, 128, gaussian=True),
    EnergyShape("ensemble small", 10_000, 16, 1, 1),
    EnergyShape("field small", 2, 8, 1, 20_000),
]
CPU_DISTANCES = [DistanceShape("energy distance small", 1_000, 64)]
