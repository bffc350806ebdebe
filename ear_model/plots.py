"""Pictures: images as bytes and in a grid, and curves."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ear_model.files import write_atomically


def to_bytes(images: Tensor) -> Tensor:
    """Images in -1..1 as 8-bit RGB, uint8 ``[N, 3, H, W]`` where they are; a single channel is repeated."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; a picture needs 1 or 3")
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def save_grid(images: Tensor, path: Path, columns: int, *, min_tile: int = 32) -> None:
    """Write images as a PNG grid, small ones enlarged to whole pixels.

    Args:
        images: ``[N, 1 or 3, H, W]`` in -1..1, or 8-bit ones of :func:`to_bytes`.
        path: the picture.
        columns: images in a row.
        min_tile: height that an image has at least.
    """
    from PIL import Image

    levels = images if images.dtype == torch.uint8 else to_bytes(images)
    count, _, height, width = levels.shape
    rows, gap = -(-count // columns), 1
    canvas = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 96, dtype=torch.uint8)
    for index in range(count):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = levels[index]
    picture = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, min_tile // height)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_loss_curve(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """Write the loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(steps, losses, linewidth=1)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("energy loss")
    axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)
