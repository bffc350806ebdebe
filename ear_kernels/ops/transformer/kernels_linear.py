"""A linear with what follows it in one kernel, for inference: bias, GELU, a cast to e4m3, the residual stream.

Legend: R rows, a linear maps K columns to N. What is absent is None, and loads are cast to float32 at once, as in
``kernels.py``. Operands are both 16-bit or both e4m3.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINES = tl.constexpr(256)
"""Lines of 128 bytes that a program asks for at a time."""


@triton.jit
def _prefetch(weight, size, LINE: tl.constexpr):
    """Ask for this program's share of ``size`` elements to be brought into the L2; LINE of them are 128 bytes."""
    for first in range(tl.program_id(0) * LINES * LINE, size, tl.num_programs(0) * LINES * LINE):
        offsets = tl.minimum(first + tl.arange(0, LINES) * LINE, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight + offsets).to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _gelu(h):
    """``h Phi(h)`` for 16-bit results and narrower ones.

    log2 Phi(-a) is a polynomial of degree 5 in a, to a relative error of Phi(-a) below 2^-12.9 up to a = 4, and an
    absolute one of the GELU below 2e-5 anywhere. Eight instructions, one of them an exponential: the GEMM's
    tensor cores wait for them.
    """
    a = tl.abs(h)
    log_tail = -0.00028693606 * a + 0.0054900497
    log_tail = log_tail * a - 0.047064394
    log_tail = log_tail * a - 0.46576213
    log_tail = log_tail * a - 1.1483871
    log_tail = log_tail * a - 1.0001801
    return tl.maximum(h, 0.0) - a * tl.exp2(log_tail)


@triton.jit
def _finish(
    acc,  # [BM, BS] float32: without the bias
    m,
    n,
    bias,
    scale,  # float32 or None: of acc
    out_inverse,  # float32 or None: of the result
    stream,  # [R, N] float32 or None: what the result is added to
    part,
    out_desc,
    M,
    N,
    BM: tl.constexpr,
    BS: tl.constexpr,
    GELU: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Scale, bias, GELU or the stream's addition, and the store of a tile."""
    cols = n + tl.arange(0, BS)
    if scale is not None:
        acc *= scale
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    if out_inverse is not None:
        acc = tl.clamp(acc * out_inverse, -448.0, 448.0)
    if stream is not None:
        rows = m + tl.arange(0, BM)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        acc += tl.load(stream + rows[:, None].to(tl.int64) * N + cols[None, :], mask=inside, other=0.0)
    if PARTS == 1:
        out_desc.store([m, n], acc.to(out_desc.dtype))
    else:
        out_desc.store([part, m, n], tl.reshape(acc.to(out_desc.dtype), [1, BM, BS]))


@triton.jit
def linear_inference_kernel(
    x_desc,  # [R, K]
    weight_desc,  # [N, K]
    weight,  # [N, K], contiguous: to prefetch; or None
    bias,  # [N] or None
    scale_x,  # [1] float32, or None: not e4m3
    scale_weight,  # [1] float32, with scale_x
    scale_out,  # [1] float32, or None: the result is not e4m3
    stream,  # [R, N] float32, contiguous, or None: what the result is added to, may be out's memory
    out_desc,  # [R, N], out; with PARTS > 1 [PARTS, R, N]
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    GELU: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LINE: tl.constexpr,
):
    """``f(scale_x scale_weight x @ weight^T + bias)``, f the GELU or nothing; a stream is added.

    With PARTS > 1 part p of ``out`` has the products of part p of K alone: their sum is for the kernel after this.

    Persistent: program p takes tiles p, p + programs, ... Both operands of the dot come straight from descriptor
    loads, as in ``ops/generator/kernels_ffn.py``. With DEPENDENT it starts while the kernel before it in the stream
    still runs; the weight, which does not depend on that one, is brought into the L2 meanwhile.
    """
    if DEPENDENT:
        if weight is not None:
            _prefetch(weight, N * K, LINE)
        gdc_wait()
        # At once: the next kernel's programs bring their weight into the L2 where there is room for them.
        gdc_launch_dependents()
    scale = None
    if scale_x is not None:
        scale = tl.load(scale_x) * tl.load(scale_weight)
    out_inverse = None
    if scale_out is not None:
        out_inverse = 1.0 / tl.load(scale_out)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    steps = tl.cdiv(tl.cdiv(K, BK), PARTS)
    per_group = GROUP_M * tiles_n
    for turn in tl.range(tl.program_id(0), tiles_m * tiles_n * PARTS, tl.num_programs(0), flatten=FLATTEN):
        part = turn // (tiles_m * tiles_n)
        tile = turn % (tiles_m * tiles_n)
        first_m = (tile // per_group) * GROUP_M
        size_m = tl.minimum(tiles_m - first_m, GROUP_M)
        m = (first_m + (tile % per_group) % size_m) * BM
        n = ((tile % per_group) // size_m) * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(steps):
            k = (part * steps + step) * BK
            acc = tl.dot(x_desc.load([m, k]), weight_desc.load([n, k]).T, acc)
        if SPLIT == 1:
            _finish(acc, m, n, bias, scale, out_inverse, stream, part, out_desc, M, N, BM, BN, GELU, PARTS)
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, [BM, 2, BN // 2]), [0, 2, 1]))
            _finish(left, m, n, bias, scale, out_inverse, stream, part, out_desc, M, N, BM, BN // 2, GELU, PARTS)
            _finish(
                right,
                m,
                n + BN // 2,
                bias,
                scale,
                out_inverse,
                stream,
                part,
                out_desc,
                M,
                N,
                BM,
                BN // 2,
                GELU,
                PARTS,
            )
