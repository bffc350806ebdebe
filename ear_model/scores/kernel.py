"""The kernel score (Gneiting & Raftery 2007, section 5): an implicit generator trained to match kernel means."""

import math

from torch import Tensor

from ear_kernels import kernel_score_loss
from ear_kernels.functional import check_kernel_score_options
from ear_model.config import ModelConfig
from ear_model.scores.generator import GeneratorScore


class KernelScore(GeneratorScore):
    """The MLP generator and the kernel score over all pairs of ``num_samples`` samples.

    The kernel's bandwidth h is ``config.bandwidth`` times sqrt(D), about the distance at which tokens of D numbers
    of unit variance lie from one another (docs/scores.md, "Kernel score").
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.kernel, self.bandwidth = config.kernel, config.bandwidth * math.sqrt(config.token_dim)
        check_kernel_score_options(self.kernel, self.bandwidth, "mean")

    def loss_of(
        self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor, *, noise_pool: int | None = None
    ) -> Tensor:
        """The loss with these noise vectors ``[R, num_samples, noise_dim]``, or with about ``noise_pool`` of them."""
        samples_RnD = self.generator(hidden_RC, noise_RnE, noise_pool=noise_pool)
        return kernel_score_loss(samples_RnD, targets_RD, kernel=self.kernel, bandwidth=self.bandwidth)
