"""The tolerance of tests and benchmarks: a kernel may be off by twice what the same-dtype eager code is off.

Both are compared with float64. Fixed tolerances would be loose where the problem is easy and wrong where it is hard.
"""

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = 4.0
# float64 has no better reference: eager's own rounding errors, whatever they are, look like 0.
FLOAT64_FLOOR_ULPS = 16.0


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error of ``actual`` against ``exact`` (float64), over all elements."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = (actual.detach().double() - exact.detach().double()).abs()
    # By the largest, so that the square of a huge or tiny error does not leave float64.
    largest = difference.max()
    if largest == 0 or not torch.isfinite(largest):
        return largest.item(), largest.item()
    return largest.item(), (largest * (difference / largest).square().mean().sqrt()).item()


def assert_close_to_eager(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, scale: float | None = None, factor: float = FACTOR
) -> None:
    """Raise AssertionError unless ``actual`` is about as close to ``exact`` as ``eager`` is.

    Both the largest and the RMS error must be at most ``factor`` times that of ``eager``, plus ``FLOOR_ULPS`` units
    in the last place of ``scale``, because an eager result is at times right by chance.

    Args:
        name: of the quantity, for the message.
        actual: the kernel's result.
        eager: the result of the reference on the same inputs in the same dtype.
        exact: the result of the reference in float64.
        scale: magnitude of the terms that were summed up; the largest ``|exact|`` by default.
        factor: see above.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name} has dtype {actual.dtype}, eager {eager.dtype}"
    finite = torch.isfinite(exact)
    if not finite.all():
        assert not torch.isfinite(actual[~finite]).any(), f"{name} is finite where the float64 result is not"
        actual, eager, exact = actual[finite], eager[finite], exact[finite]
    if exact.numel() == 0:
        return
    # Where even the reference leaves the dtype's range the kernel may, too.
    kept = torch.isfinite(eager)
    assert torch.isfinite(actual[kept]).all(), f"{name} holds NaN or Inf where eager does not"
    actual, eager, exact = actual[kept], eager[kept], exact[kept]
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item() if scale is None else scale
    ulps = FLOAT64_FLOOR_ULPS if actual.dtype == torch.float64 else FLOOR_ULPS
    floor = ulps * torch.finfo(actual.dtype).eps * scale + torch.finfo(actual.dtype).smallest_normal
    for kind, ours, theirs in zip(("largest", "RMS"), errors(actual, exact), errors(eager, exact), strict=True):
        assert ours <= factor * theirs + floor, (
            f"{name}: {kind} error {ours:.3e} is more than {factor} x eager's {theirs:.3e} + {floor:.1e}"
        )
