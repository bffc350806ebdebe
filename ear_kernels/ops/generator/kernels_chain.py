"""Kernels of the generator for few rows (sampling) in two halves: modulations of the noise, then the chain.

Legend: M rows (few), a linear maps K columns to N. What depends on the noise alone is two plain launches: its
embedding with SiLU, and the modulations of all layers as one product. The chain that starts from the hidden states is
one persistent kernel, cut into *phases*, each of which needs all of the one before: the input projection; for every
block its norm, its first linear, and the second linear with gate and residual; the final norm; the last linear.

Rows are cut into groups of BM, which share no phase: each has its share of the programs. There is no barrier between
phases, and no flag: whatever a phase writes has memory of its own, filled with a NaN that no arithmetic gives, and
who reads it looks until no such number is left. So a phase begins one way to the L2 and back after the one before.
For that all programs must be resident (a cooperative launch). In the interpreter, which runs programs one after
another, every phase is a launch of its own.

A phase of few rows is a chain of latencies, not of work (docs/performance.md). So what a phase needs and no
phase before changes is asked for before it looks: its weights and modulations in registers, the next one's in the L2.
"""

import triton
import triton.language as tl

from ear_kernels.ops.generator.kernels_few_rows import (
    BIAS_MOD,
    NORM_BIAS,
    NORM_WEIGHT,
    TABLE_COLUMNS,
    WEIGHT_IN,
    WEIGHT_MOD,
    _pointer,
    _prefetch,
)


@triton.jit
def _columns(start, PARTS: tl.constexpr, BK: tl.constexpr):
    """Columns of a step over K, ``[PARTS, 1, BK / PARTS]``: each of PARTS warps takes a part of every step, as of so
    few rows all would do the same otherwise."""
    PART: tl.constexpr = BK // PARTS
    return start + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


def _poll_asm(vectors: int) -> tuple[str, str]:
    """(PTX, constraints) of loads of 16 bytes, all issued again until every 16-bit number in them is written.

    Operands: four words of each vector, then the vectors' addresses, then whether each is wanted (else zeros). A
    word has a half of all ones where its complement has a half of zeros.
    """
    lines = [".reg .pred again, wanted;", ".reg .b32 missing, word, bits;"]
    lines += [f"mov.b32 ${out}, 0;" for out in range(4 * vectors)]
    lines += ["AGAIN:", "mov.b32 missing, 0;"]
    for vector in range(vectors):
        words = [f"${vector + vectors * part}" for part in range(4)]
        lines.append(f"setp.ne.s32 wanted, ${5 * vectors + vector}, 0;")
        lines.append(f"@wanted ld.relaxed.gpu.global.v4.b32 {{{', '.join(words)}}}, [${4 * vectors + vector}];")
    for out in range(4 * vectors):
        lines += [
            f"not.b32 word, ${out};",
            "sub.u32 bits, word, 0x00010001;",
            f"and.b32 bits, bits, ${out};",
            "and.b32 bits, bits, 0x80008000;",
            "or.b32 missing, missing, bits;",
        ]
    lines += ["setp.ne.s32 again, missing, 0;", "@again bra AGAIN;"]
    constraints = ["=&r"] * (4 * vectors) + ["l"] * vectors + ["r"] * vectors
    return "{\n" + "\n".join(lines) + "\n}", ",".join(constraints)


POLL_1, CONSTRAINTS_1 = map(tl.constexpr, _poll_asm(1))
POLL_2, CONSTRAINTS_2 = map(tl.constexpr, _poll_asm(2))
POLL_4, CONSTRAINTS_4 = map(tl.constexpr, _poll_asm(4))
POLL_8, CONSTRAINTS_8 = map(tl.constexpr, _poll_asm(8))


