"""The generator for few rows (sampling) as one persistent kernel: every weight is read once, and one launch does all.

Legend: M rows (few), a linear maps K columns to N. The work is cut into *phases*, each of which needs all of the one
before: both input linears; the modulation of all layers; then for every block and the final layer its norm and
modulation, its first linear, and for blocks the second linear with gate and residual. A phase's tiles are spread over
all programs; between phases they meet at a barrier in global memory, for which all must be resident (a cooperative
launch). In the interpreter, which runs programs one after another, every phase is a launch of its own.
"""

import triton
import triton.language as tl

# Columns of ``table``: addresses of a layer's parameters. The last row is the final layer's; the row after it holds
# the input linears' (noise weight, noise bias, z weight, z bias).
NORM_WEIGHT = tl.constexpr(0)
NORM_BIAS = tl.constexpr(1)
WEIGHT_IN = tl.constexpr(2)
BIAS_IN = tl.constexpr(3)
WEIGHT_OUT = tl.constexpr(4)
BIAS_OUT = tl.constexpr(5)
WEIGHT_MOD = tl.constexpr(6)
BIAS_MOD = tl.constexpr(7)
TABLE_COLUMNS = tl.constexpr(8)


@triton.jit
def _address(table, layer, column, KIND: tl.constexpr):
    return tl.multiple_of(tl.load(table + layer * TABLE_COLUMNS + column).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _prefetch(weight, first, N, K, BN: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr):
    """Ask for rows ``first`` to ``first + BN`` of a weight ``[N, K]`` to be brought into the L2."""
    rows = tl.minimum(first + tl.arange(0, BN), N - 1)
    lines = tl.minimum(tl.arange(0, LINES) * LINE, K - 1)
    places = (weight + rows[:, None].to(tl.int64) * K + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


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
    STAGES: tl.constexpr,
):
    """``x[source] @ weight[cols]^T`` in float32, ``[BM, BN]``. ``x`` is of a phase before, so not read through L1."""
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        ks = start + tl.arange(0, BK)
        a = tl.load(
            x + source[:, None] * stride_x + ks[None, :],
            mask=live[:, None] & (ks < K)[None, :],
            other=0.0,
            cache_modifier=".cg",
        ).to(COMPUTE)
        b = tl.load(
            weight + cols[:, None].to(tl.int64) * K + ks[None, :],
            mask=(cols < N)[:, None] & (ks < K)[None, :],
            other=0.0,
        ).to(COMPUTE)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _statistics(hidden, rows, live, eps, W: tl.constexpr, BM: tl.constexpr, PIECE: tl.constexpr):
    """Mean and 1 / standard deviation of rows of ``hidden [M, W]``.

    Means and squared deviations of pieces of a row, merged as they come (Chan et al.): one pass, no cancellation.
    """
    mean = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)
    for done in tl.static_range(0, W, PIECE):
        at = done + tl.arange(0, PIECE)
        here = PIECE if done + PIECE <= W else W - done
        seen = live[:, None] & (at < W)[None, :]
        piece = tl.load(hidden + rows[:, None] * W + at[None, :], mask=seen, other=0.0, cache_modifier=".cg")
        piece = piece.to(tl.float32)
        average = tl.sum(piece, 1) / here
        centred = tl.where((at < W)[None, :], piece - average[:, None], 0.0)
        delta = average - mean
        spread += tl.sum(centred * centred, 1) + delta * delta * (done * here / (done + here))
        mean += delta * (here / (done + here))
    return mean, 1.0 / tl.sqrt(spread / W + eps)


