"""The Triton programs of `quest.kernels.triton.kernel`. Importing this module needs the package triton.

Tensor cores multiply signed bytes, but 8-bit codes are unsigned. So 128 is subtracted from activation codes, and 128
(or 8, of half bytes) from weight codes. Let a and w be such codes, and z_a and z_w their zero points minus the same:

    sum (a - z_a)(w - z_w) = sum a w  -  z_w sum a  -  z_a sum (w - z_w)

Every term is an integer modulo 2^32, and `supports` ensures that their total is below 2^31. So results are exact even
for zero points outside the codes. Sums of a are kept in float32, because there a NaN of the input survives; they are
exact below 2^24.

With TRITON_INTERPRET=1, set before triton is imported, these programs run on a CPU.
"""

import os

import triton
import triton.language as tl

from quest.affine import TINY

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# 1.5 * 2^23. float32 has no fractions at this size, so adding it rounds to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)
LEAST = tl.constexpr(TINY)  # scale of a dynamic format


def _tiling(rows: int, outputs: int, depth: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": outputs, "BLOCK_K": depth}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# Integer sums do not depend on the tiling. So results are the same whichever tiling is the fastest.
TILINGS = [
    _tiling(128, 128, 128, 8, 3),
    _tiling(128, 64, 128, 4, 3),
    _tiling(64, 128, 64, 4, 4),
    _tiling(64, 64, 128, 4, 4),
    _tiling(16, 64, 128, 4, 4),  # for time embeddings, which have one row per image
]
if INTERPRETED:
    TILINGS = [_tiling(32, 32, 32, 1, 1)]


@triton.jit
def encode(x, scale, zero_point, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Return codes of x minus 128, as float32. NaN stays NaN."""
    v = tl.div_rn(x.to(tl.float32), scale)  # `/` would be an approximate division
    v = tl.maximum(v, QMIN - zero_point, propagate_nan=tl.PropagateNan.ALL)
    v = tl.minimum(v, QMAX - zero_point, propagate_nan=tl.PropagateNan.ALL)
    # Values are clamped between integers first. The code is the same, and small enough for the addition to round.
    return ((v + ROUND) - ROUND) + (zero_point - 128.0)


@triton.jit
def parameters(scale, zero_point, row, inside, OF_ROWS: tl.constexpr):
    """Return scales and zero points of these rows, in the shape of `row`; scalars where all rows have the same."""
    if OF_ROWS:
        s = tl.load(scale + row, mask=inside, other=1.0)
        z = tl.load(zero_point + row, mask=inside, other=0.0)
    else:
        s, z = tl.load(scale), tl.load(zero_point)
    return s.to(tl.float32), z.to(tl.float32)


@triton.jit
def integers(sums):
    return tl.where(sums == sums, sums, 0.0).to(tl.int32)


@triton.jit
def quantize(
    x, scale, zero_point, codes, sums, rows, channels, width, size_1, size_2, stride_0, stride_1, stride_2, stride_3,
    OF_ROWS: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [size_0, size_1, size_2, channels] of any strides -> codes minus 128, int8 [rows, width]; sums, float32 [rows].

    rows is size_0 * size_1 * size_2. Codes after the last channel are 0. OF_ROWS: each row has a scale.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    s, z = parameters(scale, zero_point, row[:, None], (row < rows)[:, None], OF_ROWS)
    first = row // (size_1 * size_2) * stride_0 + row // size_2 % size_1 * stride_1 + row % size_2 * stride_2
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, width, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        value = tl.load(x + first[:, None] + c.to(tl.int64)[None, :] * stride_3, mask=inside, other=0.0)
        code = tl.where(inside, encode(value, s, z, QMIN, QMAX), 0.0)
        total += tl.sum(code, 1)
        target = codes + row[:, None] * width + c[None, :]
        tl.store(target, code.to(tl.int8), mask=(row < rows)[:, None] & (c < width)[None, :])
    tl.store(sums + row, total, mask=row < rows)


@triton.autotune(configs=TILINGS, key=["rows", "outputs", "depth", "KH", "KW", "OF_PIXELS"])
@triton.jit
def multiply(
    x, sums, weight, weight_int, weight_float, bias, scale, zero_point, y, rows, outputs, channels, x_row, depth, span,
    height, width, out_height, out_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BITS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    FUSED: tl.constexpr, POINTWISE: tl.constexpr, PADDED: tl.constexpr, OF_ROWS: tl.constexpr, OF_PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute a convolution over pixels whose channels lie innermost, or a linear layer: y [rows, outputs].

    x: codes [pixels, x_row] and their sums [pixels], from `quantize`; if FUSED, floats [rows, x_row], quantized here.
    weight: the result of `pack`, `span` bytes for each tap, of which `depth` are codes (BITS 4: the first half of the
    channels in the low half bytes, the second in the high ones). POINTWISE: row m of y belongs to pixel m. PADDED: some
    taps can lie outside of the image. OF_ROWS: each row of y has a scale. OF_PIXELS: each pixel of x has one.
    """
    TAPS: tl.constexpr = KH * KW
    tiles = tl.cdiv(outputs, BLOCK_N)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    s, z = parameters(scale, zero_point, m[:, None], (m < rows)[:, None], OF_ROWS)
    column = n.to(tl.int64) * (TAPS * span)
    known = n < outputs
    head = (column + depth) // 4
    if OF_PIXELS:  # others need it after the loop, which has no registers to spare
        zero_w = tl.load(weight_int + head + 2, mask=known, other=0)
    # A tap outside of the image reads the code of zero, or the nearest code if zero has none. Where rows have scales,
    # none is outside, and where pixels have, it does not count.
    zero = tl.load(zero_point).to(tl.float32)
    outside = (tl.minimum(tl.maximum(zero, QMIN), QMAX) - 128.0).to(tl.int8)

    image = m // (out_height * out_width) * (height * width)
    top = m // out_width % out_height * stride_y - padding_y
    left = m % out_width * stride_x - padding_x

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    blocks = tl.cdiv(depth, BLOCK_K)
    for step in range(0, TAPS * blocks):
        tap = step // blocks
        d = step % blocks * BLOCK_K + k
        w = tl.load(
            weight + column[None, :] + tap * span + d[:, None],
            mask=(n < outputs)[None, :] & (d < depth)[:, None],
            other=0 if BITS == 8 else 0x88,
        )
        if POINTWISE:
            inside = m < rows
            pixel = m
        else:
            py = top + tap // KW * dilation_y
            px = left + tap % KW * dilation_x
            inside = (m < rows) & (py >= 0) & (py < height) & (px >= 0) & (px < width)
            pixel = image + py * width + px
        a = x + pixel.to(tl.int64)[:, None] * x_row + d[None, :]
        if FUSED:
            there = inside[:, None] & ((d < depth) & (d < channels))[None, :]
            code = tl.where(there, encode(tl.load(a, mask=there, other=0.0), s, z, QMIN, QMAX), 0.0)
            total += tl.sum(code, 1)
            low = code.to(tl.int8)
        else:
            low = tl.load(a, mask=inside[:, None] & (d < depth)[None, :], other=outside)
        if BITS == 8:
            acc = tl.dot(low, w, acc, out_dtype=tl.int32)
        else:
            if FUSED:
                there = inside[:, None] & ((d < depth) & (d + depth < channels))[None, :]
                code = tl.where(there, encode(tl.load(a + depth, mask=there, other=0.0), s, z, QMIN, QMAX), 0.0)
                total += tl.sum(code, 1)
                high = code.to(tl.int8)
            else:
                high = tl.load(a + depth, mask=inside[:, None] & (d < depth)[None, :], other=outside)
            acc = tl.dot(low, (w & 15).to(tl.int8) - 8, acc, out_dtype=tl.int32)
            acc = tl.dot(high, (w >> 4).to(tl.int8) - 8, acc, out_dtype=tl.int32)
        if OF_PIXELS:
            if step % blocks == blocks - 1:  # the last of this tap
                tap_sum = tl.load(sums + pixel, mask=inside, other=0.0)
                zero_a = tl.load(zero_point + pixel, mask=inside, other=128.0).to(tl.int32) - 128
                tap_w = tl.load(weight_int + head + tap * (span // 4), mask=known, other=0)
                acc -= integers(tap_sum)[:, None] * zero_w[None, :] + zero_a[:, None] * tap_w[None, :]
                out += acc.to(tl.float32) * tl.load(scale + pixel, mask=inside, other=0.0)[:, None]
                total += tap_sum
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)

    if not FUSED and not OF_PIXELS:
        for tap in range(0, TAPS):
            if POINTWISE:
                total += tl.load(sums + m, mask=m < rows, other=0.0)
            else:
                py = top + tap // KW * dilation_y
                px = left + tap % KW * dilation_x
                inside = (m < rows) & (py >= 0) & (py < height) & (px >= 0) & (px < width)
                padding = outside.to(tl.float32) * channels
                total += tl.load(sums + image + py * width + px, mask=inside, other=padding)

    tap_scale = tl.load(weight_float + head + 1, mask=known, other=0.0)
    if OF_PIXELS:
        out *= tap_scale[None, :]
    else:
        zero_w = tl.load(weight_int + head + 2, mask=known, other=0)
        total_w = tl.load(weight_int + head + 3, mask=known, other=0)
        acc -= integers(total)[:, None] * zero_w[None, :] + (z.to(tl.int32) - 128) * total_w[None, :]
        if PADDED:
            beyond = zero.to(tl.int32) - 128 - outside.to(tl.int32)
            if beyond != 0:  # zero has no code: subtract what the taps outside of the image have added
                for tap in range(0, TAPS):
                    py = top + tap // KW * dilation_y
                    px = left + tap % KW * dilation_x
                    inside = (py >= 0) & (py < height) & (px >= 0) & (px < width)
                    tap_w = tl.load(weight_int + head + tap * (span // 4), mask=known, other=0)
                    acc += tl.where(inside, 0, beyond)[:, None] * tap_w[None, :]
        out = acc.to(tl.float32) * (s * tap_scale[None, :])
    if bias is not None:
        out += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    out = tl.where((total == total)[:, None], out, float("nan"))
    target = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=(m < rows)[:, None] & known[None, :])


@triton.jit
def scores(
    q, q_sums, k, k_sums, k_scale, k_zero, head, j, c, m, width, zero_q, of_q, scale, depth, OF_K: tl.constexpr
):  # fmt: skip
    """Return the scores of one tile, float32; -inf after the last key, NaN for keys of NaN. of_q: the scales of q."""
    there = (c < width)[:, None] & (j < m)[None, :]
    keys = tl.load(k + (head * m + j)[None, :] * width + c[:, None], mask=there, other=0)
    sums = tl.load(k_sums + head * m + j, mask=j < m, other=0.0)
    of_k, zero_k = parameters(k_scale, k_zero, (head * m + j)[None, :], (j < m)[None, :], OF_K)
    zero_k = zero_k.to(tl.int32) - 128
    product = tl.dot(q, keys, out_dtype=tl.int32)
    product += (depth * zero_q - q_sums[:, None]) * zero_k - zero_q * integers(sums)[None, :]
    score = tl.where((sums == sums)[None, :], product.to(tl.float32) * (of_q * of_k * scale), float("nan"))
    return tl.where((j < m)[None, :], score, float("-inf"))


@triton.jit
def attend(
    q, q_sums, q_scale, q_zero, k, k_sums, k_scale, k_zero, v, v_sums, v_scale, v_zero, p_scale, p_zero, y,
    n, m, depth, width, v_width, heads, y_batch, y_head, y_row, scale,
    OF_Q: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr, OF_P: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the attention of one block of queries of one head. QMIN and QMAX are those of the probabilities.

    q [B * heads, n, width], k [B * heads, m, width] and v [B * heads, depth, v_width] (keys innermost) are codes minus
    128 from `quantize`, with their sums. Scores are computed twice: first for the maximum and sum of each row, then for
    the codes of the normalized probabilities. The matrix of probabilities is never stored. OF_Q to OF_P: each row
    has a scale. For probabilities p_scale is the clip ratio then.
    """
    blocks = tl.cdiv(n, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)
    of_q, zero_q = parameters(q_scale, q_zero, (head * n + i)[:, None], (i < n)[:, None], OF_Q)
    zero_q = zero_q.to(tl.int32) - 128
    there = (i < n)[:, None] & (c < width)[None, :]
    queries = tl.load(q + (head * n + i)[:, None] * width + c[None, :], mask=there, other=0)
    sums = tl.load(q_sums + head * n + i, mask=i < n, other=0.0)
    whole = integers(sums)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        score = scores(
            queries, whole, k, k_sums, k_scale, k_zero, head, j, c, m, width, zero_q, of_q, scale, depth, OF_K
        )
        higher = tl.maximum(top, tl.max(score, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[:, None]), 1)  # NaN stays in it
        top = higher

    s, z = tl.load(p_scale).to(tl.float32), tl.load(p_zero).to(tl.float32)
    if OF_P:  # of a row whose largest probability is 1 / mass
        s, z = tl.maximum(s / mass / QMAX, LEAST)[:, None], 0.0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, m, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        score = scores(
            queries, whole, k, k_sums, k_scale, k_zero, head, j, c, m, width, zero_q, of_q, scale, depth, OF_K
        )
        probability = tl.exp(score - top[:, None]) / mass[:, None]
        code = tl.where((j < m)[None, :], encode(probability, s, z, QMIN, QMAX), 0.0)
        total += tl.sum(code, 1)
        there = (j < v_width)[:, None] & (c < depth)[None, :]
        values = tl.load(v + (head * depth + c)[None, :] * v_width + j[:, None], mask=there, other=0)
        acc = tl.dot(code.to(tl.int8), values, acc, out_dtype=tl.int32)

    v_total = tl.load(v_sums + head * depth + c, mask=c < depth, other=0.0)
    of_v, zero_v = parameters(v_scale, v_zero, (head * depth + c)[None, :], (c < depth)[None, :], OF_V)
    zero_v = zero_v.to(tl.int32) - 128
    zero_p = -128 if OF_P else z.to(tl.int32) - 128
    acc += m * zero_p * zero_v - integers(total)[:, None] * zero_v - zero_p * integers(v_total)[None, :]
    out = acc.to(tl.float32) * (s * of_v)
    finite = ((sums == sums) & (total == total))[:, None] & (v_total == v_total)[None, :]
    out = tl.where(finite, out, float("nan"))
    target = y + head // heads * y_batch + head % heads * y_head + i.to(tl.int64)[:, None] * y_row + c[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=(i < n)[:, None] & (c < depth)[None, :])
