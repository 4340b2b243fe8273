"""Calls the functions of the compiled core with tensors. Only `calls` and `block_calls` turn tensors into addresses.

The core cannot check the memory behind an address. So these modules check dtype, device, shape and strides of every
tensor once per call, and allocate every result. `csrc/core.cpp` compares the sizes that a packed weight states. If the
core cannot read the strides of a tensor that torch's own layer could read, the tensor is copied.

Each function raises TypeError for a tensor that is not float32 on a CPU (torch does not mix dtypes either), ValueError
for shapes that do not fit together and for an input that contains NaN, RuntimeError if a gradient would be lost, and
MemoryError. An input without rows gives an output without rows, as in torch.
"""

import ctypes

import torch
from torch import Tensor

from quest.kernels.cpu.core import abi, check, core
from quest.kernels.cpu.core.shapes import attended, convolved

Limits = tuple[float, float, float]  # scale, and lowest and highest code minus zero point
# The same, and what has scales of its own in a dynamic format. Then scale is the clip ratio, and zero points are 0.
Range = tuple[float, float, float, int]
DYNAMIC = {None: 0, "token": 1, "tensor": 2}  # by QuantSpec.rows; `Dynamic` in csrc/driver.h. Groups: their channels

STRUCTS = abi.structs()


# A small layer takes a few microseconds. So these are looked up once, and errors have functions of their own.
FLOAT32, CPU = torch.float32, torch.device("cpu")


def checked(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor if the core can read its values. name: the operation and its tensor, for errors."""
    if tensor.dtype is not FLOAT32 or not tensor.is_cpu or (tensor.requires_grad and torch.is_grad_enabled()):
        _refuse(tensor, name)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _refuse(tensor: Tensor, name: str) -> None:
    if tensor.dtype is FLOAT32 and tensor.is_cpu:
        raise RuntimeError(f"{name}: the integer kernel has no gradient; train on the reference kernel")
    raise TypeError(f"{name}: the integer kernel takes float32 on a CPU, not {tensor.dtype} on {tensor.device}")


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first value; None for None."""
    return None if tensor is None else tensor.data_ptr()


def packed(weight: Tensor, name: str) -> tuple[int, int]:
    """Return address and size of a packed weight."""
    if weight.dtype is not torch.uint8 or not weight.is_cpu or not weight.is_contiguous():
        raise TypeError(f"{name}: a packed weight is uint8 on a CPU, not {weight.dtype} on {weight.device}")
    return weight.data_ptr(), weight.numel()


def shaped(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    """Return the tensor without gaps if it has this shape; None for None."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise ValueError(f"{name}: its shape is {list(tensor.shape)}, not {list(shape)}")
    return checked(tensor, name).contiguous()


def _beside(residual: Tensor | None, out: Tensor, name: str) -> Tensor | None:
    """Return the residual in the memory layout of the output; None for None."""
    if residual is None:
        return None
    residual = checked(residual, name)
    if residual.shape != out.shape:
        raise ValueError(f"{name}: a residual of shape {list(residual.shape)} for an output of {list(out.shape)}")
    return residual if residual.stride() == out.stride() else torch.empty_like(out).copy_(residual)


def pack(codes: Tensor, zero_point: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """Pack codes [O, C] or [O, C, kh, kw] from 0 to 255, with one zero_point and scale or [O, ...], to uint8.

    group: how many channels share a scale, of the weight (then zero_point and scale have the shape of codes) or of its
    input; all if None. Returns [O, kh, kw, bytes]. Raises ValueError for other codes, none at all, zero points beyond
    16 bits, or groups that are no multiple of 16 channels.
    """
    outputs, channels, kh, kw = (*codes.shape, 1, 1)[:4]
    if not codes.numel() or not all(t.is_cpu for t in (codes, zero_point, scale)):
        raise ValueError(f"pack: codes of shape {list(codes.shape)} on {codes.device}; it takes some, on a CPU")
    low, high = codes.aminmax()
    if not 0 <= low <= high <= 255 or not zero_point.abs().max() <= 32767:
        raise ValueError("pack: it takes codes from 0 to 255, with zero points that fit into 16 bits")
    shape, bits = (outputs, channels, kh, kw), 4 if high <= 15 else 8
    group = min(group or channels, channels)
    of_groups = [t[:, ::group] if t.shape == codes.shape else t.flatten()[:, None] for t in (scale, zero_point)]
    of_groups = [t.reshape(len(t), -1).expand(outputs, -(-channels // group)) for t in of_groups]
    codes = codes.to(torch.uint8).contiguous()
    scale, zero_point = of_groups[0].float().contiguous(), of_groups[1].to(torch.int32).contiguous()
    size = core().quest_packed_bytes(*shape, bits, group)
    packed = torch.empty((outputs, kh, kw, -(-size // (outputs * kh * kw))), dtype=torch.uint8, device="cpu")
    status = core().quest_pack(
        codes.data_ptr(), zero_point.data_ptr(), scale.data_ptr(), *shape, bits, group, packed.data_ptr(),
        packed.numel(),
    )  # fmt: skip
    check(status, "pack")
    return packed


def unpack(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` packed, uint8 of this shape."""
    codes = torch.empty(shape, dtype=torch.uint8, device="cpu")
    check(core().quest_unpack(*packed(weight, "unpack"), *(*shape, 1, 1)[:4], codes.data_ptr()), "unpack")
    return codes


def range_of(scale, zero_point, qmin: int, qmax: int, dynamic: int = 0) -> Range:
    """Return the range of a format, whose scale and zero point are tensors or numbers."""
    z = float(zero_point)
    return float(scale), qmin - z, qmax - z, dynamic


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    gated: bool,
    residual: Tensor | None,
    dynamic: int = 0,
) -> Tensor:
    """x [..., K], weight the result of `pack`, bias [N] -> [..., N]; gated: [..., N / 2], see `integer.linear`.

    Dimension 0 of x counts samples. scale to dynamic: the range of x, see `range_of`.
    """
    x = checked(x, "linear")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"linear: an input of shape {list(x.shape)} has no channels")
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    outputs = weight.shape[0]
    width = outputs // 2 if gated else outputs
    bias = shaped(bias, (outputs,), "linear, bias")
    out = x.new_empty((*x.shape[:-1], width))
    residual = _beside(residual, out, "linear, residual")
    status = core().quest_linear(
        rows.data_ptr(), *rows.shape, rows.stride(0), *packed(weight, "linear"), address(bias),
        *range_of(scale, zero_point, qmin, qmax, dynamic), len(rows) // len(x) if x.ndim > 1 and len(rows) else 1,
        gated, address(residual), out.data_ptr(), width, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "linear", x=x)
    return out


