"""One pass over weight, gradient, both moments, average and 16-bit copy: 38 bytes an element.

torch's fused AdamW, the moving average and the casts of the next step read and write 50.
"""

import triton
import triton.language as tl

# Elements of a program: the fastest of 8 launches on an H200, with 8 warps.
CHUNK = tl.constexpr(1024)

# Columns of ``table``: addresses of one parameter's tensors; 0 where there is no average or copy.
WEIGHT, GRADIENT, FIRST, SECOND, STEP, AVERAGE, COPY, SIZE, COLUMNS = map(tl.constexpr, range(9))


@triton.jit
def _pointer(address, KIND: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(KIND)), 16)


@triton.jit
def _update(
    entry, places, live, divisor, keeps, lr_decay, rate, root, beta1_rest, beta2, beta2_rest, eps, average_rest,
    LOW: tl.constexpr,
):  # fmt: skip
    """The elements at ``places`` of the parameter at ``entry``; ``live`` is None where all of them exist."""
    weight = _pointer(tl.load(entry + WEIGHT), tl.float32)
    first = _pointer(tl.load(entry + FIRST), tl.float32)
    second = _pointer(tl.load(entry + SECOND), tl.float32)
    w = tl.load(weight + places, mask=live)
    g = tl.load(_pointer(tl.load(entry + GRADIENT), tl.float32) + places, mask=live)
    if divisor is not None:
        g /= tl.load(divisor)
    m = tl.load(first + places, mask=live)
    v = tl.load(second + places, mask=live)
    # Selected, not branched: copies are written in any case.
    m = tl.where(keeps, m, m + beta1_rest * (g - m))
    v = tl.where(keeps, v, beta2 * v + beta2_rest * g * g)
    stepped = w - lr_decay * w
    w = tl.where(keeps, w, stepped - rate * m / (tl.sqrt(v) / root + eps))
    tl.store(weight + places, w, mask=live)
    tl.store(first + places, m, mask=live)
    tl.store(second + places, v, mask=live)
    average = tl.load(entry + AVERAGE)
    if average != 0:
        mean = _pointer(average, tl.float32)
        a = tl.load(mean + places, mask=live)
        tl.store(mean + places, tl.where(keeps, a, a + average_rest * (w - a)), mask=live)
    if LOW is not None:
        copy = tl.load(entry + COPY)
        if copy != 0:
            tl.store(_pointer(copy, LOW) + places, w.to(LOW), mask=live)


@triton.jit(do_not_specialize=["lr", "lr_decay", "beta1_rest", "beta2", "beta2_rest", "eps", "average_rest"])
def adamw_kernel(
    table,  # [T, COLUMNS] int64
    chunks,  # [programs, 2] int32: parameter, number of the chunk in it
    divisor,  # [1] float32 or None: gradients are divided by it
    finite,  # [1] float32: 0 if a gradient is not finite; then weights, moments and averages stay
    lr,
    lr_decay,  # lr * weight decay
    beta1_rest,  # 1 - beta1
    beta2,
    beta2_rest,
    log2_beta1,
    log2_beta2,
    eps,
    average_rest,  # 1 - decay of the average
    LOW: tl.constexpr,  # dtype of the copies; None where there are none
):
    """The arithmetic is torch's AdamW's (decoupled weight decay), in float32; bias corrections are in float64."""
    program = tl.program_id(0)
    entry = table + tl.load(chunks + 2 * program) * COLUMNS
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.load(entry + SIZE)
    # In double precision: 1 - beta^step loses all digits of a beta close to 1.
    step = tl.load(_pointer(tl.load(entry + STEP), tl.float32)).to(tl.float64)
    rate = (lr / (1.0 - tl.exp2(step * log2_beta1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp2(step * log2_beta2)).to(tl.float32)
    keeps = tl.load(finite) == 0
    places = begin + tl.arange(0, CHUNK)
    # Without masks where all is there: they would keep the loads from being 16 bytes wide.
    if begin + CHUNK <= size:
        _update(
            entry, places, None, divisor, keeps, lr_decay, rate, root, beta1_rest, beta2, beta2_rest, eps,
            average_rest, LOW,
        )  # fmt: skip
    else:
        live = places < size
        _update(
            entry, places, live, divisor, keeps, lr_decay, rate, root, beta1_rest, beta2, beta2_rest, eps,
            average_rest, LOW,
        )  # fmt: skip
