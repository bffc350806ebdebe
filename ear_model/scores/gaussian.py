"""The logarithmic score with a fixed variance (paper section 5.2, Fig. 4: the Gaussian Transformer)."""

from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.base import Score
from ear_model.scores.linear import FullPrecisionLinear


class GaussianScore(Score):
    """A token's mean from its hidden state; the loss is the mean squared error.

    Under ``N(mean, sigma^2 I)`` in D dimensions the logarithmic score of a target y is

        -log p(y) = |y - mean|^2 / (2 sigma^2) + (D / 2) log(2 pi sigma^2)

    so with sigma fixed it is ``D / (2 sigma^2)`` times the squared error, averaged over the D numbers, plus a
    constant: both have the same minimum. The loss leaves out factor and constant, and so training needs no sigma. It
    is strictly proper for such Gaussians only: of any other distribution it finds the mean. Sigma is chosen when
    sampling, as the temperature.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.linear = FullPrecisionLinear(config.width, config.token_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, hidden_RC: Tensor, targets_RT: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The squared error, averaged over rows and numbers, a scalar in float32 (float64 stays); 0 of no rows."""
        means_RD = self.linear(hidden_RC)
        return (means_RD - targets_RT).square().sum() / max(1, means_RD.numel())

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """Standard normal numbers ``[*shape, D]`` in float32."""
        return draws.randn(*shape, self.token_size, device=like.device)

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_RE: Tensor,
    ) -> Tensor:
        """Tokens ``mean + temperature * noise`` ``[R, D]``, of guided means ``g mean_class + (1 - g) mean_null``."""
        means_RD = self.linear(hidden_RC)
        if null_hidden_RC is not None:
            means_RD = guidance * means_RD + (1 - guidance) * self.linear(null_hidden_RC)
        return (means_RD + temperature * noise_RE).float()
