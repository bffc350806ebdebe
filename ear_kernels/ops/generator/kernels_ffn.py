"""The SiLU network and its gated residual: a GEMM with epilogues, and the same pointwise steps around cuBLAS.

Legend: R rows; a linear maps K columns to N. What is absent is None, and loads are cast to float32 at once, as in
``kernels_adaln.py``.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP_M = tl.constexpr(8)
"""Tiles of rows that consecutive programs share, so that their columns' weights are read from the L2."""


@triton.jit
def _epilogue(
    acc,  # [BM, BS] float32: without the bias
    m,
    n,
    bias,
    saved_desc,
    residual_desc,
    gate_desc,
    out_desc,
    N,
    BS: tl.constexpr,
):
    cols = n + tl.arange(0, BS)
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    # Rounded here as well as where it is stored: backward differentiates at the rounded value.
    rounded = acc.to(out_desc.dtype)
    if saved_desc is not None:
        saved_desc.store([m, n], rounded)
    if gate_desc is None:
        pre = rounded.to(tl.float32)
        out_desc.store([m, n], (pre * tl.sigmoid(pre)).to(out_desc.dtype))
    else:
        gate = gate_desc.load([m, n]).to(tl.float32)
        residual = residual_desc.load([m, n]).to(tl.float32)
        out_desc.store([m, n], (residual + gate * rounded.to(tl.float32)).to(out_desc.dtype))


@triton.jit
def linear_kernel(
    a_desc,  # [R, K]
    b_desc,  # [N, K]
    bias,  # [N] or None
    saved_desc,  # [R, N] or None, out: A @ B^T + bias
    residual_desc,  # [R, N], with gate_desc
    gate_desc,  # [R, N] or None
    out_desc,  # [R, N], out
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``SiLU(A @ B^T + bias)``, or ``residual + gate * (A @ B^T + bias)`` where there is a gate.

    Persistent: program p takes tiles p, p + programs, ... Both operands of the dot come straight from descriptor
    loads: ptxas 12.8 miscompiles a WGMMA whose A operand was computed in registers (docs/performance.md). With
    DEPENDENT it starts while the kernel before it in the stream still runs, and so may the kernel after it.
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
        m = (first_m + (tile % per_group) % size_m) * BM
        n = ((tile % per_group) // size_m) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(steps):
            acc = tl.dot(a_desc.load([m, step * BK]), b_desc.load([n, step * BK]).T, acc)
        if DEPENDENT:
            # Not sooner: programs that wait hold registers and shared memory that other streams' kernels could use.
            gdc_launch_dependents()
        if SPLIT == 1:
            _epilogue(acc, m, n, bias, saved_desc, residual_desc, gate_desc, out_desc, N, BN)
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
            _epilogue(left, m, n, bias, saved_desc, residual_desc, gate_desc, out_desc, N, BN // 2)
            _epilogue(right, m, n + BN // 2, bias, saved_desc, residual_desc, gate_desc, out_desc, N, BN // 2)


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
    active,  # [R, W] or None, out: SiLU(pre), for the weight gradient of the next linear (may be pre's memory)
    partials,  # [programs, W] float32, out: column sums of grad_pre
    rows,
    rows_per_program,
    stride_grad_out,
    stride_pre,
    stride_grad_pre,
    stride_active,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad_pre = grad_out * SiLU'(pre)``, its sum over rows in a fixed order, and the activation again."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    sum_W = tl.zeros([BLOCK], tl.float32)
    begin = program * rows_per_program
    # Two stages: the next row is loaded before this one's sums.
    for index in tl.range(begin, tl.minimum(begin + rows_per_program, rows), num_stages=2):
        row = tl.cast(index, tl.int64)
        g_W = tl.load(grad_out + row * stride_grad_out + cols, mask=live, other=0.0).to(tl.float32)
        x_W = tl.load(pre + row * stride_pre + cols, mask=live, other=0.0).to(tl.float32)
        sigmoid_W = tl.sigmoid(x_W)
        active_W = x_W * sigmoid_W
        grad_W = g_W * (sigmoid_W + active_W * (1.0 - sigmoid_W))
        sum_W += grad_W
        if active is not None:
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
