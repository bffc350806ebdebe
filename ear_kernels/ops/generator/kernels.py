"""The generator for few rows (sampling): linears that stream their weights once, with norm, SiLU and gate
fused in.

Legend: M rows (few), a linear maps K columns to N. A tile has 16 or 32 rows, below the 64 of a WGMMA: these
dots are ``mma.sync``, whose A operand may be computed in registers (ptxas 12.8 miscompiles a WGMMA of which
that is true).
"""

import triton
import triton.language as tl


@triton.jit
def _linear(
    x,
    stride_x,
    source,  # [BM] rows of x
    live,  # [BM]
    weight,  # [N, K]
    cols,  # [BN]
    N,
    K,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``x[source] @ weight[cols]^T`` in float32, ``[BM, BN]``."""
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        a = tl.load(
            x + source[:, None] * stride_x + ks[None, :], mask=live[:, None] & (ks < K)[None, :], other=0.0
        ).to(COMPUTE)
        b = tl.load(
            weight + cols[:, None].to(tl.int64) * K + ks[None, :],
            mask=(cols < N)[:, None] & (ks < K)[None, :],
            other=0.0,
        ).to(COMPUTE)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def embed_kernel(
    noise,  # [M, noise_dim]
    weight_noise,  # [W, noise_dim]
    bias_noise,  # [W]
    z,  # [T, C]; row r is of token r // samples
    weight_z,  # [W, C]
    bias_z,  # [W]
    activated,  # [M, W], out: SiLU of the embedded noise
    hidden,  # [M, W], out: the projected hidden state
    M,
    N,
    noise_dim,
    input_dim,
    samples,
    stride_noise,
    stride_z,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Both input linears in one launch: axis 2 of the grid says which."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = rows < M
    place = rows[:, None] * N + cols[None, :]
    keep = live[:, None] & (cols < N)[None, :]
    if tl.program_id(2) == 0:
        acc = _linear(
            noise, stride_noise, rows, live, weight_noise, cols, N, noise_dim, COMPUTE, PRECISION, BM, BN, BK
        )
        acc += tl.load(bias_noise + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        # Rounded where eager rounds: the linear's output.
        acc = acc.to(COMPUTE).to(tl.float32)
        tl.store(activated + place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
    else:
        acc = _linear(
            z, stride_z, rows // samples, live, weight_z, cols, N, input_dim, COMPUTE, PRECISION, BM, BN, BK
        )
        acc += tl.load(bias_z + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(hidden + place, acc.to(COMPUTE), mask=keep)


@triton.jit
def modulation_kernel(
    activated,  # [M, W]
    weights,  # [layers] int64: addresses of the modulation weights, [3W, W] and for the last [2W, W]
    biases,  # [layers] int64: addresses of their biases
    out,  # [layers, M, 3W], out
    M,
    W,
    layers,
    tiles,  # column tiles of a layer
    WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The modulation of every block and of the final layer in one launch: they depend on the noise only."""
    layer = tl.program_id(0) // tiles
    N = tl.where(layer == layers - 1, 2 * W, 3 * W)
    start = (tl.program_id(0) % tiles) * BN
    if start < N:
        cols = start + tl.arange(0, BN)
        rows = tl.program_id(1) * BM + tl.arange(0, BM)
        live = rows < M
        weight = tl.load(weights + layer).to(tl.pointer_type(WEIGHT))
        bias = tl.load(biases + layer).to(tl.pointer_type(WEIGHT))
        weight = tl.multiple_of(weight, 16)
        acc = _linear(activated, W, rows, live, weight, cols, N, W, COMPUTE, PRECISION, BM, BN, BK)
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        place = (layer * M + rows)[:, None].to(tl.int64) * (3 * W) + cols[None, :]
        tl.store(out + place, acc.to(COMPUTE), mask=live[:, None] & (cols < N)[None, :])


@triton.jit
def norm_linear_kernel(
    hidden,  # [M, K]
    mod,  # [M, >= 2K]: shift in columns 0..K-1, scale in K..2K-1
    norm_weight,  # [K]
    norm_bias,  # [K]
    weight,  # [N, K]
    bias,  # [N]
    out,  # [M, N], out
    M,
    N,
    stride_mod,
    eps,
    temperature,
    K: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
):
    """``act(modulate(LN(hidden)) @ weight^T + bias)``: every program normalises its rows itself."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = rows < M
    base = hidden + rows[:, None] * K
    # Mean and squared deviations of pieces of a row, merged as they come (Chan et al.): one pass, no
    # cancellation.
    mean = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)
    for done in tl.static_range(0, K, BLOCK_STATS):
        at = done + tl.arange(0, BLOCK_STATS)
        here = BLOCK_STATS if done + BLOCK_STATS <= K else K - done
        seen = live[:, None] & (at < K)[None, :]
        h_piece = tl.load(base + at[None, :], mask=seen, other=0.0).to(tl.float32)
        piece = tl.sum(h_piece, 1) / here
        centred = tl.where((at < K)[None, :], h_piece - piece[:, None], 0.0)
        delta = piece - mean
        spread += tl.sum(centred * centred, 1) + delta * delta * (done * here / (done + here))
        mean += delta * (here / (done + here))
    rstd = 1.0 / tl.sqrt(spread / K + eps)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        inside = ks < K
        mask = live[:, None] & inside[None, :]
        h = tl.load(base + ks[None, :], mask=mask, other=0.0).to(tl.float32)
        place = mod + rows[:, None] * stride_mod + ks[None, :]
        shift = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(place + K, mask=mask, other=0.0).to(tl.float32)
        u = (h - mean[:, None]) * rstd[:, None]
        if AFFINE:
            u = u * tl.load(norm_weight + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
            u += tl.load(norm_bias + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
        u = tl.where(mask, u * (1.0 + scale) + temperature * shift, 0.0)
        b = tl.load(
            weight + cols[:, None].to(tl.int64) * K + ks[None, :],
            mask=(cols < N)[:, None] & inside[None, :],
            other=0.0,
        ).to(COMPUTE)
        acc = tl.dot(u.to(COMPUTE), tl.trans(b), acc, input_precision=PRECISION)
    acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = acc.to(COMPUTE).to(tl.float32)
        acc = acc * tl.sigmoid(acc)
    tl.store(out + rows[:, None] * N + cols[None, :], acc.to(COMPUTE), mask=live[:, None] & (cols < N)[None, :])


@triton.jit
def gate_linear_kernel(
    active,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    hidden,  # [M, N]
    gate,  # [M, N], rows stride_gate apart
    out,  # [M, N], out
    M,
    N,
    K,
    stride_gate,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``hidden + gate * (active @ weight^T + bias)``."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    live = rows < M
    acc = _linear(active, K, rows, live, weight, cols, N, K, COMPUTE, PRECISION, BM, BN, BK)
    acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    keep = live[:, None] & (cols < N)[None, :]
    h = tl.load(hidden + rows[:, None] * N + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    g = tl.load(gate + rows[:, None] * stride_gate + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    f = acc.to(COMPUTE).to(tl.float32)
    tl.store(out + rows[:, None] * N + cols[None, :], (h + g * f).to(COMPUTE), mask=keep)
