"""The kernel for CUDA GPUs: the functions of `reference`, computed on integers by Triton programs.

Tensor cores multiply codes minus zero points and sum them in 32 bits, exactly. Scale and bias are applied to the sum.
Two 4-bit weights share a byte. They become signed bytes in registers, because tensor cores after Ampere's take no
4-bit operands. Inputs may also be float16 or bfloat16. Their codes are those of the same values in float32, and the
result has their dtype. A NaN in the input gives NaN in the output at the same places as in the reference.

Scales of a dynamic format, those of a sample or of a token, are computed by torch's own operations before the codes.
A convolution of several taps adds these in float32, since each pixel has a scale.

Scales and zero points stay on the device, and the host never waits for it. So calls can be captured in a CUDA graph,
after a first call of each shape, which times a few tilings. They do not change results, see `programs`.

With the environment variable TRITON_INTERPRET=1, set before triton is imported, the programs run slowly on a CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quest.affine import QParams, QTensor, QuantSpec, measured
from quest.kernels.cpu import integer
from quest.kernels.cpu.core.shapes import attended, convolved
from quest.kernels.torch_ops import fake_attention, fake_conv2d, flat, register, run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEADER = 16  # bytes
LONGEST = 2**17 - 1  # products in a sum: codes minus 128 are also summed in float32, which is exact below 2^24
# A linear layer with at most this many outputs quantizes its input while it multiplies. Every tile of outputs then
# quantizes again, so with many outputs a separate pass before is faster. This number is an estimate, not measured.
FUSED_OUTPUTS = 512


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why this kernel cannot run on a device; None if it can. dtype: that of scales and weights."""
    if device.type not in ("cuda", "cpu"):
        return f"it computes on a CUDA GPU, not on {device.type}"
    if dtype != torch.float32:
        return f"its weights and scales are quantized in float32, not in {dtype}"
    try:
        from quest.kernels.triton import programs
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    if device.type == "cpu":
        return None if programs.INTERPRETED else "it computes on a CUDA GPU, not on cpu"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or above, not {capability[0]}.{capability[1]}"
    return None


def supports(weight: QTensor, weight_spec: QuantSpec, input: QParams, **conv) -> str | None:
    """Return why this kernel cannot compute a layer exactly; None if it can.

    It computes what the `integer` kernel computes, except signed inputs, groups and very long sums.
    weight: the codes. input: scale and zero point of all time groups. conv: the keywords of `conv2d`; none for a linear
    layer. Zero points may lie outside the codes, because padding is the exact zero here and needs no code.
    """
    if weight.codes[0].numel() > LONGEST:
        return f"sums of {weight.codes[0].numel()} products, more than {LONGEST}"
    reason = _refused(weight=weight_spec, input=input.spec)
    return reason or integer.supports(weight, weight_spec, input, **conv)


def supports_attention(q: QParams, k: QParams, v: QParams, p: QParams) -> str | None:
    """Return why this kernel cannot compute the products of an attention exactly; None if it can.

    Each argument has the scales and zero points of all time groups.
    """
    return _refused(q=q.spec, k=k.spec, v=v.spec, p=p.spec) or integer.supports_attention(q, k, v, p)


def _refused(**specs: QuantSpec) -> str | None:
    """Return why formats are refused that the `integer` kernel takes; None if they are not.

    Signed bytes hold codes minus 128, which signed codes would exceed.
    """
    for name, spec in specs.items():
        if spec.group is not None:
            return f"{name}: scales {spec.granularity}"
        if spec.symmetric:
            return f"{name}: signed codes"
    return None


