"""Square patches of pixels or of latents as tokens; nothing is learned, nothing is lost."""

from torch import Tensor


class PixelPatches:
    """Cuts ``[B, channels, size, size]`` into tokens ``[B, L, channels * patch^2]`` and puts them together again.

    The order inside a token is (channel, row, column), that of the public code; tokens go row by row.

    Args:
        size: height and width of the images.
        channels: their channels.
        patch: side of a patch; must divide ``size``.
    """

    def __init__(self, size: int, channels: int, patch: int) -> None:
        if size % patch != 0:
            raise ValueError(f"image size {size} is not divisible by the patch size {patch}")
        self.size, self.channels, self.patch = size, channels, patch
        self.side = size // patch
        self.num_tokens = self.side**2
        self.token_dim = channels * patch**2

    def encode(self, images: Tensor) -> Tensor:
        """``[B, channels, size, size]`` to ``[B, L, D]``. Raises ValueError for another shape."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.channels, self.size, self.size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; they must be "
                f"[batch, {self.channels}, {self.size}, {self.size}]"
            )
        patches = images.unflatten(3, (self.side, self.patch)).unflatten(2, (self.side, self.patch))
        # [B, c, row of patches, row, column of patches, column] to [B, patch, (c, row, column)]
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], self.num_tokens, self.token_dim)

    def decode(self, tokens: Tensor) -> Tensor:
        """``[B, L, D]`` to ``[B, channels, size, size]``. Raises ValueError for another shape."""
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.num_tokens, self.token_dim):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; they must be [batch, {self.num_tokens}, {self.token_dim}]"
            )
        grid = tokens.reshape(-1, self.side, self.side, self.channels, self.patch, self.patch)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, self.size, self.size)
