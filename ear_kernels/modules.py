"""Thin modules over the functional operations, with the parameter names of the public EAR head."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_kernels import functional
from ear_kernels.head import ffn_parameters, head_parameters, linear_parameters, norm_parameters
from ear_kernels.noise_pool import pool_arrangement
from ear_kernels.runtime.backend import choose_backend
from ear_kernels.runtime.checks import check_device, check_floating, takes_tensors
from ear_kernels.runtime.plain import are_modules_watched, is_plain, runs_forward, work_together
from ear_kernels.targets import GaussianTarget


class FusedEnergyLoss(nn.Module):
    """The energy loss as a module; see :func:`ear_kernels.energy_loss` for shapes, dtypes and errors.

    >>> loss = FusedEnergyLoss(alpha=1.0)(samples, target)   # samples [..., n, D], target [..., D]
    """

    def __init__(
        self,
        alpha: float = 1.0,
        tau: float = 1.0,
        sample_dim: int = -2,
        reduction: str = "mean",
        *,
        target_dim: int = -2,
        eps: float = 0.0,
        feature_weights: Tensor | None = None,
        fair: bool = True,
    ) -> None:
        super().__init__()
        functional.check_energy_loss_options(alpha, tau, eps, reduction, fair)
        if feature_weights is not None:
            check_floating("feature_weights", feature_weights)
        self.alpha, self.tau, self.eps, self.reduction, self.fair = alpha, tau, eps, reduction, fair
        self.sample_dim, self.target_dim = sample_dim, target_dim
        self.feature_weights: Tensor | None
        self.register_buffer("feature_weights", feature_weights, persistent=False)

    def forward(
        self,
        samples: Tensor,
        target: Tensor | GaussianTarget,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        member_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``samples [..., n, D]`` against ``target [..., D]``, ``[..., m, D]`` or a GaussianTarget."""
        return functional.energy_loss(
            samples, target, mask, alpha=self.alpha, tau=self.tau, eps=self.eps, reduction=self.reduction,
            sample_dim=self.sample_dim, target_dim=self.target_dim, weights=weights,
            feature_weights=self.feature_weights, fair=self.fair, member_mask=member_mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, tau={self.tau}, sample_dim={self.sample_dim}, reduction={self.reduction!r}" + (
            (f", eps={self.eps}" if self.eps else "") + ("" if self.fair else ", fair=False")
        )


class FusedAdaLNBlock(nn.Module):
    """One residual block of the MLP generator (paper Eq. 11): AdaLN modulation, SiLU FFN, gate.

    Parameters are named as in the public code: ``in_ln``, ``mlp.0``, ``mlp.2``, ``adaLN_modulation.1``.

    Args:
        width: W, the width of the hidden state and of the FFN.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    @takes_tensors
    def forward(
        self,
        hidden: Tensor,
        conditioning: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        activated: bool = False,
    ) -> Tensor:
        """One block.

        Args:
            hidden: ``[..., W]``.
            conditioning: ``[..., W]``, broadcastable to ``hidden``: the embedded noise c, or SiLU(c) with
                ``activated=True`` (it is the same for every block, so a caller computes it once; for an
                ``adaLN_modulation`` of a plain SiLU and one module more).
            temperature: multiplies the shift; eval mode only, as in the paper (section 4.3).

        Returns:
            ``[..., W]``.
        """
        if not activated:
            modulation = self.adaLN_modulation(conditioning)
        elif _is_after_silu(self.adaLN_modulation):
            modulation = self.adaLN_modulation[1](conditioning)
        else:
            raise ValueError("activated is True; adaLN_modulation is no plain SiLU and linear, so give it c itself")
        shift, scale, gate = modulation.chunk(3, dim=-1)
        if not self.training and not (isinstance(temperature, (int, float)) and temperature == 1):
            shift = shift * temperature
        watched = are_modules_watched()
        norm = None if watched else norm_parameters(self.in_ln, self.width)
        if norm is None or not work_together(hidden, norm):
            modulated = self.in_ln(hidden) * (1 + scale) + shift
        else:
            modulated = functional.adaln_modulate(hidden, shift, scale, *norm, eps=self.in_ln.eps)
        ffn = None if watched else ffn_parameters(self.mlp, self.width)
        if ffn is None or not work_together(modulated, ffn):
            return hidden + gate * self.mlp(modulated)
        return functional.gated_silu_ffn(hidden, modulated, gate, *ffn)


def _is_after_silu(modulation: nn.Module) -> bool:
    """Whether a modulation is a plain sequence of a SiLU and one module more, which may be called alone."""
    if not is_plain(modulation, nn.Sequential) or are_modules_watched():
        return False
    children = list(modulation._modules.values())
    return len(children) == 2 and is_plain(children[0], nn.SiLU) and not children[0].inplace  # type: ignore[union-attr]


class FusedFinalLayer(nn.Module):
    """LayerNorm without parameters, modulation by shift and scale, linear to the output."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, output_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return self.linear(functional.adaln_modulate(hidden, shift, scale))


