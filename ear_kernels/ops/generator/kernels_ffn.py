"""The SiLU network and its gated residual: a GEMM with epilogues, and the same pointwise steps around cuBLAS.

Legend: R rows; a linear maps K columns to N. Loads are cast to float32 at once (see
    ``ops/adaln/kernels.py``).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPILOGUE_BIAS = tl.constexpr(0)
EPILOGUE_SILU = tl.constexpr(1)
EPILOGUE_GATE = tl.constexpr(2)
EPILOGUE_DSILU = tl.constexpr(3)


@triton.jit
def _epilogue(
    acc,  # [BM, BS] float32
    m,
    n,
    tile_m,
    bias,
    extra_desc,
    residual_desc,
    gate_desc,
    out_desc,
    partials,
    N,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    BS: tl.constexpr,
):
    cols = n + tl.arange(0, BS)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 0:
        out_desc.store([m, n], acc.to(out_desc.dtype))
    if EPILOGUE == 1:
        # The stored pre-activation is rounded, and backward differentiates at the rounded value: use it here
        # too.
        pre = acc.to(out_desc.dtype)
        if STORE_EXTRA:
            extra_desc.store([m, n], pre)
        acc = pre.to(tl.float32)
        out_desc.store([m, n], (acc * tl.sigmoid(acc)).to(out_desc.dtype))
    if EPILOGUE == 2:
        ffn = acc.to(out_desc.dtype)
        if STORE_EXTRA:
            extra_desc.store([m, n], ffn)
        gate = gate_desc.load([m, n]).to(tl.float32)
        residual = residual_desc.load([m, n]).to(tl.float32)
        out_desc.store([m, n], (residual + gate * ffn.to(tl.float32)).to(out_desc.dtype))
    if EPILOGUE == 3:
        pre = residual_desc.load([m, n]).to(tl.float32)
        sigmoid = tl.sigmoid(pre)
        active = pre * sigmoid
        extra_desc.store([m, n], active.to(out_desc.dtype))
        grad = acc * (sigmoid + active * (1.0 - sigmoid))
        out_desc.store([m, n], grad.to(out_desc.dtype))
        # Rows past the end are zero: their A rows were loaded as zero, so acc is zero there.
        tl.store(partials + tl.cast(tile_m, tl.int64) * N + cols, tl.sum(grad, 0), mask=cols < N)


@triton.jit
def linear_kernel(
    a_desc,  # [R, K]
    b_desc,  # [N, K], or [K, N] without B_TRANSPOSED
    bias,  # [N]
    extra_desc,  # [R, N], out: pre-activation (SILU), FFN output (GATE), activation (DSILU)
    residual_desc,  # [R, N]: residual stream (GATE), pre-activation (DSILU)
    gate_desc,  # [R, N] (GATE)
    out_desc,  # [R, N], out
    partials,  # [ceil(R / BM), N] float32, out: column sums of a tile (DSILU)
    M,
    N,
    K,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``epilogue(A @ B^T + bias)``, persistent: program p takes tiles p, p + programs, ...

    Both operands of the dot come straight from descriptor loads: ptxas 12.8 miscompiles a WGMMA whose A
    operand was computed in registers (docs/performance.md).
    """
    if DEPENDENT:
        gdc_wait()
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    per_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        first_m = (tile // per_group) * GROUP_M
        size_m = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % per_group) % size_m
        tile_n = (tile % per_group) // size_m
        m = tile_m * BM
        n = tile_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(steps):
            a = a_desc.load([m, step * BK])
            if B_TRANSPOSED:
                acc = tl.dot(a, b_desc.load([n, step * BK]).T, acc)
            else:
                acc = tl.dot(a, b_desc.load([step * BK, n]), acc)
        if DEPENDENT:
            # Not sooner: programs that wait hold registers and shared memory that other streams' kernels could use.
            gdc_launch_dependents()
        if SPLIT == 1:
            _epilogue(
                acc, m, n, tile_m, bias, extra_desc, residual_desc, gate_desc, out_desc, partials, N,
                EPILOGUE, HAS_BIAS, STORE_EXTRA, BN,
            )  # fmt: skip
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
            _epilogue(
                left, m, n, tile_m, bias, extra_desc, residual_desc, gate_desc, out_desc, partials, N,
                EPILOGUE, HAS_BIAS, STORE_EXTRA, BN // 2,
            )  # fmt: skip
            _epilogue(
                right, m, n + BN // 2, tile_m, bias, extra_desc, residual_desc, gate_desc, out_desc, partials,
                N, EPILOGUE, HAS_BIAS, STORE_EXTRA, BN // 2,
            )  # fmt: skip


