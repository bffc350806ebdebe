"""The public MAR model, written from its description in plain torch: what ours is compared with.

Functions of a dict of parameters with the public names. The diffusion goes by way of the predicted token, as there.
"""

import math

import torch
import torch.nn.functional as F


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def block(weights, name, x, heads):
    batch, length, width = x.shape
    qkv = linear(weights, f"{name}.attn.qkv", norm(weights, f"{name}.norm1", x))
    query, key, value = (part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    shares = (query @ key.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
    x = x + linear(weights, f"{name}.attn.proj", (shares @ value).transpose(1, 2).reshape(batch, length, width))
    inner = F.gelu(linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", x)))
    return x + linear(weights, f"{name}.mlp.fc2", inner)


def hidden_states(weights, tokens, masked, classes, heads, depths):
    """``[B, L, C]``, image by image, so that nothing depends on equal numbers of known tokens."""
    rows = []
    for own, hides, embedded_class in zip(tokens, masked, classes, strict=True):
        positions = weights["encoder_pos_embed_learned"][0]
        buffer = len(positions) - len(own)
        x = torch.cat([embedded_class.repeat(buffer, 1), linear(weights, "z_proj", own)]) + positions
        known = torch.cat([torch.ones(buffer, dtype=torch.bool), ~hides])
        x = norm(weights, "z_proj_ln", x)[known].unsqueeze(0)
        for layer in range(depths[0]):
            x = block(weights, f"encoder_blocks.{layer}", x, heads)
        x = linear(weights, "decoder_embed", norm(weights, "encoder_norm", x))[0]
        places = known.cumsum(0) - 1
        x = torch.where(known.unsqueeze(1), x[places], weights["mask_token"][0])
        x = (x + weights["decoder_pos_embed_learned"][0]).unsqueeze(0)
        for layer in range(depths[1]):
            x = block(weights, f"decoder_blocks.{layer}", x, heads)
        rows.append(norm(weights, "decoder_norm", x)[0, buffer:] + weights["diffusion_pos_embed_learned"][0])
    return torch.stack(rows)


def head(weights, x, times, hidden):
    """Predicted noise and variance range ``[R, 2 D]``."""
    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    angles = times.to(x.dtype)[:, None] * frequencies
    embedded = linear(weights, "diffloss.net.time_embed.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], 1))
    condition = linear(weights, "diffloss.net.time_embed.mlp.2", F.silu(embedded))
    condition = F.silu(condition + linear(weights, "diffloss.net.cond_embed", hidden))
    x = linear(weights, "diffloss.net.input_proj", x)
    layers = len([name for name in weights if name.startswith("diffloss.net.res") and name.endswith("in_ln.weight")])
    for layer in range(layers):
        name = f"diffloss.net.res_blocks.{layer}"
        shift, scale, gate = linear(weights, f"{name}.adaLN_modulation.1", condition).chunk(3, -1)
        inner = norm(weights, f"{name}.in_ln", x) * (1 + scale) + shift
        x = x + gate * linear(weights, f"{name}.mlp.2", F.silu(linear(weights, f"{name}.mlp.0", inner)))
    shift, scale = linear(weights, "diffloss.net.final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return linear(weights, "diffloss.net.final_layer.linear", x)


class Diffusion:
    """Tables of a schedule, float64 ``[T]``."""

    def __init__(self, steps=None, betas=None):
        if betas is None:

            def share(t):
                return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

            betas = [min(0.999, 1 - share((t + 1) / steps) / share(t / steps)) for t in range(steps)]
        self.betas = torch.tensor(betas, dtype=torch.float64)
        self.bars = (1 - self.betas).cumprod(0)
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), self.bars[:-1]])
        variance = self.betas * (1 - self.before) / (1 - self.bars)
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def respaced(self, times):
        bars = self.bars[times]
        before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
        return Diffusion(betas=(1 - bars / before).tolist())

    def noisy(self, start, t, noise):
        return self.bars[t].sqrt()[:, None] * start + (1 - self.bars[t]).sqrt()[:, None] * noise

    def posterior_mean(self, start, x, t):
        beta, bar, before = (each[t][:, None] for each in (self.betas, self.bars, self.before))
        return (beta * before.sqrt() * start + (1 - before) * (1 - beta).sqrt() * x) / (1 - bar)

    def model(self, output, x, t):
        """Mean and log variance of the step back."""
        size = x.shape[1]
        bar = self.bars[t][:, None]
        start = x / bar.sqrt() - (1 / bar - 1).sqrt() * output[:, :size]
        share = (output[:, size:] + 1) / 2
        log_variance = share * self.betas[t].log()[:, None] + (1 - share) * self.log_variance[t][:, None]
        return self.posterior_mean(start, x, t), log_variance

    def loss(self, output, start, t, noise):
        """Of each row: squared error and the bound in bits."""
        size = start.shape[1]
        x = self.noisy(start, t, noise)
        frozen = torch.cat([output[:, :size].detach(), output[:, size:]], 1)
        mean, log_variance = self.model(frozen, x, t)
        true_mean, true_log = self.posterior_mean(start, x, t), self.log_variance[t][:, None]
        kl = (log_variance - true_log - 1 + (true_log - log_variance).exp()) / 2
        kl = kl + (true_mean - mean) ** 2 / (2 * log_variance.exp())

        def cumulative(y):
            return (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2

        upper = cumulative((start - mean + 1 / 255) / (log_variance / 2).exp())
        lower = cumulative((start - mean - 1 / 255) / (log_variance / 2).exp())
        inside = torch.where(start > 0.999, 1 - lower, torch.where(start < -0.999, upper, upper - lower))
        bound = torch.where(t[:, None] == 0, -inside.clamp(min=1e-12).log(), kl).mean(1) / math.log(2)
        return ((output[:, :size] - noise) ** 2).mean(1) + bound


def sample_tokens(weights, hidden, null, guidance, temperature, noise, process, times):
    """Tokens of rows; ``noise [S, R, D]``: the start, then what the steps but the last one add, in their order."""
    x, size = noise[0], noise.shape[2]
    for number, place in enumerate(reversed(range(len(times)))):
        at = torch.full((len(x),), times[place])
        output = head(weights, x, at, hidden)
        if null is not None:
            other = head(weights, x, at, null)[:, :size]
            output = torch.cat([other + guidance * (output[:, :size] - other), output[:, size:]], 1)
        mean, log_variance = process.model(output, x, torch.full((len(x),), place))
        x = mean if place == 0 else mean + (log_variance / 2).exp() * noise[number + 1] * temperature
    return x
