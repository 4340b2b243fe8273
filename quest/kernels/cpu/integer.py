"""The integer kernel for CPUs: the functions of `reference`, computed by the compiled core in `csrc`.

The core multiplies codes minus zero points and sums them in 32 bits, exactly, with every instruction set. Scale and
bias are applied to the sum. For a linear layer with 4-bit weights and 8-bit inputs:

    input codes 130 90, zero point 100    ->   30 -10
    weight codes 9 2, zero point 8        ->    1  -6
    sum 30 * 1 + (-10) * (-6) = 90;  output = 90 * input scale * weight scale + bias

Results differ from the reference's only by the rounding of its float sums, about 1e-7 of the largest output. In
attention, such a difference in a score can move a probability to the neighbouring code.

Scales of a dynamic format are computed from each row or sample before it is quantized. A sum over inputs of different
scales is not one sum of integers: groups of channels have a sum of integers each, and are added as floats. So has each
tap of a convolution whose pixels have scales of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quest.affine import FLOAT, QParams, QTensor, QuantSpec
from quest.kernels.cpu.core import calls, core
from quest.kernels.torch_ops import fake_attention, fake_conv2d, flat, register, run

LARGEST = 32767  # largest code minus zero point, in int16
SUM = 2**31 - 1  # largest sum, in int32


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why this kernel cannot run on a device in a dtype; None if it can."""
    if device.type != "cpu":
        return f"it computes on a CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"it computes in float32, not in {dtype}"
    try:
        core()
    except OSError as error:
        return str(error)
    return None


def supports(weight: QTensor, weight_spec: QuantSpec, input: QParams, **conv) -> str | None:
    """Return why this kernel cannot compute a layer exactly; None if it can.

    weight: the codes. input: scale and zero point of all time groups. conv: the keywords of `conv2d`; none for a linear
    layer. Zero points may lie outside the codes, because padding is the exact zero here and needs no code.
    """
    if conv and (conv["groups"] != 1 or isinstance(conv["padding"], str)):
        return "grouped convolution" if conv["groups"] != 1 else "padding given by name"
    if reason := _format(weight_spec, "weight") or _format(input.spec, "input"):
        return reason
    if reason := _rows(weight.shape[1], input.spec, 1 if conv else -1) or _groups(
        weight, weight_spec, input.spec, **conv
    ):
        return reason
    if weight_spec.axis not in (None, 0) or not weight.codes.numel():
        return "weight: one scale per input" if weight.codes.numel() else "weight: without values"
    centred = weight.codes - weight.zero_point
    if not torch.equal(centred, centred.round()):
        return "weight: zero points are no integers"
    reason = _too_large(weight.zero_point, weight_spec, "weight") or _too_large(input.zero_point, input.spec, "input")
    if reason := reason or _scales(input.scale, "input"):
        return reason
    total = centred.abs().flatten(1).sum(1, dtype=torch.float64).max().item()
    if total * _magnitude(input.zero_point, input.spec) > SUM:
        return "sums exceed 32 bits"
    return None


def supports_attention(q: QParams, k: QParams, v: QParams, p: QParams) -> str | None:
    """Return why this kernel cannot compute the products of an attention exactly; None if it can.

    Each argument has the scales and zero points of all time groups.
    """
    for name, qparams in zip("qkvp", (q, k, v, p), strict=True):
        if reason := _format(qparams.spec, name) or _too_large(qparams.zero_point, qparams.spec, name):
            return reason
        spec = qparams.spec
        if spec.dynamic and (spec.rows != "token" or spec.group or spec.axis != (-2 if name == "v" else -1)):
            return f"{name}: scales {spec.granularity}"
        if reason := _scales(qparams.scale, name):
            return reason
        if (codes := qparams.spec.qmax - qparams.spec.qmin + 1) > 256:  # "wide" ones of 8 bits
            return f"{name}: {codes} codes, more than a byte holds"
    for a, b in ((q, k), (p, v)):
        # The longest sum is over 4096 tokens (latents of 64 x 64); heads have fewer channels.
        if 4096 * _magnitude(a.zero_point, a.spec) * _magnitude(b.zero_point, b.spec) > SUM:
            return "sums exceed 32 bits"
    return None


def _format(spec: QuantSpec, what: str) -> str | None:
    if spec.bits == FLOAT:
        return f"{what} in float"
    if spec.table is not None:
        return f"{what}: codes of {spec.table}"
    if spec.symmetric and what == "weight":
        return "weight: signed codes"  # codes are packed without a sign; activations are not packed
    if spec.bits > 8:
        return f"{what}: {spec.bits} bits, more than 8"
    if spec.shifts:
        return f"{what}: channels shifted by up to {spec.shifts} bits"
    if what != "weight" and spec.group is not None and not spec.dynamic:
        return f"{what}: static scales in groups of {spec.group}"
    if what != "weight" and spec.axis is not None and not spec.dynamic:
        return f"{what}: one scale per channel, which lies on the axis that is summed"
    return None


def _rows(channels: int, spec: QuantSpec, axis: int) -> str | None:
    """Return why scales of rows cannot be factors of sums of integers; None if they can, and for a static format."""
    divided = spec.scales(channels) > 1 and (spec.rows == "tensor" or spec.group % 16)
    if spec.dynamic and (spec.block_scale is not None or divided or spec.axis != axis):
        return f"input: scales {spec.granularity}"
    return None


