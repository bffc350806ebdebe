"""A decoding step of MAR's backbone: the encoder over the tokens that are known, the decoder over all.

Known tokens lie in the encoder's input in the order in which they were predicted, so a step adds rows at its end;
attention and what follows do not depend on it. Shapes grow from step to step: each step has graphs of its own. Of the
decoder's last block, all but keys and values is computed for the predicted tokens alone. Legend:
:mod:`ear_model.sampling.state`; K known tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_model.sampling.state import Decoding
from ear_model.sampling.steps import SamplingModel
from ear_model.sampling.weights import Weights


class MarDecoding(Decoding):
    """The buffers of a batch and the steps of :class:`ear_model.model.mar_backbone.MarBackbone` over them."""

    def __init__(self, model: SamplingModel, weights: Weights, batch: int, *, guided: bool) -> None:
        super().__init__(model, weights, batch, guided=guided)
        backbone = model.backbone
        self.encoder_position_SC = backbone.encoder_pos_embed_learned.detach()[0]
        self.last_position_LC = backbone.diffusion_pos_embed_learned.detach()[0]
        self.masked_SC = torch.zeros_like(self.position_SC)
        self.places_P = torch.arange(self.prefix, device=self.left.device)

    def step_name(self, known: int) -> tuple[int, ...]:
        return (known,)

    def begin(self) -> None:
        backbone, prefix = self.model.backbone, self.prefix
        self.start_GSC[:, :prefix] = self._normed(self.classes_GC.unsqueeze(1) + self.encoder_position_SC[:prefix])
        # Rounded where the decoder's linear is.
        self.masked_SC.copy_(backbone.mask_token[0].to(self.dtype) + self.position_SC)
        self.tokens_BLD.zero_()
        self.left.fill_(self.config.num_tokens)

    def hidden(self, known: int, count: int, guided: bool = False) -> tuple[Tensor, Tensor]:
        sequences, width, prefix = self.sequences if guided else self.batch, self.config.width, self.prefix
        seen, weights = prefix + known, self.weights
        stream_GSC = self.stream_GSC[:sequences]
        encoder_GKC = self.stream_GSC.flatten()[: sequences * seen * width].view(sequences, seen, width)
        encoder_GKC.copy_(self.start_GSC[:sequences, :seen])
        stream, branches = self.run_blocks(weights.encoder, encoder_GKC, encoder_GKC)
        embed = weights.decoder_embed
        encoded_GKC = embed(weights.encoder_norm(stream, *branches, dtype=self.dtype))
        # Places of the encoder's rows: the class tokens, then the known tokens, the last of the order first.
        places_BK = prefix + self.orders_BL.flip(1)[:, :known]
        places_GK = torch.cat([self.places_P.expand(sequences, -1), places_BK.repeat(sequences // self.batch, 1)], 1)
        rows_R = (places_GK + self.starts_G[:sequences, None]).flatten()
        stream_GSC.copy_(self.masked_SC)
        stream_GSC.flatten(0, 1).index_copy_(0, rows_R, (encoded_GKC + self.position_SC[places_GK]).flatten(0, 1))
        stream, branches = self.run_blocks(weights.blocks[:-1], stream_GSC, stream_GSC)
        rows_GK, hidden_RC = self.predict_last(count, guided, stream, branches, stream_GSC)
        places_R = rows_GK % self.length - prefix
        return rows_GK, hidden_RC + self.last_position_LC[places_R[: len(hidden_RC)]]

    def write(self, rows_GK: Tensor, sampled_RD: Tensor, count: int) -> None:
        own_R, tokens = rows_GK[: len(sampled_RD)], self.config.num_tokens
        places_R = own_R % self.length
        kept_R = own_R // self.length * tokens + places_R - self.prefix
        self.tokens_BLD.flatten(0, 1).index_copy_(0, kept_R, sampled_RD.to(self.tokens_BLD.dtype))
        embed = self.weights.embed
        if embed is None:
            embedded_RC = self.model.backbone.z_proj(sampled_RD)
        else:
            embedded_RC = F.linear(sampled_RD.to(self.dtype), embed.weight, embed.bias)
        normed_RC = self._normed(embedded_RC + self.encoder_position_SC[places_R])
        # The later in the order, the earlier predicted.
        slots_k = self.prefix + tokens - self.left + count - 1 - self.places_L[:count]
        rows_Gk = (self.starts_G.unsqueeze(1) + slots_k).flatten()
        self.start_GSC.flatten(0, 1).index_copy_(0, rows_Gk, normed_RC.repeat(len(rows_Gk) // len(own_R), 1))
        self.left -= count

    def _normed(self, placed: Tensor) -> Tensor:
        norm = self.weights.embed_norm
        return F.layer_norm(placed.to(norm.weight.dtype), placed.shape[-1:], norm.weight, norm.bias, norm.eps)
