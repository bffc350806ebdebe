"""Descriptions of targets that are not tensors."""

from dataclasses import dataclass

from torch import Tensor


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
        for name, tensor in (("mean", self.mean), ("log_std", self.log_std)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
            if not tensor.is_floating_point():
                raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if isinstance(self.num_targets, bool) or not isinstance(self.num_targets, int):
            raise TypeError(f"num_targets is {self.num_targets!r}; it must be an integer")
        if self.num_targets < 1:
            raise ValueError(f"num_targets is {self.num_targets}; it must be at least 1")
        if self.log_std.device != self.mean.device:
            raise ValueError(f"log_std is on {self.log_std.device} and mean on {self.mean.device}; put both on one")
        shape, full = tuple(self.log_std.shape), tuple(self.mean.shape)
        fits = len(shape) <= len(full) and all(
            size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(full), strict=False)
        )
        if not fits:
            raise ValueError(f"log_std has shape {shape}; it must broadcast to the mean's shape {full}")
