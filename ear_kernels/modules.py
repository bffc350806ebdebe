"""Thin modules over the functional operations, with the parameter names of the public EAR head."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ear_kernels import functional
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
    ) -> None:
        super().__init__()
        functional.check_energy_loss_options(alpha, tau, eps, reduction)
        self.alpha, self.tau, self.eps, self.reduction = alpha, tau, eps, reduction
        self.sample_dim, self.target_dim = sample_dim, target_dim
        self.feature_weights: Tensor | None
        self.register_buffer("feature_weights", feature_weights, persistent=False)

    def forward(
        self,
        samples: Tensor,
        target: Tensor | GaussianTarget,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``samples [..., n, D]`` against ``target [..., D]``, ``[..., m, D]`` or a GaussianTarget."""
        return functional.energy_loss(
            samples,
            target,
            mask,
            alpha=self.alpha,
            tau=self.tau,
            sample_dim=self.sample_dim,
            target_dim=self.target_dim,
            weights=weights,
            feature_weights=self.feature_weights,
            eps=self.eps,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, tau={self.tau}, sample_dim={self.sample_dim}, reduction={self.reduction!r}" + (
            f", eps={self.eps}" if self.eps else ""
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
                ``activated=True`` (it is the same for every block, so a caller computes it once).
            temperature: multiplies the shift; eval mode only, as in the paper (section 4.3).

        Returns:
            ``[..., W]``.
        """
        if not activated:
            conditioning = F.silu(conditioning)
        shift, scale, gate = self.adaLN_modulation[1](conditioning).chunk(3, dim=-1)
        if not self.training and not (isinstance(temperature, (int, float)) and temperature == 1):
            shift = shift * temperature
        modulated = functional.adaln_modulate(
            hidden, shift, scale, self.in_ln.weight, self.in_ln.bias, eps=self.in_ln.eps
        )
        first, second = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        return functional.gated_silu_ffn(
            hidden, modulated, gate, first.weight, first.bias, second.weight, second.bias
        )


class _FinalLayer(nn.Module):
    """LayerNorm without parameters, modulation by shift and scale, linear to the output."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, output_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: Tensor, activated: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](activated).chunk(2, dim=-1)
        return self.linear(functional.adaln_modulate(hidden, shift, scale))


class FusedMLPGenerator(nn.Module):
    """The MLP generator of EAR (paper section 4.2; spec 2): hidden state and noise to a continuous token.

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
        sizes = {
            "input_dim": input_dim,
            "width": width,
            "output_dim": output_dim,
            "depth": depth,
            "noise_dim": noise_dim,
        }
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.input_dim, self.width, self.output_dim, self.noise_dim = input_dim, width, output_dim, noise_dim
        self.noise_embed = nn.Linear(noise_dim, width)
        self.input_proj = nn.Linear(input_dim, width)
        self.res_blocks = nn.ModuleList([FusedAdaLNBlock(width) for _ in range(depth)])
        self.final_layer = _FinalLayer(width, output_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; modulation linears and the last linear zero (spec 2)."""
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

    def forward(self, z: Tensor, noise: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """Tokens from hidden states and noise.

        Args:
            z: ``[..., C]``, floating point.
            noise: ``[..., noise_dim]`` (one sample a hidden state) or ``[..., n, noise_dim]`` (n samples of each;
                z is then projected once, not n times).
            temperature: multiplies the shift of the residual blocks; in eval mode only (paper section 4.3).

        Returns:
            ``[..., D]`` or ``[..., n, D]``.

        Raises:
            ValueError: shapes or devices that do not fit. TypeError: integer tensors.
        """
        for name, tensor, size in (("z", z, self.input_dim), ("noise", noise, self.noise_dim)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")
            if tensor.ndim < 1 or tensor.shape[-1] != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its last dimension must be {size}")
        if z.device != noise.device:
            raise ValueError(f"noise is on {noise.device} and z on {z.device}; put both on one device")
        has_samples = noise.ndim == z.ndim + 1
        if noise.shape[: z.ndim - 1] != z.shape[:-1] or (noise.ndim != z.ndim and not has_samples):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; for z of shape {tuple(z.shape)} it must be "
                f"{(*z.shape[:-1], self.noise_dim)} or {(*z.shape[:-1], 'n', self.noise_dim)}"
            )
        hidden = self.input_proj(z)
        if has_samples:
            hidden = hidden.unsqueeze(-2).expand(*noise.shape[:-1], self.width)
        activated = F.silu(self.noise_embed(noise))
        for block in self.res_blocks:
            hidden = block(hidden, activated, temperature, activated=True)
        return self.final_layer(hidden, activated)


__all__ = ["FusedAdaLNBlock", "FusedEnergyLoss", "FusedMLPGenerator"]