def _groups(weight: QTensor, spec: QuantSpec, input: QuantSpec, **conv) -> str | None:
    """Return why groups of a weight cannot have sums of their own; None if they can, and without groups."""
    channels = weight.shape[1]
    if spec.scales(channels) == 1:
        return None
    if conv or spec.group % 16:
        return f"weight: scales in groups of {spec.group}"
    if input.scales(channels) > 1 and input.group != spec.group:
        return f"weight: scales in groups of {spec.group}, but those of the input in groups of {input.group}"
    return "input: more codes than a byte holds, with groups" if input.qmax - input.qmin > 255 else None


def _scales(scale: Tensor, what: str) -> str | None:
    usable = (scale >= torch.finfo(torch.float32).tiny) & scale.isfinite()
    return None if usable.all() else f"{what}: scales are not positive"


def _too_large(zero_point: Tensor, spec: QuantSpec, what: str) -> str | None:
    if not zero_point.isfinite().all():
        return f"{what}: not calibrated"
    if not torch.equal(zero_point, zero_point.round()):
        return f"{what}: zero points are no integers"
    if _magnitude(zero_point, spec) > LARGEST:
        return f"{what}: zero point {zero_point.abs().max().item():.0f} exceeds 16 bits"
    return None


def _magnitude(zero_point: Tensor, spec: QuantSpec) -> float:
    """Return the largest |code - zero point|."""
    return max((spec.qmax - zero_point).abs().max().item(), (spec.qmin - zero_point).abs().max().item())


def pack(weight: QTensor, group: int | None = None) -> Tensor:
    """Pack codes, scales and zero points in the order in which the core reads them: uint8 [O, kh, kw, bytes].

    kh and kw are 1 for a linear layer. Codes of at most 4 bits take half a byte. group: how many input channels share a
    scale, of the weight or of the input; each group takes 12 bytes more for each output.
    """
    codes, scale, zero_point = (t.detach() for t in (weight.codes, weight.scale, weight.zero_point))
    return calls.pack(codes, zero_point, scale, group)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` packed, float32 of the weight's shape, on the device of `packed`."""
    return calls.unpack(packed.cpu(), shape).to(packed.device).float()


def linear(
    x: Tensor,
    qparams: QParams,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K], weight the result of `pack` -> [..., N], float32.

    gated: return [..., N / 2], the first half of the outputs times gelu of the second half. residual [..., N] is added
    to the result; a gated layer takes none.
    """
    scale, zero_point, spec = qparams
    values = scale, zero_point, spec.qmin, spec.qmax, gated, residual, dynamic(spec, x.shape[-1] if x.ndim else 1)
    return run(calls.linear, "integer_linear", x, weight, bias, *values)


def conv2d(
    x: Tensor,
    qparams: QParams,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """x [N, C, H, W] -> [N, O, H', W'] with channels innermost. Padding is zero, after quantization. groups must be 1.

    residual [N, O, H', W'] is added to the result.
    """
    scale, zero_point, spec = qparams
    scales = dynamic(spec, x.shape[1] if x.ndim == 4 else 1)
    values = scale, zero_point, spec.qmin, spec.qmax, stride, padding, dilation, residual, scales
    return run(calls.conv2d, "integer_conv2d", x, weight, bias, *values)


def attention(q: Tensor, k: Tensor, v: Tensor, formats: Sequence[QParams], scale: float) -> Tensor:
    """q [B, heads, n, d], k and v [B, heads, m, d] -> [B, heads, n, d]; also without `heads`, then B counts heads.

    Rows may have any strides. The normalized probabilities are quantized, as in the reference.
    """
    rows = [calls.DYNAMIC[spec.rows] for *_, spec in formats]
    return run(calls.attention, "integer_attention", q, k, v, *flat(formats), rows, scale)


def computes(x: Tensor) -> bool:
    """Return whether the compiled core can compute with this tensor."""
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def on_integers(*layers: nn.Module) -> bool:
    """Return whether all these layers run on this kernel and do nothing before or after it."""
    # The class must have `kernel_name`, because a wrapper around a layer may pass on the attributes of the layer.
    at_home = (m for m in layers if hasattr(type(m), "kernel_name") and m.kernel_name == "integer")
    return sum(m.output_quantizer is m.prologue is m.branch is None for m in at_home) == len(layers)


def bare(*modules: nn.Module) -> bool:
    """Return whether a call of these modules runs only the forward of their class: no hook, no replaced forward."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)


def fuses(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a layer can compute further work in the same pass over x: `gated`, `residual`."""
    return on_integers(layer) and bare(layer) and computes(x)


def plus(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return layer(x) + residual, in one pass if the layer runs on integers."""
    return layer(x, residual=residual) if fuses(layer, x) else layer(x) + residual


def dynamic(spec: QuantSpec, channels: int) -> int:
    """Return what has scales of its own in an input of so many channels, as the core reads it (`calls.Range`)."""
    return spec.group if spec.dynamic and spec.scales(channels) > 1 else calls.DYNAMIC[spec.rows]


def _fake_linear(x, weight, bias, scale, zero_point, qmin, qmax, gated, residual, dynamic=0):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0]))


register("integer_linear", calls.linear, _fake_linear)
register("integer_conv2d", calls.conv2d, fake_conv2d)
register("integer_attention", calls.attention, fake_attention)