class FusedMLPGenerator(nn.Module):
    """The MLP generator of EAR (paper section 4.2): hidden state and noise to a continuous token.

    Its state dict is that of the public head below ``scoreloss.net.``: ``noise_embed``, ``input_proj``,
    ``res_blocks.i.*``, ``final_layer.*``.

    Args:
        input_dim: C, size of the backbone's hidden state z.
        width: W, width of the blocks.
        output_dim: D, size of a token.
        depth: number of residual blocks.
        noise_dim: size of a noise vector.
    """

    def __init__(self, input_dim: int, width: int, output_dim: int, depth: int = 6, noise_dim: int = 64) -> None:
        super().__init__()
        sizes = (input_dim, width, output_dim, depth, noise_dim)
        for name, value in zip(("input_dim", "width", "output_dim", "depth", "noise_dim"), sizes, strict=True):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.input_dim, self.width, self.output_dim, self.noise_dim = input_dim, width, output_dim, noise_dim
        self.noise_embed = nn.Linear(noise_dim, width)
        self.input_proj = nn.Linear(input_dim, width)
        self.res_blocks = nn.ModuleList([FusedAdaLNBlock(width) for _ in range(depth)])
        self.final_layer = FusedFinalLayer(width, output_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; modulation linears and the last linear zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        zero = [cast(FusedAdaLNBlock, block).adaLN_modulation[1] for block in self.res_blocks]
        zero += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for linear in zero:
            nn.init.zeros_(cast(nn.Linear, linear).weight)
            nn.init.zeros_(cast(nn.Linear, linear).bias)

    def block_parameters(self) -> list[Tensor]:
        """Parameters of the blocks and the final layer in the order of ``functional.generator_blocks``.

        Raises:
            ValueError: a layer does more than its parameters say: it has hooks or a wrapper, or computes its weights.
        """
        return self._read()[1]

    def input_parameters(self) -> list[Tensor]:
        """Parameters of the input linears in the order of ``functional.generator_modulations``.

        Raises:
            ValueError: as :meth:`block_parameters`.
        """
        return self._read()[0]

    def plain_parameters(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """:meth:`input_parameters` and :meth:`block_parameters`; None where they are not all that a call does."""
        classes = {type(block) for block in self.res_blocks} == {FusedAdaLNBlock} and type(
            self.final_layer
        ) is FusedFinalLayer
        if not classes or are_modules_watched():
            return None
        noise, stream = linear_parameters(self.noise_embed), linear_parameters(self.input_proj)
        blocks = head_parameters(self, self.width)
        if (
            noise is None
            or stream is None
            or blocks is None
            or not work_together(noise[0], [*noise, *stream, *blocks])
        ):
            return None
        return noise + stream, blocks

    def _read(self) -> tuple[list[Tensor], list[Tensor]]:
        found = self.plain_parameters()
        if found is None:
            raise ValueError(
                "a layer of this generator has hooks, a wrapper or computed weights, or tensors of another dtype or "
                "device; only a call of the generator itself runs it"
            )
        return found

    @takes_tensors
    @torch.no_grad()
    def modulations(self, noise: Tensor, temperature: float = 1.0, out: Tensor | None = None) -> Tensor:
        """``[R, (3 * depth + 2) * W]`` of ``noise [R, noise_dim]``; see ``functional.generator_modulations``."""
        return functional.generator_modulations(noise, *self._read(), temperature=temperature, out=out)

    @takes_tensors
    @torch.no_grad()
    def chain(self, z: Tensor, modulations: Tensor) -> Tensor:
        """Tokens ``[R, D]`` from hidden states ``[R, C]`` and modulations; see ``functional.generator_chain``."""
        return functional.generator_chain(z, modulations, *self._read())

    @takes_tensors
    def forward(
        self, z: Tensor, noise: Tensor, temperature: float | Tensor = 1.0, *, noise_pool: int | None = None
    ) -> Tensor:
        """Tokens from hidden states and noise.

        Args:
            z: ``[..., C]``, floating point.
            noise: ``[..., noise_dim]`` (one sample a hidden state) or ``[..., n, noise_dim]`` (n samples of each;
                z is then projected once, not n times).
            temperature: multiplies the shift of the residual blocks; in eval mode only (paper section 4.3).
            noise_pool: use about this many of the given noise vectors, each for several rows, so that the modulation
                is computed once a vector and not once a row (training; docs/noise_pool.md). Needs the sample
                dimension in ``noise``; no two samples of one hidden state share a vector. None: every row its own.

        Returns:
            ``[..., D]`` or ``[..., n, D]``.

        Raises:
            ValueError: shapes or devices that do not fit. TypeError: integer tensors.
        """
        for name, tensor, size in (("z", z, self.input_dim), ("noise", noise, self.noise_dim)):
            check_floating(name, tensor)
            if tensor.ndim < 1 or tensor.shape[-1] != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its last dimension must be {size}")
        check_device("noise", noise, z, "z")
        has_samples = noise.ndim == z.ndim + 1
        if noise.shape[: z.ndim - 1] != z.shape[:-1] or (noise.ndim != z.ndim and not has_samples):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; for z of shape {tuple(z.shape)} it must be "
                f"{(*z.shape[:-1], self.noise_dim)} or {(*z.shape[:-1], 'n', self.noise_dim)}"
            )
        if noise_pool is not None and not has_samples:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; with noise_pool it must be "
                f"{(*z.shape[:-1], 'n', self.noise_dim)}, so that no two samples of one hidden state share a vector"
            )
        factor: float | Tensor = 1.0 if self.training else temperature
        whole = isinstance(factor, (int, float)) and (factor == 1 or not torch.is_grad_enabled())
        kernels = whole and choose_backend("mlp_generator", z) == "triton"
        plain = self.plain_parameters() if kernels or noise_pool is not None else None
        if noise_pool is None and plain is None:
            return self._block_by_block(z, noise, temperature, has_samples)
        if not whole:
            raise ValueError(f"temperature {temperature!r} cannot be combined with noise_pool; it is for sampling")
        tokens = z.reshape(-1, self.input_dim)
        samples = noise.shape[-2] if has_samples else 1
        vectors = noise.reshape(-1, samples, self.noise_dim)
        if noise_pool is None and plain is not None:
            few = functional.generator_few_rows(
                tokens, vectors.reshape(-1, self.noise_dim), *plain, samples=samples, temperature=float(factor)
            )
            if few is not None:
                return few.view(*noise.shape[:-1], self.output_dim)
        hidden = self.input_proj(tokens)
        index = inverse = None
        group = 1
        if noise_pool is not None and vectors.numel():
            arrangement = pool_arrangement(tokens.shape[0], samples, noise_pool, z.device)
            index, inverse, group = arrangement.index, arrangement.inverse, arrangement.group
            vectors = vectors[: arrangement.per_sample].transpose(0, 1)
        elif samples != 1:
            index = torch.arange(tokens.shape[0] * samples, dtype=torch.int32, device=z.device) // samples
        conditioning = self.noise_embed(vectors.reshape(-1, self.noise_dim))
        if plain is None:
            hidden = hidden if index is None else hidden[index]
            out = self._blocks(hidden, conditioning.repeat_interleave(group, 0), temperature)
        else:
            out = functional.generator_blocks(
                hidden, conditioning, plain[1], index=index, inverse=inverse, group=group, temperature=float(factor)
            )
        if inverse is not None:
            out = out[inverse]
        return out.view(*noise.shape[:-1], self.output_dim)

    def _block_by_block(self, z: Tensor, noise: Tensor, temperature: float | Tensor, has_samples: bool) -> Tensor:
        """The generator by calls of its layers: the eager path, and the one for a tensor temperature."""
        hidden = self.input_proj(z)
        if has_samples:
            hidden = hidden.unsqueeze(-2).expand(*noise.shape[:-1], self.width)
        return self._blocks(hidden, self.noise_embed(noise), temperature)

    def _blocks(self, hidden: Tensor, conditioning: Tensor, temperature: float | Tensor) -> Tensor:
        activated = F.silu(conditioning)
        for block in self.res_blocks:
            if type(block) is FusedAdaLNBlock and runs_forward(block) and _is_after_silu(block.adaLN_modulation):
                hidden = block(hidden, activated, temperature, activated=True)
            else:
                hidden = block(hidden, conditioning, temperature)
        return self.final_layer(hidden, conditioning)


__all__ = ["FusedAdaLNBlock", "FusedEnergyLoss", "FusedFinalLayer", "FusedMLPGenerator"]