def _width(channels: int) -> int:
    """Round the number of channels up to whole vectors of the tensor cores. Added channels contribute nothing."""
    return -(-channels // 32) * 32


def pack(weight: QTensor, group: int | None = None) -> Tensor:
    """Pack codes, scales and zero points in the order in which they are read: [O, kh, kw, bytes], 1 x 1 if linear.

    8-bit codes are int8, minus 128. Codes of at most 4 bits are uint8: the first half of the (padded) channels in the
    low half bytes, the second half in the high ones. 16 bytes follow the codes of each tap:

        int32     sum of the tap's codes minus zero point
        float32   scale
        int32     zero point minus 128, or minus 8 for half bytes
        int32     sum of codes minus zero point over all taps
    """
    codes, scale, zero_point = (t.detach() for t in (weight.codes, weight.scale, weight.zero_point))
    outputs, channels = codes.shape[:2]
    codes = codes.reshape(*codes.shape, *(1,) * (4 - codes.ndim)).permute(0, 2, 3, 1).to(torch.int32)
    scale = scale.flatten().float().expand(outputs)
    zero_point = zero_point.flatten().to(torch.int32).expand(outputs)
    nibbles = bool(codes.max() <= 15)
    shift = 8 if nibbles else 128
    sums = (codes - zero_point[:, None, None, None]).sum(-1, dtype=torch.int32)  # [O, kh, kw]
    per_output = (scale.view(torch.int32), zero_point - shift, sums.sum((1, 2), dtype=torch.int32))
    header = torch.stack([sums, *(t[:, None, None].expand_as(sums) for t in per_output)], dim=-1)
    codes = F.pad(codes, (0, _width(channels) - channels), value=shift)
    if nibbles:
        low, high = codes.chunk(2, dim=-1)
        codes = (low | high << 4).to(torch.uint8)
    else:
        codes = (codes - shift).to(torch.int8)
    return torch.cat([codes, header.view(codes.dtype)], dim=-1)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` packed, float32 of the weight's shape."""
    channels, codes = shape[1], packed[..., :-HEADER]
    if packed.dtype == torch.uint8:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    else:
        codes = codes.float() + 128
    return codes[..., :channels].permute(0, 3, 1, 2).reshape(shape).contiguous()


def _of_rows(x: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static format, or [rows] each of a dynamic one, whose axis is that of a row of x."""
    scale, zero_point, spec = qparams
    if not spec.dynamic:
        return scale, zero_point
    rows = x.movedim(spec.axis, -1).shape[:-1]
    found = measured(x.float(), qparams)[:2]
    return tuple(t.movedim(spec.axis, -1).expand(*rows, 1).reshape(-1).contiguous() for t in found)


def linear(x: Tensor, qparams: QParams, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight the result of `pack` -> [..., N], in the dtype of x."""
    spec = qparams.spec
    values = *_of_rows(x, qparams), spec.qmin, spec.qmax, spec.dynamic
    return run(_linear, "triton_linear", x, weight, bias, *values)


def conv2d(x: Tensor, qparams: QParams, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups):
    """x [N, C, H, W] -> [N, O, H', W'], channels innermost. Padding is zero, after quantization; groups must be 1."""
    spec = qparams.spec
    values = *_of_rows(x, qparams), spec.qmin, spec.qmax, stride, padding, dilation, spec.dynamic
    return run(_conv2d, "triton_conv2d", x, weight, bias, *values)


def attention(q: Tensor, k: Tensor, v: Tensor, formats: Sequence[QParams], scale: float) -> Tensor:
    """q [B, heads, n, d], k and v [B, heads, m, d] -> [B, heads, n, d]; also without `heads`, then B counts heads.

    Tensors may have any strides. The normalized probabilities are quantized, as in the reference.
    """
    attended(q, k, v)
    *tensors, (p_scale, p_zero_point, _) = formats
    rows = map(_of_rows, (q, k, v), tensors)
    scales, zero_points = zip(*rows, (p_scale, p_zero_point), strict=True)
    dynamic = [format.spec.dynamic for format in formats]
    return run(_attention, "triton_attention", q, k, v, scales, zero_points, flat(formats)[2], dynamic, scale)


def _check(x: Tensor, name: str) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: the triton kernel takes float32, float16 or bfloat16, not {x.dtype}")
    if reason := unavailable(x.device):
        raise TypeError(f"{name}: the triton kernel is not available: {reason}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: the triton kernel has no gradient; train on the reference kernel")


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dynamic: bool
) -> tuple[Tensor, Tensor]:
    """x [A, B, C, D] -> codes minus 128, int8 [A * B * C, D rounded up to 32], and their sums, float32 [A * B * C].

    scale, zero_point: of all of x, or, if dynamic, [A * B * C] each.
    """
    from quest.kernels.triton.programs import INTERPRETED, quantize

    channels = x.shape[3]
    rows, width = x[..., 0].numel(), _width(channels)
    codes = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    sums = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = 64 if INTERPRETED else 16
    with torch.cuda.device_of(x):
        quantize[(-(-rows // block),)](
            x, scale, zero_point, codes, sums, rows, channels, width, *x.shape[1:3], *x.stride(), dynamic, qmin, qmax,
            block, 128, num_warps=4,
        )  # fmt: skip
    return codes, sums


def _multiply(
    x, sums, weight, bias, scale, zero_point, y, rows, channels, x_row, qmin, qmax, dynamic,
    size=(1, 1), out_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1),
):  # fmt: skip
    """Compute y [rows, outputs] from codes and their sums, or from floats if `sums` is None.

    scale, zero_point: of all of x, or, if dynamic, of each of its rows (in a convolution, its pixels).
    """
    from quest.kernels.triton.programs import multiply

    outputs, kh, kw, span = weight.shape
    bits = 4 if weight.dtype == torch.uint8 else 8
    depth = span - HEADER
    if depth != _width(channels) * bits // 8:
        raise ValueError(f"the input has {channels} channels; the weight was packed for another number")

    def grid(blocks):
        return (-(-rows // blocks["BLOCK_M"]) * -(-outputs // blocks["BLOCK_N"]),)

    padded = any(padding)
    pointwise = kh == kw == 1 and tuple(stride) == (1, 1) and not padded
    with torch.cuda.device_of(x):
        multiply[grid](
            x, sums, weight, weight.view(torch.int32), weight.view(torch.float32), bias, scale, zero_point, y, rows,
            outputs, channels, x_row, depth, span, *size, *out_size, *stride, *padding, *dilation, QMIN=qmin, QMAX=qmax,
            BITS=bits, KH=kh, KW=kw, FUSED=sums is None, POINTWISE=pointwise, PADDED=padded,
            OF_ROWS=dynamic and pointwise, OF_PIXELS=dynamic and not pointwise,
        )  # fmt: skip


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dynamic: bool,
) -> Tensor:
    _check(x, "linear")
    rows = x.reshape(-1, x.shape[-1])
    range_ = scale, zero_point, qmin, qmax, dynamic
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    if weight.shape[0] <= FUSED_OUTPUTS:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        operand, sums, row = rows, None, rows.stride(0)
    else:
        operand, sums = _quantize(rows[None, None], *range_)
        row = operand.shape[1]
    _multiply(operand, sums, weight, bias, scale, zero_point, y, *rows.shape, row, qmin, qmax, dynamic)
    return y


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dynamic: bool,
) -> Tensor:
    _check(x, "conv2d")
    shape = convolved(x, weight, stride, padding, dilation)
    # Every tap and every tile of outputs reads each pixel, so pixels are quantized once, in a pass before.
    codes, sums = _quantize(x.permute(0, 2, 3, 1), scale, zero_point, qmin, qmax, dynamic)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _multiply(
        codes, sums, weight, bias, scale, zero_point, y, y[:, 0].numel(), x.shape[1], codes.shape[1], qmin, qmax,
        dynamic, x.shape[2:], shape[2:], stride, padding, dilation,
    )  # fmt: skip
    return y


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: list[Tensor],
    zero_points: list[Tensor],
    limits: list[int],
    dynamic: list[bool],
    scale: float,
) -> Tensor:
    """scales, zero_points: of q, k, v and p, each of a whole tensor or, if dynamic, of its rows; p has a clip ratio."""
    from quest.kernels.triton.programs import INTERPRETED, attend

    _check(q, "attention")
    q4, k4, v4 = (t if t.ndim == 4 else t[:, None] for t in (q, k, v))
    batch, heads, n, d = q4.shape
    m = k4.shape[2]
    if m > LONGEST:
        raise ValueError(f"attention: {m} keys, more than the {LONGEST} whose sums are exact")
    operands = []
    for i, t in enumerate((q4, k4, v4.transpose(2, 3))):  # both products run along the innermost dimension
        operands += (
            _quantize(t, scales[i], zero_points[i], *limits[2 * i : 2 * i + 2], dynamic[i]),
            (scales[i], zero_points[i]),
        )
    out = torch.empty((batch, n, heads, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    block = 32 if INTERPRETED else 64
    with torch.cuda.device_of(q):
        attend[(-(-n // block) * batch * heads,)](
            *(t for pair in operands for t in pair), scales[3], zero_points[3], out, n, m, d, _width(d), _width(m),
            heads, *out.stride()[:3], scale, *dynamic, *limits[6:], block, block,
            max(32, 1 << (d - 1).bit_length()), num_warps=4,
        )  # fmt: skip
    return out if q.ndim == 4 else out[:, 0]


def _fake_linear(x, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register("triton_linear", _linear, _fake_linear)
register("triton_conv2d", _conv2d, fake_conv2d)
register("triton_attention", _attention, fake_attention)
