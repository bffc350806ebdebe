"""The logarithmic score over a codebook (paper section 5.2, the VQ Transformer of Fig. 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.scores.base import Score
from ear_model.tokenizers.codebook import Codebook, nearest_codes

PROBABILITIES_AT_A_TIME = 2**23
"""Probabilities that sampling holds at once, 64 MB in float64."""


class CategoricalScore(Score):
    """Tokens are indices of the nearest of K codes; softmax of a linear layer, cross-entropy.

    A token is one number, the index as float32, exact up to 2^24. The codebook ``[K, D]`` is a parameter that is not
    trained rather than a buffer: weight files, moving averages, FSDP and their checks go over ``named_parameters``,
    so that a run holds its codebook in all its files, in an unchanged format; the average of equal values is that
    value, and the optimiser's groups leave out what is not trained. It is standard normal until
    :meth:`load_codebook` or a weight file gives another.
    """

    codebook: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.token_size = 1
        self.linear = nn.Linear(config.width, config.codebook_size)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.token_dim), requires_grad=False)
        self._patches = config.channels, config.patch_size

    @torch.no_grad()
    def load_codebook(self, codebook: Codebook, where: str = "the codebook") -> None:
        """Begin with these codes.

        Args:
            codebook: of this model's K, D and patches.
            where: the file, for messages.

        Raises:
            ValueError: a codebook of another size.
        """
        info, vectors = codebook.info, codebook.vectors
        own, theirs = tuple(self.codebook.shape), tuple(vectors.shape)
        for name, need, have in zip(("codes", "numbers in a code"), own, theirs, strict=True):
            if need != have:
                raise ValueError(
                    f"{where} has {have} {name}; the model needs {need}"
                    + (f" (or --model.codebook-size {have})" if name == "codes" else "")
                )
        if (info.channels, info.patch_size) != self._patches:
            raise ValueError(
                f"{where} is of {info.channels} channels and patches of {info.patch_size}; the model reads "
                f"{self._patches[0]} channels and patches of {self._patches[1]}"
            )
        self.codebook.copy_(vectors)

    @torch.no_grad()
    def encode(self, tokens_BLD: Tensor) -> Tensor:
        """Index of the nearest code, float32 ``[B, L, 1]``; NaN for a token that is not finite."""
        indices_BL = nearest_codes(tokens_BLD, self.codebook).float()
        finite_BL = tokens_BLD.isfinite().all(dim=-1)
        return indices_BL.where(finite_BL, torch.nan).unsqueeze(-1)

    def decode(self, tokens_BL1: Tensor) -> Tensor:
        """The codes of these indices, float32 ``[B, L, D]``; NaN for an index that is."""
        indices_BL = tokens_BL1.squeeze(-1).nan_to_num(0).long()
        return self.codebook[indices_BL].float().where(tokens_BL1.isfinite(), torch.nan)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Log probabilities of the codes but for a constant, float32 ``[R, K]``."""
        return self.linear(hidden_RC).float()

    def loss(self, hidden_RC: Tensor, targets_R1: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The mean cross-entropy, a scalar in float32; nothing is drawn. NaN if a target is, 0 over no rows."""
        targets_R = targets_R1.squeeze(-1)
        losses_R = F.cross_entropy(self.logits(hidden_RC), targets_R.nan_to_num(0).long(), reduction="none")
        return losses_R.where(targets_R.isfinite(), torch.nan).sum() / max(1, len(targets_R))

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """A number ``[*shape, 1]`` for a token, uniform on [0, 1), in float32 whatever ``like`` is in."""
        return draws.rand(*shape, 1, device=like.device)

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_R1: Tensor,
    ) -> Tensor:
        """Indices ``[R, 1]`` in float32: the inverse of the distribution function at the uniform number.

        Of ``softmax(l / temperature)``, or the likeliest code at temperature 0, with ``l = g l_class + (1 - g)
        l_null`` where there is guidance. NaN where the logits are not finite.
        """
        rows = max(1, PROBABILITIES_AT_A_TIME // self.linear.out_features)
        hidden, noise = hidden_RC.split(rows), noise_R1.split(rows)
        null_hidden = [None] * len(hidden) if null_hidden_RC is None else null_hidden_RC.split(rows)
        parts = []
        for own_RC, null_RC, noise_part in zip(hidden, null_hidden, noise, strict=True):
            logits_RK = self.logits(own_RC)
            if null_RC is not None:
                logits_RK = guidance * logits_RK + (1 - guidance) * self.logits(null_RC)
            parts.append(draw_indices(logits_RK, temperature, noise_part))
        return torch.cat(parts)


def draw_indices(logits_RK: Tensor, temperature: float, noise_R1: Tensor) -> Tensor:
    """A draw ``[R, 1]`` of ``softmax(logits / temperature)`` by the inverse of its distribution function.

    Code k is drawn for uniform numbers u with ``F(k - 1) <= u < F(k)``, F summed up in float64: with u of 24 bits no
    code of probability 0 is, and every code of 2^-24 or more can be.
    """
    if temperature == 0:
        indices_R1 = logits_RK.argmax(dim=1, keepdim=True)
    else:
        # Less the largest first: a small temperature would make them infinite.
        shifted_RK = (logits_RK - logits_RK.amax(dim=1, keepdim=True)).double() / temperature
        sums_RK = shifted_RK.exp().cumsum(dim=1)
        indices_R1 = torch.searchsorted(sums_RK, noise_R1.double() * sums_RK[:, -1:], right=True)
    finite_R1 = logits_RK.isfinite().all(dim=1, keepdim=True)
    return indices_R1.float().where(finite_R1, torch.nan)