@triton.jit
def silu_fwd_kernel(
    pre,  # [R, W], contiguous
    out,  # [R, W], rows stride_out apart, out
    size,  # R * W
    stride_out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = SiLU(pre)``."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    place = out + (offsets // WIDTH) * stride_out + offsets % WIDTH
    tl.store(place, (x * tl.sigmoid(x)).to(out.dtype.element_ty), mask=offsets < size)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def silu_bwd_kernel(
    grad_out,  # [R, W]
    pre,  # [R, W]
    grad_pre,  # [R, W], out (may be grad_out's memory)
    active,  # [R, W], out: SiLU(pre), for the weight gradient of the next linear
    partials,  # [programs, W] float32, out: column sums of grad_pre
    rows,
    rows_per_program,
    stride_grad_out,
    stride_pre,
    stride_grad_pre,
    stride_active,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STORE_ACTIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``grad_pre = grad_out * SiLU'(pre)``, its sum over rows in a fixed order, and the activation again."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    sum_W = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        g_W = tl.load(grad_out + row * stride_grad_out + cols, mask=live, other=0.0).to(tl.float32)
        x_W = tl.load(pre + row * stride_pre + cols, mask=live, other=0.0).to(tl.float32)
        sigmoid_W = tl.sigmoid(x_W)
        active_W = x_W * sigmoid_W
        grad_W = g_W * (sigmoid_W + active_W * (1.0 - sigmoid_W))
        sum_W += grad_W
        if STORE_ACTIVE:
            tl.store(active + row * stride_active + cols, active_W.to(active.dtype.element_ty), mask=live)
        tl.store(grad_pre + row * stride_grad_pre + cols, grad_W.to(grad_pre.dtype.element_ty), mask=live)
    tl.store(partials + program.to(tl.int64) * WIDTH + cols, sum_W, mask=live)


@triton.jit
def gate_fwd_kernel(
    hidden,  # [R, W]
    ffn,  # [R, W]
    gate,  # [entries, W]
    out,  # [R, W], out
    group,
    chunks,
    unit_rows,
    stride_hidden,
    stride_ffn,
    stride_gate,
    stride_out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = hidden + gate * ffn``; units of rows as in ``adaln_fwd_kernel``."""
    unit = tl.program_id(0)
    entry = tl.cast(unit // chunks, tl.int64)
    first = (unit % chunks) * unit_rows
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    gate_W = tl.load(gate + entry * stride_gate + cols, mask=live, other=0.0).to(tl.float32)
    for step in range(first, tl.minimum(first + unit_rows, group)):
        row = entry * group + step
        h_W = tl.load(hidden + row * stride_hidden + cols, mask=live, other=0.0).to(tl.float32)
        f_W = tl.load(ffn + row * stride_ffn + cols, mask=live, other=0.0).to(tl.float32)
        tl.store(out + row * stride_out + cols, (h_W + gate_W * f_W).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["units", "units_per_program"])
def gate_bwd_kernel(
    grad_out,  # [R, W]
    ffn,  # [R, W]
    gate,  # [entries, W]
    grad_ffn,  # [R, W], out
    grad_gate,  # [entries * chunks, W], out
    partials,  # [programs, W] float32, out: column sums of grad_ffn
    group,
    chunks,
    unit_rows,
    units,
    units_per_program,
    stride_grad_out,
    stride_ffn,
    stride_gate,
    stride_grad_ffn,
    stride_grad_gate,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_ffn = gate * grad_out`` and ``grad_gate = sum over a unit's rows of ffn * grad_out``."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    sum_W = tl.zeros([BLOCK], tl.float32)
    begin = program * units_per_program
    for unit in range(begin, tl.minimum(begin + units_per_program, units)):
        entry = tl.cast(unit // chunks, tl.int64)
        first = (unit % chunks) * unit_rows
        gate_W = tl.load(gate + entry * stride_gate + cols, mask=live, other=0.0).to(tl.float32)
        gate_sum_W = tl.zeros([BLOCK], tl.float32)
        for step in range(first, tl.minimum(first + unit_rows, group)):
            row = entry * group + step
            g_W = tl.load(grad_out + row * stride_grad_out + cols, mask=live, other=0.0).to(tl.float32)
            f_W = tl.load(ffn + row * stride_ffn + cols, mask=live, other=0.0).to(tl.float32)
            grad_W = g_W * gate_W
            sum_W += grad_W
            gate_sum_W += g_W * f_W
            tl.store(grad_ffn + row * stride_grad_ffn + cols, grad_W.to(grad_ffn.dtype.element_ty), mask=live)
        tl.store(
            grad_gate + tl.cast(unit, tl.int64) * stride_grad_gate + cols,
            gate_sum_W.to(grad_gate.dtype.element_ty),
            mask=live,
        )
    tl.store(partials + program.to(tl.int64) * WIDTH + cols, sum_W, mask=live)
