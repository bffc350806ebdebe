"""Kernels of the generator for few rows (sampling): every weight is read once, where it lies.

Legend: M rows (few), a linear maps K columns to N. What depends on the noise alone is two plain launches: its
embedding with SiLU, and the modulations of all layers as one product. The chain that starts from the hidden states is
one persistent kernel, cut into *phases*, each of which needs all of the one before: the input projection; for every
block its norm with the first linear, and the second linear with gate and residual; the final norm with the last
linear. A norm is computed anew by every program that needs it: its rows are few, and a phase of its own would cost
more.

Rows are cut into groups of BM, which share no phase: each has its share of the programs, and these meet between
phases at a barrier in global memory, for which all must be resident (a cooperative launch). In the interpreter, which
runs programs one after another, every phase is a launch of its own. Every phase writes memory of its own, so that
none of it can lie in an L1 before it is written.

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
# int32 numbers from a group's count of arrivals to the next one's: a line of the L2.
COUNTERS = tl.constexpr(32)


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
def _arrive(counter):
    """Count this program as arrived once the stores of all its threads can be seen by the others."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, goal):
    """Until ``goal`` programs have arrived. One thread watches: more would be in the way of the arrivals."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred more;
            .reg .b32 value;
            mov.u32 value, %tid.x;
            setp.ne.u32 more, value, 0;
            @more bra DONE;
        AGAIN:
            ld.acquire.gpu.global.b32 value, [$1];
            setp.lt.s32 more, value, $2;
            @more bra AGAIN;
        DONE:
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r", [counter.to(tl.int64), goal], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _columns(start, PARTS: tl.constexpr, BK: tl.constexpr):
    """Columns of a step over K, ``[PARTS, 1, BK / PARTS]``: each of PARTS warps takes a part of every step, as of so
    few rows all would do the same otherwise."""
    PART: tl.constexpr = BK // PARTS
    return start + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def _accumulate(sums, a, weight, cols, ks, N, K, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """``sums [PARTS, BM, BN]`` and a step's ``a [PARTS, BM, BK / PARTS] @ weight[cols]^T``."""
    keep = (cols < N)[None, :, None] & (ks < K)
    b = tl.load(weight + cols[None, :, None].to(tl.int64) * K + ks, mask=keep, other=0.0).to(COMPUTE)
    return tl.dot(a, tl.permute(b, (0, 2, 1)), sums, input_precision=PRECISION)


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
    """``x[source] @ weight[cols]^T + bias[cols]``, ``[BM, BN]`` in float32, rounded where eager rounds."""
    bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    sums = tl.zeros([PARTS, BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        ks = _columns(start, PARTS, BK)
        keep = live[None, :, None] & (ks < K)
        a = tl.load(x + source[None, :, None] * stride_x + ks, mask=keep, other=0.0).to(COMPUTE)
        sums = _accumulate(sums, a, weight, cols, ks, N, K, COMPUTE, PRECISION)
    return (tl.sum(sums, 0) + bias_N[None, :]).to(COMPUTE).to(tl.float32)


@triton.jit
def _statistics(hidden, rows, live, eps, W: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1 / deviation of rows, ``[BM]``, from each step's own, so that no square of a large mean is summed."""
    mean = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in tl.range(0, W, BK, num_stages=1):
        ks = _columns(start, PARTS, BK)
        count = tl.minimum(W - start, BK).to(tl.float32)
        total = start + count
        h = tl.load(hidden + rows[None, :, None] * W + ks, mask=live[None, :, None] & (ks < W), other=0.0)
        h = h.to(tl.float32)
        mean_of_step = tl.sum(tl.sum(h, 2), 0) / count
        centred = tl.where(ks < W, h - mean_of_step[None, :, None], 0.0)
        difference = mean_of_step - mean
        squares += tl.sum(tl.sum(centred * centred, 2), 0) + difference * difference * (start / total * count)
        mean += difference * (count / total)
    return mean, 1.0 / tl.sqrt(squares / W + eps)


@triton.jit
def _linear_of_norm(
    hidden,  # [M, W]
    mod,  # of this layer: shift, scale
    stride_mod,
    norm_weight,
    norm_bias,
    affine,  # whether the norm has parameters
    mean,  # [BM]
    rstd,  # [BM]
    rows,  # [BM]
    live,  # [BM]
    weight,  # [N, W]
    bias,  # [N]
    cols,  # [BN]
    N,
    W: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """:func:`_linear` of ``LN(hidden[rows]) (1 + scale) + shift``."""
    bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    sums = tl.zeros([PARTS, BM, BN], tl.float32)
    for start in tl.range(0, W, BK, num_stages=STAGES):
        ks = _columns(start, PARTS, BK)
        keep = live[None, :, None] & (ks < W)
        place = mod + rows[None, :, None].to(tl.int64) * stride_mod + ks
        shift = tl.load(place, mask=keep, other=0.0).to(tl.float32)
        scale = tl.load(place + W, mask=keep, other=0.0).to(tl.float32)
        parameters = ks < tl.where(affine, W, 0)
        factor = tl.load(norm_weight + ks, mask=parameters, other=1.0).to(tl.float32)
        offset = tl.load(norm_bias + ks, mask=parameters, other=0.0).to(tl.float32)
        h = tl.load(hidden + rows[None, :, None] * W + ks, mask=keep, other=0.0).to(tl.float32)
        normed = (h - mean[None, :, None]) * rstd[None, :, None] * factor + offset
        u = normed * (1.0 + scale) + shift
        sums = _accumulate(sums, u.to(COMPUTE), weight, cols, ks, N, W, COMPUTE, PRECISION)
    return (tl.sum(sums, 0) + bias_N[None, :]).to(COMPUTE).to(tl.float32)


@triton.jit(do_not_specialize=["M", "samples", "first_phase", "last_phase"])
def chain_kernel(
    z,  # [T, input_dim]; row r is of token r // samples
    mod,  # [M, (3 layers - 1) W]: shift, scale and gate of every block, shift and scale of the final layer
    table,  # [layers + 1, TABLE_COLUMNS] int64: addresses of all parameters
    streams,  # [2 layers - 1, M, W], scratch: what each phase but the last writes
    out,  # [M, D], out
    counter,  # [groups, COUNTERS] int32, zero: arrivals at barriers
    M,
    D,
    input_dim,
    samples,
    layers,  # blocks and the final layer
    stride_z,
    stride_mod,
    first_phase,
    last_phase,  # phases first_phase .. last_phase - 1
    eps,
    W: tl.constexpr,
    WEIGHT: tl.constexpr,
    NORM: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BARRIERS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    """Rows ``[M, D]`` of the generator. LINES: 128-byte lines of a weight's row, LINE: their size."""
    programs = tl.num_programs(0) // ((M + BM - 1) // BM)  # of a group
    group = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    counter += group * COUNTERS
    rows = group * BM + tl.arange(0, BM)
    live = rows < M
    # The phase's layer (in phase 0 the inputs' row of the table) and the addresses that it needs.
    layer = tl.where(first_phase == 0, layers, (first_phase - 1) // 2)
    column = tl.where(first_phase % 2 == 0, WEIGHT_OUT, WEIGHT_IN)
    column = tl.where(first_phase == 0, WEIGHT_IN, column)
    weight_at = tl.load(table + layer * TABLE_COLUMNS + column)
    bias_at = tl.load(table + layer * TABLE_COLUMNS + column + 1)
    for phase in range(first_phase, last_phase):
        last = layer == layers - 1
        n = tl.where(last, D, W)
        weight = _pointer(weight_at, WEIGHT)
        bias = _pointer(bias_at, WEIGHT)
        # What the phases before wrote.
        before = streams + (phase - 1) * M * W
        if phase == 0:
            for tile in range(program, (W + BN - 1) // BN, programs):
                cols = tile * BN + tl.arange(0, BN)
                acc = _linear(
                    z, stride_z, rows // samples, live, weight, bias, cols, W, input_dim, COMPUTE, PRECISION, BM, BN,
                    BK, STAGES, PARTS,
                )  # fmt: skip
                keep = live[:, None] & (cols < W)[None, :]
                tl.store(streams + rows[:, None] * W + cols[None, :], acc.to(COMPUTE), mask=keep)
        elif phase % 2 == 1:
            norm_weight = _pointer(tl.load(table + layer * TABLE_COLUMNS + NORM_WEIGHT), NORM)
            norm_bias = _pointer(tl.load(table + layer * TABLE_COLUMNS + NORM_BIAS), NORM)
            if program * BN < n:
                mean, rstd = _statistics(before, rows, live, eps, W, BM, BK, PARTS)
                for tile in range(program, (n + BN - 1) // BN, programs):
                    cols = tile * BN + tl.arange(0, BN)
                    acc = _linear_of_norm(
                        before, mod + layer * (3 * W), stride_mod, norm_weight, norm_bias, layer < layers - 1, mean,
                        rstd, rows, live, weight, bias, cols, n, W, COMPUTE, PRECISION, BM, BN, BK, STAGES, PARTS,
                    )  # fmt: skip
                    keep = live[:, None] & (cols < n)[None, :]
                    if last:
                        tl.store(out + rows[:, None] * D + cols[None, :], acc.to(COMPUTE), mask=keep)
                    else:
                        place = streams + phase * M * W + rows[:, None] * W + cols[None, :]
                        tl.store(place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
        else:
            for tile in range(program, (W + BN - 1) // BN, programs):
                cols = tile * BN + tl.arange(0, BN)
                keep = live[:, None] & (cols < W)[None, :]
                place = rows[:, None] * W + cols[None, :]
                # On their way during the product.
                h = tl.load(before - M * W + place, mask=keep, other=0.0).to(tl.float32)
                gates = mod + layer * (3 * W) + rows[:, None].to(tl.int64) * stride_mod + (2 * W + cols)[None, :]
                gate = tl.load(gates, mask=keep, other=0.0).to(tl.float32)
                acc = _linear(
                    before, W, rows, live, weight, bias, cols, W, W, COMPUTE, PRECISION, BM, BN, BK, STAGES, PARTS
                )
                tl.store(streams + phase * M * W + place, (h + gate * acc).to(COMPUTE), mask=keep)
        if BARRIERS and phase + 1 < last_phase:
            _arrive(counter)
            # What the next phase needs, while the others arrive.
            layer = phase // 2
            column = tl.where(phase % 2 == 0, WEIGHT_IN, WEIGHT_OUT)
            weight_at = tl.load(table + layer * TABLE_COLUMNS + column)
            bias_at = tl.load(table + layer * TABLE_COLUMNS + column + 1)
            n = tl.where(layer == layers - 1, D, W)
            _prefetch(_pointer(weight_at, WEIGHT), program * BN, n, W, BN, LINES, LINE)
            _wait(counter, (phase + 1 - first_phase) * programs)


@triton.jit(do_not_specialize=["M"])
def embed_kernel(
    noise,  # [M, noise_dim]
    weight,  # [W, noise_dim]
    bias,  # [W]
    activated,  # [M, W], out
    M,
    noise_dim,
    stride_noise,
    W: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``SiLU(noise @ weight^T + bias)``."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = _linear(
        noise, stride_noise, rows, rows < M, weight, bias, cols, W, noise_dim, COMPUTE, PRECISION, BM, BN, 64, 1, 1
    )
    keep = (rows < M)[:, None] & (cols < W)[None, :]
    tl.store(activated + rows[:, None] * W + cols[None, :], (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)


@triton.jit(do_not_specialize=["M"])
def modulations_kernel(
    activated,  # [M, W]
    table,  # see chain_kernel
    mod,  # [M, (3 layers - 1) W], out
    M,
    layers,
    stride_mod,
    temperature,
    W: tl.constexpr,
    WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The modulation linears of all layers; ``temperature`` multiplies the shifts of the blocks."""
    TILES: tl.constexpr = (3 * W + BN - 1) // BN
    layer = tl.program_id(0) // TILES
    n = tl.where(layer == layers - 1, 2 * W, 3 * W)
    cols = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    inside = cols < n
    rows = tl.arange(0, BM)
    live = rows < M
    weight = _pointer(tl.load(table + layer * TABLE_COLUMNS + WEIGHT_MOD), WEIGHT)
    bias = _pointer(tl.load(table + layer * TABLE_COLUMNS + BIAS_MOD), WEIGHT)
    bias_N = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, W, BK, num_stages=STAGES):
        ks = start + tl.arange(0, BK)
        a = tl.load(activated + rows[:, None] * W + ks[None, :], mask=live[:, None] & (ks < W)[None, :], other=0.0)
        places = weight + cols[:, None].to(tl.int64) * W + ks[None, :]
        b = tl.load(places, mask=inside[:, None] & (ks < W)[None, :], other=0.0).to(COMPUTE)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    # Rounded where eager rounds: the linear's output.
    acc = (acc + bias_N[None, :]).to(COMPUTE).to(tl.float32)
    acc = tl.where((cols < W) & (layer < layers - 1), temperature, 1.0)[None, :] * acc
    place = mod + layer * (3 * W) + rows[:, None].to(tl.int64) * stride_mod + cols[None, :]
    tl.store(place, acc.to(COMPUTE), mask=live[:, None] & inside[None, :])