@triton.jit
def _modulated(hidden, mod, norm_weight, norm_bias, rows, live, ks, mean, rstd, affine, temperature, W: tl.constexpr):
    """``LN(hidden) (1 + scale) + temperature * shift`` at columns ``ks``, in float32; 0 outside."""
    inside = ks < W
    mask = live[:, None] & inside[None, :]
    h = tl.load(hidden + rows[:, None] * W + ks[None, :], mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    place = mod + rows[:, None] * (3 * W) + ks[None, :]
    shift = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    scale = tl.load(place + W, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    u = (h - mean[:, None]) * rstd[:, None]
    # The final layer's norm has no parameters.
    parameters = ks < tl.where(affine, W, 0)
    u = u * tl.load(norm_weight + ks, mask=parameters, other=1.0).to(tl.float32)[None, :]
    u += tl.load(norm_bias + ks, mask=parameters, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask, u * (1.0 + scale) + temperature * shift, 0.0)


@triton.jit(do_not_specialize=["M", "samples", "first_phase", "last_phase"])
def generator_kernel(
    noise,  # [M, noise_dim]
    z,  # [T, input_dim]; row r is of token r // samples
    table,  # [layers + 1, TABLE_COLUMNS] int64: addresses of all parameters
    activated,  # [M, W], scratch: SiLU of the embedded noise
    hidden,  # [M, W], scratch: the residual stream, updated in place
    mod,  # [layers, M, 3W], scratch
    modulated,  # [M, W], scratch: the input of the first linear
    active,  # [M, W], scratch: SiLU of the first linear
    out,  # [M, D], out
    counter,  # [1] int32, zero: arrivals at barriers
    M,
    D,
    noise_dim,
    input_dim,
    samples,
    layers,  # blocks and the final layer
    stride_noise,
    stride_z,
    first_phase,
    last_phase,  # phases first_phase .. last_phase - 1
    eps,
    temperature,
    W: tl.constexpr,
    WEIGHT: tl.constexpr,
    NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BARRIERS: tl.constexpr,
    PREFETCH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BN_MOD: tl.constexpr,
    BK_MOD: tl.constexpr,
    STAGES: tl.constexpr,
    STAGES_MOD: tl.constexpr,
    PIECE: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    """Rows ``[M, D]`` of the generator. LINES: 128-byte lines of a weight's row, LINE: their size."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = tl.arange(0, BM)
    live = rows < M
    for phase in range(first_phase, last_phase):
        if phase == 0:
            tiles = (W + BN - 1) // BN
            for turn in range(program, 2 * tiles, programs):
                cols = (turn % tiles) * BN + tl.arange(0, BN)
                place = rows[:, None] * W + cols[None, :]
                keep = live[:, None] & (cols < W)[None, :]
                if turn < tiles:
                    weight = _address(table, layers, 0, WEIGHT)
                    acc = _linear(
                        noise, stride_noise, rows, live, weight, cols, W, noise_dim, COMPUTE, PRECISION, BM, BN, 64, 2
                    )
                    bias = _address(table, layers, 1, WEIGHT)
                    acc += tl.load(bias + cols, mask=cols < W, other=0.0).to(tl.float32)[None, :]
                    # Rounded where eager rounds: the linear's output.
                    acc = acc.to(COMPUTE).to(tl.float32)
                    tl.store(activated + place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
                else:
                    weight = _address(table, layers, 2, WEIGHT)
                    acc = _linear(
                        z,
                        stride_z,
                        rows // samples,
                        live,
                        weight,
                        cols,
                        W,
                        input_dim,
                        COMPUTE,
                        PRECISION,
                        BM,
                        BN,
                        BK,
                        STAGES,
                    )
                    bias = _address(table, layers, 3, WEIGHT)
                    acc += tl.load(bias + cols, mask=cols < W, other=0.0).to(tl.float32)[None, :]
                    tl.store(hidden + place, acc.to(COMPUTE), mask=keep)
        elif phase == 1:
            # They depend on the noise only. The final layer has no gate.
            tiles = (3 * W + BN_MOD - 1) // BN_MOD
            for turn in range(program, layers * tiles, programs):
                layer = turn // tiles
                n = tl.where(layer == layers - 1, 2 * W, 3 * W)
                cols = (turn % tiles) * BN_MOD + tl.arange(0, BN_MOD)
                if (turn % tiles) * BN_MOD < n:
                    weight = _address(table, layer, WEIGHT_MOD, WEIGHT)
                    acc = _linear(
                        activated,
                        W,
                        rows,
                        live,
                        weight,
                        cols,
                        n,
                        W,
                        COMPUTE,
                        PRECISION,
                        BM,
                        BN_MOD,
                        BK_MOD,
                        STAGES_MOD,
                    )
                    bias = _address(table, layer, BIAS_MOD, WEIGHT)
                    acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
                    place = (layer * M + rows)[:, None].to(tl.int64) * (3 * W) + cols[None, :]
                    tl.store(mod + place, acc.to(COMPUTE), mask=live[:, None] & (cols < n)[None, :])
        else:
            layer = (phase - 2) // 3
            kind = (phase - 2) % 3
            here = mod + (layer * M).to(tl.int64) * (3 * W)
            affine = layer < layers - 1
            n = tl.where(affine, W, D)
            tiles = (n + BN - 1) // BN
            if kind == 0:
                norm_weight = _address(table, layer, NORM_WEIGHT, NORM)
                norm_bias = _address(table, layer, NORM_BIAS, NORM)
                for turn in range(program, M, programs):
                    row = turn + tl.arange(0, 1)
                    whole = row < M
                    mean, rstd = _statistics(hidden, row, whole, eps, W, 1, PIECE)
                    for start in tl.static_range(0, W, PIECE):
                        ks = start + tl.arange(0, PIECE)
                        u = _modulated(
                            hidden, here, norm_weight, norm_bias, row, whole, ks, mean, rstd, affine,
                            tl.where(affine, temperature, 1.0), W,
                        )  # fmt: skip
                        tl.store(modulated + row[:, None] * W + ks[None, :], u.to(COMPUTE), mask=(ks < W)[None, :])
            elif kind == 1:
                weight = _address(table, layer, WEIGHT_IN, WEIGHT)
                bias = _address(table, layer, BIAS_IN, WEIGHT)
                for turn in range(program, tiles, programs):
                    cols = turn * BN + tl.arange(0, BN)
                    acc = _linear(
                        modulated, W, rows, live, weight, cols, n, W, COMPUTE, PRECISION, BM, BN, BK, STAGES
                    )
                    acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
                    keep = live[:, None] & (cols < n)[None, :]
                    if affine:
                        acc = acc.to(COMPUTE).to(tl.float32)
                        acc = acc * tl.sigmoid(acc)
                        tl.store(active + rows[:, None] * W + cols[None, :], acc.to(COMPUTE), mask=keep)
                    else:
                        tl.store(out + rows[:, None] * D + cols[None, :], acc.to(COMPUTE), mask=keep)
            else:
                weight = _address(table, layer, WEIGHT_OUT, WEIGHT)
                bias = _address(table, layer, BIAS_OUT, WEIGHT)
                for turn in range(program, tiles, programs):
                    cols = turn * BN + tl.arange(0, BN)
                    acc = _linear(active, W, rows, live, weight, cols, n, W, COMPUTE, PRECISION, BM, BN, BK, STAGES)
                    acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
                    keep = live[:, None] & (cols < n)[None, :]
                    place = hidden + rows[:, None] * W + cols[None, :]
                    h = tl.load(place, mask=keep, other=0.0, cache_modifier=".cg").to(tl.float32)
                    gates = here + rows[:, None] * (3 * W) + (2 * W + cols)[None, :]
                    gate = tl.load(gates, mask=keep, other=0.0, cache_modifier=".cg").to(tl.float32)
                    ffn = acc.to(COMPUTE).to(tl.float32)
                    tl.store(place, (h + gate * ffn).to(COMPUTE), mask=keep)
        if BARRIERS and phase + 1 < last_phase:
            if PREFETCH:
                # The weights of the two phases to come, while the others arrive.
                layer = (phase - 1) // 3
                kind = (phase - 1) % 3
                if (phase > 0) & (layer < layers - 1):
                    if kind <= 1:
                        _prefetch(_address(table, layer, WEIGHT_IN, WEIGHT), program * BN, W, W, BN, LINES, LINE)
                    if kind >= 1:
                        _prefetch(_address(table, layer, WEIGHT_OUT, WEIGHT), program * BN, W, W, BN, LINES, LINE)
            # All threads' stores, then one arrival a program; then wait for all programs of this phase.
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
            goal = (phase + 1 - first_phase) * programs
            # Watched by plain loads, so that arrivals do not queue behind those who wait.
            while tl.load(counter, volatile=True) < goal:
                pass
            tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()
