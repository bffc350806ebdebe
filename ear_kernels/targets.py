"""Descriptions of targets that are not tensors."""

from dataclasses import dataclass

from torch import Tensor

from ear_kernels.runtime.checks import check_broadcast, check_device, check_floating


@dataclass(frozen=True)
class GaussianTarget:
    """Targets ``mean + exp(log_std) * normal``, drawn inside the energy loss: CALM's case.

    Pass it as ``target`` of :func:`ear_kernels.energy_loss`. On the GPU the draws never touch memory; the eager
    backend draws them with ``torch.randn``. Both follow ``torch.manual_seed``, with different numbers.

    Args:
        mean: ``[..., D]``, floating point, with the rows of the samples in front.
        log_std: broadcastable to ``mean``; the logarithm of the standard deviation.
        num_targets: m, the number of draws a row.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no targets, or shapes or devices that do not fit.
    """

    mean: Tensor
    log_std: Tensor
    num_targets: int

    def __post_init__(self) -> None:
        check_floating("mean", self.mean)
        check_floating("log_std", self.log_std)
        if isinstance(self.num_targets, bool) or not isinstance(self.num_targets, int):
            raise TypeError(f"num_targets is {self.num_targets!r}; it must be an integer")
        if self.num_targets < 1:
            raise ValueError(f"num_targets is {self.num_targets}; it must be at least 1")
        check_device("log_std", self.log_std, self.mean, "mean")
        check_broadcast("log_std", self.log_std, tuple(self.mean.shape), "the mean's shape")
