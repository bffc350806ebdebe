"""The generator for few rows (sampling) as one persistent kernel: every weight is read once, and one launch does all.

Legend: M rows (few), a linear maps K columns to N. The work is cut into *phases*, each of which needs all of the one
before: both input linears; the modulation of the first layer; then for every block and the final layer its norm
(a program a row; the others meanwhile compute the modulation of the layer after it, which depends on the noise only),
its first linear, and for blocks the second linear with gate and residual. A phase's tiles are spread over all
programs; between phases they meet at a barrier in global memory, for which all must be resident (a cooperative
launch). In the interpreter, which runs programs one after another, every phase is a launch of its own.

A phase of few rows is a chain of latencies, not of work (docs/performance.md). So what a phase needs and no
phase before changes is asked for before the barrier: its parameters' addresses in registers, its weights in the L2.
"""

import triton
import triton.language as tl

# Columns of ``table``: addresses of a layer's parameters. The last row is the final layer's, 0 where it has none; the
# row after it holds the input linears' (noise weight, noise bias, z weight, z bias).
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
def _pointer(address, KIND: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(KIND)), 16)


@triton.jit
def _prefetch(weight, first, N, K, ROWS: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr):
    """Ask for rows ``first`` to ``first + ROWS`` of a weight ``[N, K]`` to be brought into the L2."""
    rows = tl.minimum(first + tl.arange(0, ROWS), N - 1)
    lines = tl.minimum(tl.arange(0, LINES) * LINE, K - 1)
    places = (weight + rows[:, None].to(tl.int64) * K + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_modulation(
    table, layer, layers, W: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """This program's share of the modulation's weight of ``layer``."""
    weight = _pointer(tl.load(table + layer * TABLE_COLUMNS + WEIGHT_MOD), WEIGHT)
    n = tl.where(layer == layers - 1, 2 * W, 3 * W)
    _prefetch(weight, tl.program_id(0) * ROWS, n, W, ROWS, LINES, LINE)


@triton.jit
def _arrive(counter):
    """Count this program as arrived once the stores of all its threads can be seen by the others."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, goal):
    """Until ``goal`` programs have arrived. Every thread watches, and acquires, by loads: an atomic of its own after
    the last look would be one more way to the L2 and back."""
    place = counter.to(tl.int64)
    arrived = 0
    while arrived < goal:
        arrived = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def _linear(
    x,
    stride_x,
    source,  # [BM] rows of x
    live,  # [BM]
    weight,  # [N, K]
    bias,  # [N]
    cols,  # [BN]
    N,
    K,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``x[source] @ weight[cols]^T + bias[cols]`` in float32, ``[BM, BN]``. ``x`` is of a phase before, so not read
    through the L1. Of 16 rows each of PARTS warps takes a part of every K step: else all would do the same."""
    bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    if PARTS == 1:
        acc = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            ks = start + tl.arange(0, BK)
            keep = live[:, None] & (ks < K)[None, :]
            a = tl.load(x + source[:, None] * stride_x + ks[None, :], mask=keep, other=0.0, cache_modifier=".cg")
            a = a.to(COMPUTE)
            keep = (cols < N)[:, None] & (ks < K)[None, :]
            b = tl.load(weight + cols[:, None].to(tl.int64) * K + ks[None, :], mask=keep, other=0.0).to(COMPUTE)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        return acc + bias_N[None, :]
    else:
        PART: tl.constexpr = BK // PARTS
        sums = tl.zeros([PARTS, BM, BN], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            ks = start + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
            keep = live[None, :, None] & (ks < K)
            a = tl.load(x + source[None, :, None] * stride_x + ks, mask=keep, other=0.0, cache_modifier=".cg")
            a = a.to(COMPUTE)
            keep = (cols < N)[None, :, None] & (ks < K)
            b = tl.load(weight + cols[None, :, None].to(tl.int64) * K + ks, mask=keep, other=0.0).to(COMPUTE)
            sums = tl.dot(a, tl.permute(b, (0, 2, 1)), sums, input_precision=PRECISION)
        return tl.sum(sums, 0) + bias_N[None, :]


@triton.jit
def _normalise(
    row,
    hidden,
    mod,  # [M, 3W]: of this layer
    modulated,
    norm_weight,
    norm_bias,
    affine,
    temperature,
    eps,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``modulated[row] = LN(hidden[row]) (1 + scale) + temperature * shift``; everything is loaded before the first
    sum, so that there is one wait for memory."""
    ks = tl.arange(0, BLOCK)
    inside = ks < W
    # The final layer's norm has no parameters.
    parameters = ks < tl.where(affine, W, 0)
    place = mod + row * (3 * W) + ks
    h = tl.load(hidden + row * W + ks, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    shift = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    scale = tl.load(place + W, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    weight = tl.load(norm_weight + ks, mask=parameters, other=1.0).to(tl.float32)
    bias = tl.load(norm_bias + ks, mask=parameters, other=0.0).to(tl.float32)
    centred = tl.where(inside, h - tl.sum(h, 0) / W, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / W + eps)
    u = (centred * rstd * weight + bias) * (1.0 + scale) + tl.where(affine, temperature, 1.0) * shift
    tl.store(modulated + row * W + ks, u.to(COMPUTE), mask=inside)


@triton.jit(do_not_specialize=["M", "samples", "first_phase", "last_phase"])
def generator_kernel(
    noise,  # [M, noise_dim]
    z,  # [T, input_dim]; row r is of token r // samples
    table,  # [layers + 1, TABLE_COLUMNS] int64: addresses of all parameters
    activated,  # [M, W], scratch: SiLU of the embedded noise
    hidden,  # [M, W], scratch: the residual stream, updated in place
    mod,  # [layers, M, 3W], scratch
    between,  # [2, M, W], scratch: the input of the first linear, and SiLU of its output
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    BN_MOD: tl.constexpr,
    BK_MOD: tl.constexpr,
    STAGES: tl.constexpr,
    STAGES_MOD: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    """Rows ``[M, D]`` of the generator. BLOCK: lanes that hold a row. LINES: 128-byte lines of a weight's row, LINE:
    their size. AHEAD: rows of a modulation's weight that a program asks for ahead of its layer (0: none)."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = tl.arange(0, BM)
    live = rows < M
    # The phase's layer (in phase 0 the inputs' row of the table) and kind, and the addresses that it needs.
    layer = tl.where(first_phase == 0, layers, tl.maximum(first_phase - 2, 0) // 3)
    kind = tl.where(first_phase < 2, 0, (first_phase + 1) % 3)
    weight_at = tl.load(table + layer * TABLE_COLUMNS + 2 * kind)
    bias_at = tl.load(table + layer * TABLE_COLUMNS + 2 * kind + 1)
    mod_layer = tl.where(first_phase < 2, 0, tl.minimum(layer + 1, layers - 1))
    mod_weight_at = tl.load(table + mod_layer * TABLE_COLUMNS + WEIGHT_MOD)
    mod_bias_at = tl.load(table + mod_layer * TABLE_COLUMNS + BIAS_MOD)
    if BARRIERS and AHEAD > 0:
        _prefetch_modulation(table, 0, layers, W, WEIGHT, AHEAD, LINES, LINE)
    for phase in range(first_phase, last_phase):
        if phase == 0:
            tiles = (W + BN - 1) // BN
            for turn in range(program, 2 * tiles, programs):
                cols = (turn % tiles) * BN + tl.arange(0, BN)
                place = rows[:, None] * W + cols[None, :]
                keep = live[:, None] & (cols < W)[None, :]
                if turn < tiles:
                    acc = _linear(
                        noise, stride_noise, rows, live, _pointer(weight_at, WEIGHT), _pointer(bias_at, WEIGHT),
                        cols, W, noise_dim, COMPUTE, PRECISION, BM, BN, 64, 2, 1,
                    )  # fmt: skip
                    # Rounded where eager rounds: the linear's output.
                    acc = acc.to(COMPUTE).to(tl.float32)
                    tl.store(activated + place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
                else:
                    weight = tl.load(table + layers * TABLE_COLUMNS + 2)
                    bias = tl.load(table + layers * TABLE_COLUMNS + 3)
                    acc = _linear(
                        z, stride_z, rows // samples, live, _pointer(weight, WEIGHT), _pointer(bias, WEIGHT),
                        cols, W, input_dim, COMPUTE, PRECISION, BM, BN, BK, STAGES, PARTS,
                    )  # fmt: skip
                    tl.store(hidden + place, acc.to(COMPUTE), mask=keep)
        elif (phase == 1) | (kind == 0):
            # Rows of this layer's norm first, then tiles of the modulation of the layer after it.
            norms = tl.where(phase == 1, 0, M)
            n = tl.where(mod_layer == layers - 1, 2 * W, 3 * W)
            after = (n + BN_MOD - 1) // BN_MOD
            after = tl.where((phase > 1) & (layer == layers - 1), 0, after)
            for turn in range(program, norms + after, programs):
                if turn < norms:
                    _normalise(
                        turn, hidden, mod + layer * M * (3 * W), between, _pointer(weight_at, NORM),
                        _pointer(bias_at, NORM), layer < layers - 1, temperature, eps, W, BLOCK, COMPUTE,
                    )  # fmt: skip
                else:
                    tile = turn - norms
                    mod_after = mod + mod_layer * M * (3 * W)
                    weight = _pointer(mod_weight_at, WEIGHT)
                    bias = _pointer(mod_bias_at, WEIGHT)
                    cols = tile * BN_MOD + tl.arange(0, BN_MOD)
                    acc = _linear(
                        activated, W, rows, live, weight, bias, cols, n, W, COMPUTE, PRECISION, BM, BN_MOD, BK_MOD,
                        STAGES_MOD, 1,
                    )  # fmt: skip
                    keep = live[:, None] & (cols < n)[None, :]
                    tl.store(mod_after + rows[:, None] * (3 * W) + cols[None, :], acc.to(COMPUTE), mask=keep)
        else:
            weight = _pointer(weight_at, WEIGHT)
            bias = _pointer(bias_at, WEIGHT)
            last = layer == layers - 1
            n = tl.where(last, D, W)
            for turn in range(program, (n + BN - 1) // BN, programs):
                cols = turn * BN + tl.arange(0, BN)
                keep = live[:, None] & (cols < n)[None, :]
                place = rows[:, None] * W + cols[None, :]
                # Of the second linear only, and on their way during its steps.
                second = keep & (kind == 2)
                h = tl.load(hidden + place, mask=second, other=0.0, cache_modifier=".cg").to(tl.float32)
                gates = mod + layer * M * (3 * W) + rows[:, None] * (3 * W) + (2 * W + cols)[None, :]
                gate = tl.load(gates, mask=second, other=0.0, cache_modifier=".cg").to(tl.float32)
                acc = _linear(
                    between + (kind - 1) * M * W, W, rows, live, weight, bias, cols, n, W, COMPUTE, PRECISION, BM, BN,
                    BK, STAGES, PARTS,
                )  # fmt: skip
                acc = acc.to(COMPUTE).to(tl.float32)
                if kind == 2:
                    tl.store(hidden + place, (h + gate * acc).to(COMPUTE), mask=keep)
                elif last:
                    tl.store(out + rows[:, None] * D + cols[None, :], acc.to(COMPUTE), mask=keep)
                else:
                    tl.store(between + M * W + place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
        if BARRIERS and phase + 1 < last_phase:
            _arrive(counter)
            # What the next phase needs, while the others arrive.
            layer = tl.where(phase == 0, 0, (phase - 1) // 3)
            kind = tl.where(phase == 0, 0, (phase - 1) % 3)
            weight_at = tl.load(table + layer * TABLE_COLUMNS + 2 * kind)
            bias_at = tl.load(table + layer * TABLE_COLUMNS + 2 * kind + 1)
            mod_layer = tl.where(phase == 0, 0, tl.minimum(layer + 1, layers - 1))
            mod_weight_at = tl.load(table + mod_layer * TABLE_COLUMNS + WEIGHT_MOD)
            mod_bias_at = tl.load(table + mod_layer * TABLE_COLUMNS + BIAS_MOD)
            if (phase > 0) & (kind == 0) & (layer < layers - 1):
                # Both linears of the block, during its norm.
                for column in tl.static_range(WEIGHT_IN, WEIGHT_OUT + 1, 2):
                    weight = _pointer(tl.load(table + layer * TABLE_COLUMNS + column), WEIGHT)
                    _prefetch(weight, program * BN, W, W, BN, LINES, LINE)
            if AHEAD > 0:
                # The modulation that the next norm phase computes, during the linears before it.
                ahead = tl.where(phase == 0, 1, layer + 2)
                if ((phase == 0) | (kind == 1)) & (ahead < layers):
                    _prefetch_modulation(table, ahead, layers, W, WEIGHT, AHEAD, LINES, LINE)
            _wait(counter, (phase + 1 - first_phase) * programs)
