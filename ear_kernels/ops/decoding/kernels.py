"""The small parts of a decoding step, a program a row.

Legend: B images, G sequences (B, or 2 B with guidance: the classes' first), k tokens predicted of each image, S
positions of a sequence, C width, D size of a token. Row r of ``G k`` is of sequence ``r // k``.
"""

import triton
import triton.language as tl


@triton.jit
def _norm(x, live, weight, bias, cols, eps, WIDTH: tl.constexpr):
    mu = tl.sum(x, 0) / WIDTH
    centred = tl.where(live, x - mu, 0.0)
    rs = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    w = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    return centred * rs * w + b


@triton.jit(do_not_specialize=["images", "count", "length", "tokens", "prefix"])
def predicted_rows_kernel(
    stream,  # [G, S, C]
    orders,  # [B, L] int64
    left,  # [1] int64
    weight,  # [C]
    bias,  # [C]
    rows,  # [G k] int64, out
    gathered,  # [G k, C], out
    normed,  # [G k, C], out
    images,
    count,
    length,
    tokens,
    prefix,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    sequence = r // count
    place = tl.load(left) - count + r % count
    position = tl.load(orders + (sequence % images).to(tl.int64) * tokens + place)
    row = sequence.to(tl.int64) * length + prefix + position
    tl.store(rows + r, row)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    x = tl.load(stream + row * WIDTH + cols, mask=live, other=0.0)
    out = r.to(tl.int64) * WIDTH + cols
    tl.store(gathered + out, x, mask=live)
    y = _norm(x.to(tl.float32), live, weight, bias, cols, eps, WIDTH)
    tl.store(normed + out, y.to(normed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["half", "count"])
def guided_norm_kernel(
    branch,  # [G k, C]
    branch_bias,  # [C]
    rows,  # [G k, C]
    weight,  # [C]
    bias,  # [C]
    scales,  # [L + 1] float32, or None: no guidance
    left,  # [1] int64
    hidden,  # [B k, C], out
    half,  # B k
    count,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    added = tl.load(branch_bias + cols, mask=live, other=0.0).to(tl.float32)
    place = r.to(tl.int64) * WIDTH + cols
    x = tl.load(rows + place, mask=live, other=0.0).to(tl.float32) + added
    x += tl.load(branch + place, mask=live, other=0.0).to(tl.float32)
    y = _norm(x, live, weight, bias, cols, eps, WIDTH)
    if scales is not None:
        scale = tl.load(scales + tl.load(left) - count)
        null = (half + r).to(tl.int64) * WIDTH + cols
        x = tl.load(rows + null, mask=live, other=0.0).to(tl.float32) + added
        x += tl.load(branch + null, mask=live, other=0.0).to(tl.float32)
        y = scale * y + (1.0 - scale) * _norm(x, live, weight, bias, cols, eps, WIDTH)
    tl.store(hidden + place, y.to(hidden.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["length", "tokens", "prefix", "half"])
def write_tokens_kernel(
    sampled,  # [B k, D]
    token,  # [B, L, D], out
    start,  # [G, S, C], out
    rows,  # [G k] int64
    embed_weight,  # [C, D]
    embed_bias,  # [C]
    position,  # [S, C]
    weight,  # [C]
    bias,  # [C]
    normed,  # [B k, C], out
    length,
    tokens,
    prefix,
    half,  # B k
    eps,
    D: tl.constexpr,
    GUIDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0)
    row = tl.load(rows + r)
    place = row % length
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    x = tl.load(embed_bias + cols, mask=live, other=0.0).to(tl.float32)
    kept = token + ((row // length) * tokens + place - prefix) * D
    for first in tl.static_range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        value = tl.load(sampled + r.to(tl.int64) * D + ds, mask=ds < D, other=0.0)
        tl.store(kept + ds, value.to(token.dtype.element_ty), mask=ds < D)
        # Rounded as the linear's input, in products of float32.
        low = value.to(embed_weight.dtype.element_ty).to(tl.float32)
        w = tl.load(embed_weight + cols[:, None] * D + ds[None, :], mask=live[:, None] & (ds < D)[None, :], other=0.0)
        x += tl.sum(w.to(tl.float32) * low[None, :], 1)
    x = x.to(embed_weight.dtype.element_ty).to(tl.float32)
    x += tl.load(position + place * WIDTH + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(start + row * WIDTH + cols, x.to(start.dtype.element_ty), mask=live)
    if GUIDED:
        other = tl.load(rows + half + r)
        tl.store(start + other * WIDTH + cols, x.to(start.dtype.element_ty), mask=live)
    y = _norm(x, live, weight, bias, cols, eps, WIDTH)
    tl.store(normed + r.to(tl.int64) * WIDTH + cols, y.to(normed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["sources", "count"])
def write_rows_kernel(
    values,  # [B k, N]
    target,  # [G S, N], out
    rows,  # [G k] int64
    left,  # [1] int64, in and out
    sources,  # B k
    count,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Axis 1 of the grid: columns. The last act of a step: nothing else reads ``left`` meanwhile."""
    r = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < N
    x = tl.load(values + (r % sources).to(tl.int64) * N + cols, mask=live)
    tl.store(target + tl.load(rows + r) * N + cols, x, mask=live)
    if (r == 0) & (tl.program_id(1) == 0):
        tl.store(left, tl.load(left) - count)
