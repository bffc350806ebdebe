"""A step back of a diffusion process, an element a lane.

Legend: R rows, D size of a token, S steps; with guidance there are 2 R outputs, those under the null class last.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "steps", "offset", "stride_noise"])
def denoise_step_kernel(
    output,  # [R or 2 R, 2 D]
    state,  # [R, D] float32, in and out
    states,  # [R or 2 R, D], out
    noise,  # [R, S, D] float32
    table,  # [S, 5] float32: growth, error, least and most log variance, temperature
    time,  # [1] int64
    guidance,  # [1] float32, or None
    rows,
    steps,
    offset,
    stride_noise,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(time) - offset
    live = (place < rows * D) & (at >= 0)
    row, column = (place // D).to(tl.int64), place % D
    x = tl.load(state + place, mask=live, other=0.0)
    own = output + row * (2 * D) + column
    predicted = tl.load(own, mask=live, other=0.0).to(tl.float32)
    share = (tl.load(own + D, mask=live, other=0.0).to(tl.float32) + 1.0) / 2
    if guidance is not None:
        null = tl.load(own + rows.to(tl.int64) * (2 * D), mask=live, other=0.0).to(tl.float32)
        predicted = null + tl.load(guidance) * (predicted - null)
    numbers = table + tl.maximum(at, 0) * 5
    mean = tl.load(numbers) * x - tl.load(numbers + 1) * predicted
    log_variance = share * tl.load(numbers + 3) + (1.0 - share) * tl.load(numbers + 2)
    spread = tl.exp(0.5 * log_variance) * tl.load(numbers + 4)
    # Time 0 adds none.
    adds = live & (at > 0)
    drawn = tl.load(noise + row * stride_noise + (steps - at) * D + column, mask=adds, other=0.0)
    x = mean + tl.where(adds, spread * drawn, 0.0)
    tl.store(state + place, x, mask=live)
    tl.store(states + place, x.to(states.dtype.element_ty), mask=live)
    if guidance is not None:
        tl.store(states + rows * D + place, x.to(states.dtype.element_ty), mask=live)
