"""The energy score (paper section 4.1): an implicit generator trained with the energy loss."""

from torch import Tensor

from ear_kernels import FusedEnergyLoss
from ear_model.config import ModelConfig
from ear_model.scores.generator import GeneratorScore


class EnergyScore(GeneratorScore):
    """The MLP generator and the energy loss of paper Eq. 10 over all pairs of ``num_samples`` samples."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.energy_loss = FusedEnergyLoss(alpha=config.alpha)

    @property
    def tau(self) -> float:
        """Weight of the diversity term in training; set it to fine-tune (section 4.3)."""
        return self.energy_loss.tau

    @tau.setter
    def tau(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"tau is {value}; it must be in (0, 1]")
        self.energy_loss.tau = value

    def loss_of(
        self, hidden_RC: Tensor, targets_RD: Tensor, noise_RnE: Tensor, *, noise_pool: int | None = None
    ) -> Tensor:
        """The loss with these noise vectors ``[R, num_samples, noise_dim]``, or with about ``noise_pool`` of them."""
        return self.energy_loss(self.generator(hidden_RC, noise_RnE, noise_pool=noise_pool), targets_RD)