@triton.jit
def _words(address, wanted, VECTORS: tl.constexpr):
    if VECTORS <= 1:
        return tl.inline_asm_elementwise(
            POLL_1, CONSTRAINTS_1, [address, wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False,
            pack=1,
        )  # fmt: skip
    elif VECTORS == 2:
        return tl.inline_asm_elementwise(
            POLL_2, CONSTRAINTS_2, [address, wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False,
            pack=2,
        )  # fmt: skip
    elif VECTORS == 4:
        return tl.inline_asm_elementwise(
            POLL_4, CONSTRAINTS_4, [address, wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False,
            pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            POLL_8, CONSTRAINTS_8, [address, wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False,
            pack=8,
        )  # fmt: skip


@triton.jit
def _halves(words, SHIFT: tl.constexpr, TYPE: tl.constexpr):
    a = (words[0] >> SHIFT).to(tl.int16).to(TYPE, bitcast=True)
    b = (words[1] >> SHIFT).to(tl.int16).to(TYPE, bitcast=True)
    c = (words[2] >> SHIFT).to(tl.int16).to(TYPE, bitcast=True)
    d = (words[3] >> SHIFT).to(tl.int16).to(TYPE, bitcast=True)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _written(
    x, rows, live, W: tl.constexpr, POLL: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """``x[rows]``, rows of W, as ``[PARTS, BM, BLOCK / PARTS]`` once all of it is written: memory that is not holds
    ones in all bits, which is a NaN that no arithmetic gives. Every thread looks at its own numbers alone."""
    if POLL:
        TYPE: tl.constexpr = x.dtype.element_ty
        PART: tl.constexpr = BLOCK // PARTS
        # Vectors of eight numbers: how many a thread has.
        VECTORS: tl.constexpr = BM * BLOCK // (8 * 32 * PARTS)
        eights = tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART // 8)[None, None, :] * 8
        address = (x + rows[None, :, None] * W + eights).to(tl.int64)
        wanted = (live[None, :, None] & (eights < W)).to(tl.int32)
        words = _words(address, wanted, VECTORS)
        values = tl.join(_halves(words, 0, TYPE), _halves(words, 16, TYPE))
        return tl.reshape(values, [PARTS, BM, PART])
    else:
        ks = _columns(0, PARTS, BLOCK)
        return tl.load(x + rows[None, :, None] * W + ks, mask=live[None, :, None] & (ks < W), other=0.0)


@triton.jit
def _weights(weight, cols, ks, N, K, COMPUTE: tl.constexpr):
    """``weight[cols]`` of a step, ``[PARTS, BN, BK / PARTS]``."""
    keep = (cols < N)[None, :, None] & (ks < K)
    return tl.load(weight + cols[None, :, None].to(tl.int64) * K + ks, mask=keep, other=0.0).to(COMPUTE)


@triton.jit
def _project(
    x, stride_x, source, live, weight, bias, cols, N, K, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``weight[cols] @ x[source]^T + bias[cols]``, ``[BN, BM]`` in float32, rounded where eager rounds, of rows that
    were there before the launch.

    The weights are the left operand: the right one of a tensor core takes 8 rows, the left one 16.
    """
    bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    sums = tl.zeros([PARTS, BN, BM], tl.float32)
    for start in tl.range(0, K, BK, num_stages=2):
        ks = _columns(start, PARTS, BK)
        w = _weights(weight, cols, ks, N, K, COMPUTE)
        keep = live[None, :, None] & (ks < K)
        a = tl.load(x + source[None, :, None] * stride_x + ks, mask=keep, other=0.0).to(COMPUTE)
        sums = tl.dot(w, tl.permute(a, (0, 2, 1)), sums, input_precision=PRECISION)
    return (tl.sum(sums, 0) + bias_N[:, None]).to(COMPUTE).to(tl.float32)


@triton.jit
def _linear(
    x, rows, live, weight, bias, cols, N, W: tl.constexpr, COMPUTE: tl.constexpr, POLL: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """:func:`_project` of rows of the phase before, ``x [M, W]``."""
    bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    w = _weights(weight, cols, _columns(0, PARTS, BLOCK), N, W, COMPUTE)
    a = _written(x, rows, live, W, POLL, BM, BLOCK, PARTS)
    sums = tl.dot(w, tl.permute(a, (0, 2, 1)))
    return (tl.sum(sums, 0) + bias_N[:, None]).to(COMPUTE).to(tl.float32)


@triton.jit
def _normed(
    hidden,  # [M, W], of the phase before
    mod,  # of this layer: shift, scale
    stride_mod,
    norm_weight,
    norm_bias,
    affine,  # whether the norm has parameters
    row,
    eps,
    W: tl.constexpr,
    POLL: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``LN(hidden[row]) (1 + scale) + shift``, ``[PARTS, 1, BLOCK / PARTS]``; all else is on its way before the
    row is there."""
    ks = _columns(0, PARTS, BLOCK)
    place = mod + tl.cast(row, tl.int64) * stride_mod + ks
    shift = tl.load(place, mask=ks < W, other=0.0)
    scale = tl.load(place + W, mask=ks < W, other=0.0)
    # The final layer's norm has no parameters.
    parameters = ks < tl.where(affine, W, 0)
    factor = tl.load(norm_weight + ks, mask=parameters, other=1.0)
    offset = tl.load(norm_bias + ks, mask=parameters, other=0.0)
    rows = row + tl.arange(0, 1)
    h = _written(hidden, rows, rows >= 0, W, POLL, 1, BLOCK, PARTS).to(tl.float32)
    centred = tl.where(ks < W, h - tl.sum(tl.sum(tl.sum(h, 2), 1), 0) / W, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(tl.sum(centred * centred, 2), 1), 0) / W + eps)
    normed = centred * rstd * factor.to(tl.float32) + offset.to(tl.float32)
    return normed * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)


@triton.jit(do_not_specialize=["M", "samples", "first_phase", "last_phase"])
def chain_kernel(
    z,  # [T, input_dim]; row r is of token r // samples
    mod,  # [M, (3 layers - 1) W]: shift, scale and gate of every block, shift and scale of the final layer
    table,  # [layers + 1, TABLE_COLUMNS] int64: addresses of all parameters
    streams,  # [3 layers - 1, M, W], ones in all bits: what each phase but the last writes
    out,  # [M, D], out
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
    POLL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    """Rows ``[M, D]`` of the generator. BLOCK: lanes that hold a row. LINES: 128-byte lines of a weight's row, LINE:
    their size."""
    programs = tl.num_programs(0) // ((M + BM - 1) // BM)  # of a group
    group = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    rows = group * BM + tl.arange(0, BM)
    live = rows < M
    # The phase's weight; in phase 0 of the inputs' row of the table. A norm's is its own.
    layer = tl.maximum(first_phase - 1, 0) // 3
    kind = tl.maximum(first_phase - 1, 0) % 3
    at = table + tl.where(first_phase == 0, layers * TABLE_COLUMNS + WEIGHT_IN, layer * TABLE_COLUMNS + 2 * kind)
    weight_at = tl.load(at)
    bias_at = tl.load(at + 1)
    for phase in range(first_phase, last_phase):
        layer = tl.maximum(phase - 1, 0) // 3
        kind = tl.where(phase == 0, 1, (phase - 1) % 3)  # norm, first linear, second linear
        last = layer == layers - 1
        n = tl.where(last, D, W)
        before = streams + (phase - 1) * M * W
        weight = _pointer(weight_at, WEIGHT)
        bias = _pointer(bias_at, WEIGHT)
        norm_weight = _pointer(tl.load(table + layer * TABLE_COLUMNS + NORM_WEIGHT), NORM)
        norm_bias = _pointer(tl.load(table + layer * TABLE_COLUMNS + NORM_BIAS), NORM)
        if POLL and phase + 1 < last_phase:
            # The next phase's addresses, and its weights on their way to the L2, during this one.
            kind_ahead = phase % 3
            at = table + phase // 3 * TABLE_COLUMNS + 2 * kind_ahead
            weight_at = tl.load(at)
            bias_at = tl.load(at + 1)
            if kind_ahead > 0:
                ahead = tl.where(phase // 3 == layers - 1, D, W)
                _prefetch(_pointer(weight_at, WEIGHT), program * BN, ahead, W, BN, LINES, LINE)
        if kind == 0:
            for row in range(group * BM + program, tl.minimum(M, group * BM + BM), programs):
                u = _normed(
                    before, mod + layer * (3 * W), stride_mod, norm_weight, norm_bias, layer < layers - 1, row, eps,
                    W, POLL, BLOCK, PARTS,
                )  # fmt: skip
                ks = _columns(0, PARTS, BLOCK)
                tl.store(before + M * W + row * W + ks, u.to(COMPUTE), mask=ks < W)
        else:
            for tile in range(program, (n + BN - 1) // BN, programs):
                cols = tile * BN + tl.arange(0, BN)
                keep = live[None, :] & (cols < n)[:, None]
                place = rows[None, :] * W + cols[:, None]
                if phase == 0:
                    acc = _project(
                        z, stride_z, rows // samples, live, weight, bias, cols, n, input_dim, COMPUTE, "tf32", BM, BN,
                        512, PARTS,
                    )  # fmt: skip
                    tl.store(streams + place, acc.to(COMPUTE), mask=keep)
                elif kind == 1:
                    acc = _linear(before, rows, live, weight, bias, cols, n, W, COMPUTE, POLL, BM, BLOCK, PARTS)
                    if last:
                        tl.store(out + rows[None, :] * D + cols[:, None], acc.to(COMPUTE), mask=keep)
                    else:
                        tl.store(before + M * W + place, (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)
                else:
                    # The norm's input: this program has seen the norm's whole output, so that was there.
                    h = tl.load(before - 2 * M * W + place, mask=keep, other=0.0, cache_modifier=".cg")
                    gates = mod + layer * (3 * W) + rows[None, :].to(tl.int64) * stride_mod
                    gate = tl.load(gates + (2 * W + cols)[:, None], mask=keep, other=0.0).to(tl.float32)
                    acc = _linear(before, rows, live, weight, bias, cols, W, W, COMPUTE, POLL, BM, BLOCK, PARTS)
                    tl.store(before + M * W + place, (h.to(tl.float32) + gate * acc).to(COMPUTE), mask=keep)


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
    acc = _project(
        noise, stride_noise, rows, rows < M, weight, bias, cols, W, noise_dim, COMPUTE, PRECISION, BM, BN, 64, 1
    )
    keep = (rows < M)[None, :] & (cols < W)[:, None]
    tl.store(activated + rows[None, :] * W + cols[:, None], (acc * tl.sigmoid(acc)).to(COMPUTE), mask=keep)


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