def conv2d(
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
    residual: Tensor | None,
    dynamic: int = 0,
) -> Tensor:
    """x [N, C, H, W] or [C, H, W], weight the result of `pack`, bias [O] -> [N, O, H', W'], channels innermost.

    With dynamic scales, x has four dimensions.
    """
    x = checked(x, "conv2d")
    if x.ndim != 4:
        if x.ndim != 3 or dynamic:
            raise ValueError(f"conv2d: its shape is {list(x.shape)}; it takes [N, C, H, W] or [C, H, W]")
        more = None if residual is None else residual[None]
        return conv2d(x[None], weight, bias, scale, zero_point, qmin, qmax, stride, padding, dilation, more)[0]
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    sample, _, row, pixel = x.stride()
    shape = convolved(x, weight, stride, padding, dilation)
    bias = shaped(bias, (shape[1],), "conv2d, bias")
    out = torch.empty(shape, dtype=FLOAT32, device=CPU, memory_format=torch.channels_last)
    residual = _beside(residual, out, "conv2d, residual")
    status = core().quest_conv2d(
        x.data_ptr(), *x.shape, sample, row, pixel, *packed(weight, "conv2d"), address(bias),
        *range_of(scale, zero_point, qmin, qmax, dynamic), *stride, *padding, *dilation, address(residual),
        out.data_ptr(), *shape[1:], torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "conv2d", x=x)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: list[Tensor],
    zero_points: list[Tensor],
    limits: list[int],
    dynamic: list[int],
    scale: float,
) -> Tensor:
    """q [B, heads, n, d], k and v [B, heads, m, d] -> [B, heads, n, d]; all also without `heads`.

    scales, zero_points: of q, k, v and the probabilities. limits: their qmin and qmax, one after another. dynamic: what
    has scales of its own in each, see `Range`. scale: the factor of the scores.
    """
    ranges = map(range_of, scales, zero_points, limits[::2], limits[1::2], dynamic)
    q, k, v = checked(q, "attention, q"), checked(k, "attention, k"), checked(v, "attention, v")
    attended(q, k, v)
    q4, k4, v4 = (t if t.ndim == 4 else t[:, None] for t in (q, k, v))
    q4, k4, v4 = (t if t.stride(3) == 1 else t.contiguous() for t in (q4, k4, v4))
    batch, heads, n, d = q4.shape
    out = q.new_empty((batch, n, heads, d)).transpose(1, 2)
    strides = [s for t in (q4, k4, v4, out) for s in t.stride()[:3]]
    status = core().quest_attention(
        q4.data_ptr(), k4.data_ptr(), v4.data_ptr(), (ctypes.c_int64 * 12)(*strides), batch, heads, n, k4.shape[2], d,
        (STRUCTS["Range"] * 4)(*ranges), scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "attention", q=q, k=k, v=v)
    return out if q.ndim == 4 else out[:, 0]


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    modulation: Tensor | None = None,
) -> Tensor:
    """Compute the group norm of x [N, C, H, W] or [N, C, L], then SiLU if `silu`. Channels of the result lie innermost.

    shift [N, C] is added to x before. modulation [N, 2 C] contains f and o; after the norm, y becomes y * (1 + f) + o.
    """
    x = checked(x, "group norm")
    if x.ndim not in (3, 4) or 0 in x.shape[2:]:
        raise ValueError(f"group norm: its shape is {list(x.shape)}; it takes [N, C, L] or [N, C, H, W] with pixels")
    samples, channels, *size = x.shape
    rows = x[..., None] if x.ndim == 3 else x  # [N, C, H, W]
    if rows.stride(1) != 1 or (rows.shape[2] > 1 and rows.stride(2) != rows.shape[3] * _pixel(rows)):
        rows = rows.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    y = x.new_empty((samples, *size, channels))
    weight, bias = shaped(weight, (channels,), "group norm, weight"), shaped(bias, (channels,), "group norm, bias")
    shift = shaped(shift, (samples, channels), "group norm, shift")
    modulation = shaped(modulation, (samples, 2 * channels), "group norm, modulation")
    status = core().quest_group_norm(
        rows.data_ptr(), rows.stride(0), _pixel(rows), samples, rows.shape[2] * rows.shape[3], channels, groups, eps,
        address(weight), address(bias), address(shift), address(modulation), silu, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check(status, "group norm", x=x)
    return y.movedim(-1, 1)


def _pixel(x: Tensor) -> int:
    """Return the stride from one pixel of [N, C, H, W] to the next. A side of one pixel has an arbitrary stride."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.shape[1]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute the layer norm over the last dimension of x."""
    x = checked(x, "layer norm").contiguous()
    shape = x.shape[-1:]
    if not x.ndim:
        raise ValueError("layer norm: a number has no dimension to normalize")
    weight, bias = shaped(weight, shape, "layer norm, weight"), shaped(bias, shape, "layer norm, bias")
    y = x.new_empty(x.shape)
    rows = x.numel() // shape[0] if x.numel() else 0
    status = core().quest_layer_norm(
        x.data_ptr(), rows, shape[0], eps, address(weight), address(bias), y.data_ptr(), torch.get_num_threads()
    )
    check(status, "layer norm")
    return y


def dense(x: Tensor) -> Tensor:
    """Return x, or a copy if there are gaps between its values or values that share memory."""
    x, twin = checked(x, "fake quantization"), torch.empty_like(x)
    return x if x.stride() == twin.stride() else twin.copy_(x)


def fake_quantize(x: Tensor, limits: Limits) -> Tensor:
    """Return scale * clamp(round(x / scale), low, high) for a `dense` x, in the layout of x."""
    out = torch.empty_like(x)
    check(
        core().quest_fake_quantize(x.data_ptr(), x.numel(), *limits, out.data_ptr(), torch.get_num_threads()),
        "fake quantization",
    )
    return out


def fake_quantize_backward(x: Tensor, grad: Tensor, limits: Limits) -> tuple[Tensor, float]:
    """Return the gradients of a `dense` x and of the scale. grad: that of the result, in the shape of x."""
    out = torch.empty_like(x)
    grad = _beside(grad, out, "fake quantization, gradient")
    of_scale = ctypes.c_double()
    status = core().quest_fake_quantize_backward(
        x.data_ptr(), grad.data_ptr(), x.numel(), *limits, out.data_ptr(), ctypes.byref(of_scale),
        torch.get_num_threads(),
    )  # fmt: skip
    check(status, "fake quantization, gradient")
    return out, of_scale.value
