"""A linear with what follows it in one kernel, for inference: bias, GELU, a cast to e4m3.

Legend: R rows, a linear maps K columns to N. What is absent is None, and loads are cast to float32 at once, as in
``kernels.py``. Operands are both 16-bit or both e4m3. They go to the dot straight from descriptor loads: ptxas 12.8
miscompiles a WGMMA whose A operand was computed in registers.

With DEPENDENT a kernel starts while the one before it in the stream still runs: it brings the weight into the L2 and
reads its bias and scale, which do not depend on that one, and waits for its end before it touches anything else. The
kernel after it may start as soon as all programs have waited.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP_M = tl.constexpr(8)
"""Tiles of rows that consecutive programs share, so that their columns' weights are read from the L2."""

LINES = tl.constexpr(256)
"""Lines of 128 bytes that a program asks for at a time."""


@triton.jit
def _prefetch(weight, size, program, programs, LINE: tl.constexpr):
    """Ask for this program's share of ``size`` elements to be brought into the L2; LINE of them are 128 bytes."""
    for first in range(program * LINES * LINE, size, programs * LINES * LINE):
        offsets = tl.minimum(first + tl.arange(0, LINES) * LINE, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight + offsets).to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _gelu(h):
    """``h Phi(h)`` for 16-bit results and narrower ones.

    log2 Phi(-a) is a polynomial of degree 5 in a, to a relative error of Phi(-a) below 2^-12.9 up to a = 4, and an
    absolute one of the GELU below 2e-5 anywhere. Eight instructions, one of them an exponential: the tensor cores
    wait for them.
    """
    a = tl.abs(h)
    log_tail = -0.00028693606 * a + 0.0054900497
    log_tail = log_tail * a - 0.047064394
    log_tail = log_tail * a - 0.46576213
    log_tail = log_tail * a - 1.1483871
    log_tail = log_tail * a - 1.0001801
    return tl.maximum(h, 0.0) - a * tl.exp2(log_tail)


@triton.jit
def _finish(acc, bias_N, scale, out_inverse, GELU: tl.constexpr):
    """``[BM, BN]`` float32: scale, bias, GELU, the result's scale. The GPU's conversion to e4m3 saturates."""
    if scale is not None:
        acc *= scale
    if bias_N is not None:
        acc += bias_N[None, :]
    if GELU:
        acc = _gelu(acc)
    if out_inverse is not None:
        acc *= out_inverse
    return acc


@triton.jit
def _store(acc, m, n, out_desc, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """In SPLIT = 1 or 2 pieces, which take less shared memory."""
    if SPLIT == 1:
        out_desc.store([m, n], acc.to(out_desc.dtype))
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
        out_desc.store([m, n], left.to(out_desc.dtype))
        out_desc.store([m, n + BN // 2], right.to(out_desc.dtype))


@triton.jit
def linear_few_rows_kernel(
    x_desc,  # [R, K]
    weight_desc,  # [N, K]
    weight,  # [N, K], contiguous: to prefetch; or None
    bias,  # [N] or None
    scale_x,  # [1] float32, or None: not e4m3
    scale_weight,  # [1] float32, with scale_x
    scale_out,  # [1] float32, or None: the result is not e4m3
    out_desc,  # [R, N], out
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GELU: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LINE: tl.constexpr,
):
    """``f(scale_x scale_weight x @ weight^T + bias)``, f the GELU or nothing; a program a tile (axes: rows, columns).

    A chain of latencies: whatever can be is done before the wait for the kernel before.
    """
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    if weight is not None:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        _prefetch(weight, N * K, program, tl.num_programs(0) * tl.num_programs(1), LINE)
    bias_N = None
    if bias is not None:
        cols = n + tl.arange(0, BN)
        bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    scale = None
    if scale_x is not None:
        scale = tl.load(scale_weight)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    out_inverse = None
    if scale_x is not None:
        scale *= tl.load(scale_x)
    if scale_out is not None:
        out_inverse = 1.0 / tl.load(scale_out)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(x_desc.load([m, k]), weight_desc.load([n, k]).T, acc)
    _store(_finish(acc, bias_N, scale, out_inverse, GELU), m, n, out_desc, BM, BN, SPLIT)


@triton.jit
def linear_many_rows_kernel(
    x_desc,  # [R, K]
    weight_desc,  # [N, K]
    bias,  # [N] or None
    scale_x,  # [1] float32, or None: not e4m3
    scale_weight,  # [1] float32, with scale_x
    scale_out,  # [1] float32, or None: the result is not e4m3
    out_desc,  # [R, N], out
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GELU: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """As :func:`linear_few_rows_kernel`, but persistent: program p takes tiles p, p + programs, ..."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    scale = None
    if scale_x is not None:
        scale = tl.load(scale_x) * tl.load(scale_weight)
    out_inverse = None
    if scale_out is not None:
        out_inverse = 1.0 / tl.load(scale_out)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    per_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first_m = (tile // per_group) * GROUP_M
        size_m = tl.minimum(tiles_m - first_m, GROUP_M)
        m = (first_m + (tile % per_group) % size_m) * BM
        n = ((tile % per_group) // size_m) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(steps):
            acc = tl.dot(x_desc.load([m, step * BK]), weight_desc.load([n, step * BK]).T, acc)
        bias_N = None
        if bias is not None:
            cols = n + tl.arange(0, BN)
            bias_N = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
        _store(_finish(acc, bias_N, scale, out_inverse, GELU), m, n, out_desc, BM, BN, SPLIT)
