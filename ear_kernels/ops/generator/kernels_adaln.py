"""LayerNorm + AdaLN modulation over rows, with the gated residual that precedes it folded in.

Legend: R rows of width W. Rows come in ``entries`` runs of ``group`` consecutive rows; the rows of a run
share one shift, scale and gate (``group`` = 1: one of them per row). A program takes one *unit*: at most
``unit_rows`` rows of one run (``chunks`` units a run), so that a shift shared by all rows does not put all
rows into one program.

What is absent is None, and so is its stride: nothing is compiled for it. Every load is cast to float32 at once: all
arithmetic is in float32 whatever the storage, on a GPU because that is what the maths needs and in the interpreter
because its bf16 arithmetic is wrong.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit(do_not_specialize=["rows"])
def adaln_fwd_kernel(
    hidden,  # [R, W], or [T, W] with an index
    index,  # [R] int32 or None: the row of hidden that row r starts from
    ffn,  # [R, W] or None: output of the previous block's FFN
    gate,  # [entries, W], with ffn: gate of the previous block
    shift,  # [entries, W] or None
    scale,  # [entries, W]
    weight,  # [W] or None
    bias,  # [W] or None
    next_hidden,  # [R, W], out, with ffn: hidden + gate * ffn
    out,  # [R, W], out: the modulated rows
    mean,  # [R] float32 or None, out
    rstd,  # [R] float32, out, with mean
    rows,
    group,
    chunks,
    unit_rows,
    stride_hidden,
    stride_ffn,
    stride_gate,
    stride_shift,
    stride_scale,
    stride_next,
    stride_out,
    eps,
    temperature,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NEXT_IS_DEPENDENT: tl.constexpr,
):
    """``h' = h + gate * ffn`` and ``out = LN(h') * (1 + scale) + temperature * shift`` for the rows of one
    unit.

    With NEXT_IS_DEPENDENT the next kernel of the stream may be launched while this one runs.
    """
    if NEXT_IS_DEPENDENT:
        gdc_launch_dependents()
    unit = tl.program_id(0)
    entry = tl.cast(unit // chunks, tl.int64)
    first = (unit % chunks) * unit_rows
    last = tl.minimum(first + unit_rows, group)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    if shift is not None:
        shift_W = tl.load(shift + entry * stride_shift + cols, mask=live, other=0.0).to(tl.float32) * temperature
    scale_W = tl.load(scale + entry * stride_scale + cols, mask=live, other=0.0).to(tl.float32) + 1.0
    if weight is not None:
        weight_W = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        bias_W = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    if ffn is not None:
        gate_W = tl.load(gate + entry * stride_gate + cols, mask=live, other=0.0).to(tl.float32)
    for step in range(first, last):
        row = entry * group + step
        source = row
        if index is not None:
            source = tl.load(index + row).to(tl.int64)
        h_W = tl.load(hidden + source * stride_hidden + cols, mask=live, other=0.0).to(tl.float32)
        if ffn is not None:
            f_W = tl.load(ffn + row * stride_ffn + cols, mask=live, other=0.0).to(tl.float32)
            # Rounded to the stream's type before the norm: backward sees this stored row, not the exact one.
            stored_W = (h_W + gate_W * f_W).to(next_hidden.dtype.element_ty)
            tl.store(next_hidden + row * stride_next + cols, stored_W, mask=live)
            h_W = stored_W.to(tl.float32)
        mu = tl.sum(h_W, 0) / WIDTH
        centred_W = tl.where(live, h_W - mu, 0.0)
        rs = 1.0 / tl.sqrt(tl.sum(centred_W * centred_W, 0) / WIDTH + eps)
        if mean is not None:
            tl.store(mean + row, mu)
            tl.store(rstd + row, rs)
        n_W = centred_W * rs
        if weight is not None:
            n_W *= weight_W
        if bias is not None:
            n_W += bias_W
        u_W = n_W * scale_W
        if shift is not None:
            u_W += shift_W
        tl.store(out + row * stride_out + cols, u_W.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["units", "units_per_program"])
def adaln_bwd_kernel(
    grad_out,  # [R, W]: gradient of the modulated rows
    hidden,  # [R, W], or [T, W] with an index: the input of the norm
    index,  # [R] int32 or None
    scale,  # [entries, W]
    weight,  # [W] or None
    bias,  # [W] or None
    mean,  # [R] float32
    rstd,  # [R] float32
    grad_residual,  # [R, W] or None: gradient that reaches hidden past the norm
    ffn,  # [R, W] or None: output of the previous block's FFN
    gate,  # [entries, W], with ffn: gate of the previous block
    # [R, W] or None, out: hidden - gate * ffn, the input of the previous block (may be hidden's memory)
    previous_hidden,
    grad_hidden,  # [R, W], out (may be grad_residual's memory)
    grad_shift,  # [entries * chunks, W] or None, out
    grad_scale,  # [entries * chunks, W], out
    grad_ffn,  # [R, W], out, with ffn: gate * grad_hidden
    grad_gate,  # [entries * chunks, W], out, with ffn
    partials,  # [programs, SUMS, W] float32, out: this program's sums over its rows; None if SUMS is 0
    group,
    chunks,
    unit_rows,
    units,
    units_per_program,
    stride_grad_out,
    stride_hidden,
    stride_scale,
    stride_residual,
    stride_ffn,
    stride_gate,
    stride_previous,
    stride_grad_hidden,
    stride_grad_shift,
    stride_grad_scale,
    stride_grad_ffn,
    stride_grad_gate,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    SUM_MODULATION: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Backward of the norm and modulation of one block, then of the gated residual of the block before it.

    With g = grad_out, n = LN(h), x the normalised rows before the affine:
    ``dshift = g``, ``dscale = g n``, ``dn = g (1 + scale)``, ``dh = rstd (w dn - mean(w dn) - x mean(w dn
    x))`` plus the residual's gradient; then ``dffn = dh * gate`` and ``dgate = dh * ffn`` of the previous
    block, and into ``previous_hidden`` that block's input, which forward then need not save.

    Every output but the sums may be the memory of the input it belongs to (dscale that of scale, dgate of gate,
    dffn of ffn): a row is read before it is written, and only by the program that writes it.

    Sums over rows go to ``partials`` in a fixed order, in slots: [weight, bias] if either is given, [ffn] if given,
    then [shift, scale] if SUM_MODULATION and [gate] if also given. The grid does not depend on the device, so the
    result does not either.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    live = cols < WIDTH
    if weight is not None:
        weight_W = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        bias_W = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    # Sums over the program's rows, and over those of a unit; what is not summed is not compiled.
    sum_weight_W = tl.zeros([BLOCK], tl.float32)
    sum_bias_W = sum_weight_W
    sum_ffn_W = sum_weight_W
    sum_shift_W = sum_weight_W
    sum_scale_W = sum_weight_W
    sum_gate_W = sum_weight_W
    unit_shift_W = sum_weight_W
    unit_scale_W = sum_weight_W
    unit_gate_W = sum_weight_W
    begin = program * units_per_program
    end = tl.minimum(begin + units_per_program, units)
    # One flat loop over all rows of all units, so that the compiler prefetches across units; it reads a shared scale
    # and gate again for every row, from the L1.
    for step in tl.range(begin * unit_rows, end * unit_rows, num_stages=STAGES):
        if SINGLE:
            row = tl.cast(step, tl.int64)
            entry = row
            slot = row
            seen = live
        else:
            turn = tl.cast(step, tl.int64)
            slot = turn // unit_rows
            turn = turn % unit_rows
            entry = slot // chunks
            inside = (slot % chunks) * unit_rows + turn
            row = entry * group + inside
            # The last unit of a run may be short.
            seen = cols < tl.where(inside < group, WIDTH, 0)
        scale_W = tl.load(scale + entry * stride_scale + cols, mask=live, other=0.0).to(tl.float32) + 1.0
        if ffn is not None:
            gate_W = tl.load(gate + entry * stride_gate + cols, mask=live, other=0.0).to(tl.float32)
        source = row
        if index is not None:
            if SINGLE:
                source = tl.load(index + row).to(tl.int64)
            else:
                source = tl.load(index + row, mask=inside < group, other=0).to(tl.int64)
        g_W = tl.load(grad_out + row * stride_grad_out + cols, mask=seen, other=0.0).to(tl.float32)
        h_W = tl.load(hidden + source * stride_hidden + cols, mask=seen, other=0.0).to(tl.float32)
        if grad_residual is not None:
            through_W = tl.load(grad_residual + row * stride_residual + cols, mask=seen, other=0.0).to(tl.float32)
        if ffn is not None:
            f_W = tl.load(ffn + row * stride_ffn + cols, mask=seen, other=0.0).to(tl.float32)
            if previous_hidden is not None:
                rebuilt_W = h_W - gate_W * f_W
                tl.store(
                    previous_hidden + row * stride_previous + cols,
                    rebuilt_W.to(previous_hidden.dtype.element_ty),
                    mask=seen,
                )
        if SINGLE:
            mu = tl.load(mean + row)
            rs = tl.load(rstd + row)
        else:
            mu = tl.load(mean + row, mask=inside < group, other=0.0)
            rs = tl.load(rstd + row, mask=inside < group, other=0.0)
        x_W = tl.where(live, (h_W - mu) * rs, 0.0)
        n_W = x_W
        if weight is not None:
            n_W = n_W * weight_W
        if bias is not None:
            n_W = n_W + bias_W
        dscale_W = g_W * n_W
        dn_W = g_W * scale_W
        if (weight is not None) or (bias is not None):
            sum_weight_W += dn_W * x_W
            sum_bias_W += dn_W
        if weight is not None:
            dn_W = dn_W * weight_W
        average = tl.sum(dn_W, 0) / WIDTH
        projection = tl.sum(dn_W * x_W, 0) / WIDTH
        dh_W = (dn_W - average - x_W * projection) * rs
        if grad_residual is not None:
            dh_W += through_W
        tl.store(grad_hidden + row * stride_grad_hidden + cols, dh_W.to(grad_hidden.dtype.element_ty), mask=seen)
        if ffn is not None:
            dffn_W = dh_W * gate_W
            tl.store(grad_ffn + row * stride_grad_ffn + cols, dffn_W.to(grad_ffn.dtype.element_ty), mask=seen)
            dgate_W = dh_W * f_W
            sum_ffn_W += dffn_W
        if SUM_MODULATION:
            sum_shift_W += g_W
            sum_scale_W += dscale_W
            if ffn is not None:
                sum_gate_W += dgate_W
        done = live
        if not SINGLE:
            fresh = turn == 0
            unit_shift_W = tl.where(fresh, 0.0, unit_shift_W) + g_W
            unit_scale_W = tl.where(fresh, 0.0, unit_scale_W) + dscale_W
            g_W = unit_shift_W
            dscale_W = unit_scale_W
            if ffn is not None:
                unit_gate_W = tl.where(fresh, 0.0, unit_gate_W) + dgate_W
                dgate_W = unit_gate_W
            done = cols < tl.where(turn == unit_rows - 1, WIDTH, 0)
        if grad_shift is not None:
            tl.store(grad_shift + slot * stride_grad_shift + cols, g_W.to(grad_shift.dtype.element_ty), mask=done)
        tl.store(grad_scale + slot * stride_grad_scale + cols, dscale_W.to(grad_scale.dtype.element_ty), mask=done)
        if ffn is not None:
            tl.store(grad_gate + slot * stride_grad_gate + cols, dgate_W.to(grad_gate.dtype.element_ty), mask=done)
    if SUMS > 0:
        base = partials + program.to(tl.int64) * SUMS * WIDTH + cols
        if (weight is not None) or (bias is not None):
            tl.store(base, sum_weight_W, mask=live)
            tl.store(base + WIDTH, sum_bias_W, mask=live)
            base += 2 * WIDTH
        if ffn is not None:
            tl.store(base, sum_ffn_W, mask=live)
            base += WIDTH
        if SUM_MODULATION:
            tl.store(base, sum_shift_W, mask=live)
            tl.store(base + WIDTH, sum_scale_W, mask=live)
            if ffn is not None:
                tl.store(base + 2 * WIDTH, sum_gate_W, mask=live)
