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
    name: str,
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    scale: float = 0.0,
    *,
    factor: float = FACTOR,
    ulps: float = FLOOR_ULPS,
) -> None:
    """Raise AssertionError unless ``actual`` is about as close to ``exact`` as ``eager`` is.

    Both the largest and the RMS error must be at most ``factor`` times that of ``eager``, plus a floor, because an
    eager result is at times right by chance: ``ulps`` units in the last place of the largest value, half as many of
    the RMS value, and what is lost near the dtype's smallest numbers.

    Args:
        name: of the quantity, for the message.
        actual: the kernel's result.
        eager: the result of the reference on the same inputs in the same dtype.
        exact: the result of the reference in float64.
        scale: magnitude of the terms that were summed up, where they may cancel: the floor counts units of this where
            ``exact`` is smaller.
        factor, ulps: see above.
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
    limits = torch.finfo(actual.dtype)
    ulps = FLOAT64_FLOOR_ULPS if actual.dtype == torch.float64 else ulps
    # float16's smallest numbers are used; those of the others may be flushed to 0.
    smallest = 2 * limits.smallest_normal * limits.eps if actual.dtype == torch.float16 else limits.smallest_normal
    sizes = errors(exact, torch.zeros_like(exact))
    # Of a single number the RMS error is the largest.
    kinds = (("largest", ulps), ("RMS", ulps / 2))[: 1 if exact.numel() == 1 else 2]
    pairs = zip(kinds, errors(actual, exact), errors(eager, exact), sizes, strict=False)
    for (kind, units), ours, theirs, size in pairs:
        floor = units * limits.eps * max(scale, size) + smallest
        assert ours <= factor * theirs + floor, (
            f"{name}: {kind} error {ours:.3e} is more than {factor} x eager's {theirs:.3e} + {floor:.1e}"
        )
