"""Uniform affine quantization: x ~ scale * (code - zero_point) (QuEST, arXiv:2402.03666, equations 2-3).

`quantize(...).dequantize()` is what every quantizer of the suite means. `fake_quantize` computes the same values in one
fused autograd function (four passes over one buffer instead of an autograd node per operation); an integer kernel
multiplies the codes of the same `QTensor`. The three cannot disagree about rounding, clamping or the zero point.

A dynamic format takes scales and zero points from the tensor itself (`measured`), so both functions do that first.
A format of small floats has codes that are whole numbers too, but not all of them (`Table`): 4-bit E2M1 has 0, 1, 2, 3,
4, 6, 8, 12 and their negatives, which are its values times 2.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.affine.formats import FLOAT, QuantSpec, Table
from quest.affine.formats import ROWS as ROWS
from quest.kernels.cpu.core import available, calls

TINY = 1e-10  # least scale of a dynamic format, so that zeros stay zeros
E4M3 = 448.0  # the largest value of an 8-bit float with 4 bits of exponent


class QParams(NamedTuple):
    """What a kernel needs to quantize one tensor; scale and zero_point broadcast against it.

    Of a dynamic format, `scale` is the clip ratio: the share of the range of each row or group that codes reach. The
    kernel computes the scales from the tensor, see `measured`.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec


@dataclass(eq=False, slots=True)
class QTensor:
    """A quantized tensor: codes (whole numbers) with their scale and zero point, which broadcast against them.

    A weight of two output channels and three inputs, asymmetric, at 4 bits (codes 0 to 15):

        weight                 scale   zero point    codes          dequantize()
        [-0.30  0.00  0.45]    0.05        6         [0   6  15]    [-0.30  0.00  0.45]
        [-0.10  0.07  0.20]    0.02        5         [0   9  15]    [-0.10  0.08  0.20]

    code = clamp(round(weight / scale) + zero point, 0, 15); value = (code - zero point) * scale. The zero point is the
    code of 0.0. While something is learned, codes carry the straight-through gradient of `quantize`.

    It is not a tensor: torch functions refuse it (TypeError), and so does what would write into it or read it as floats
    (AttributeError). `dequantize` gives floats; `QuantLayer.thaw` makes a frozen weight a parameter again.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        return (self.codes - self.zero_point) * self.scale

    def equal(self, other: "QTensor") -> bool:
        """Whether codes, scale and zero point are the same, bit for bit."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in self.__slots__)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def numel(self) -> int:
        return self.codes.numel()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype  # of the values

    def __getattr__(self, name):
        raise AttributeError(_refused(name))

    data = property(lambda self: self.__getattr__("data"), lambda self, _: self.__getattr__("data"))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError(_refused(getattr(function, "__name__", str(function))))


def _refused(name: str) -> str:
    return (
        f"{name}: a QTensor holds codes, which cannot be changed or read as floats: take dequantize() to read a frozen "
        "weight; to change it, thaw() its layer first (fuse LoRA weights before quantizing)"
    )


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest, ties to even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def measured(x: Tensor, qparams: QParams) -> QParams:
    """Return the scales and zero points that a dynamic format takes from x; the parameters of a static one as given.

    They have a size of 1 where indices share a scale, and broadcast against x. The range of a row or group is widened
    to include zero and shrunk by the clip ratio. With symmetric codes of b bits the scale is max|x| / (2^(b-1) - 1), as
    in SmoothQuant's and QuaRot's code (arXiv:2211.10438, 2404.00456), but no code is below -(2^(b-1) - 1).

    Dimension 0 of x counts samples (in attention, the heads of all samples), which never share a scale: results do not
    depend on the batch. Gradients reach the clip ratio, and x through the ends of its range.
    """
    clip, _, spec = qparams
    if not spec.dynamic:
        return qparams
    axis = spec.axis % x.ndim
    size, groups = x.shape[axis], spec.scales(x.shape[axis])
    parts = x.unsqueeze(axis)
    if groups > 1:  # zeros that fill up the last group change no range, since each includes zero
        fill = [0, 0] * (x.ndim - 1 - axis) + [0, groups * spec.group - size]
        parts = F.pad(x, fill).unflatten(axis, (groups, spec.group))
    shared = [d for d in range(1, parts.ndim) if d != axis] if spec.rows == "tensor" else [axis + 1]
    low, high = (clip * end for end in (parts.amin(shared, True).clamp(max=0), parts.amax(shared, True).clamp(min=0)))
    if spec.symmetric:
        scale = _in_blocks(torch.maximum(-low, high), spec)
        zero_point = torch.zeros_like(scale)
    else:
        scale = _in_blocks(high - low, spec)
        zero_point = (-low / scale).detach().round()
    if groups > 1:
        expand = (t.squeeze(axis + 1).repeat_interleave(spec.group, axis) for t in (scale, zero_point))
        return QParams(*(t.narrow(axis, 0, size) for t in expand), spec)
    return QParams(scale.squeeze(axis), zero_point.squeeze(axis), spec)


def _in_blocks(reach: Tensor, spec: QuantSpec) -> Tensor:
    """Return the scales with which the largest code is `reach`, rounded to the format of block scales.

    Where a scale rounds to zero, the values of its group must become zeros, as those of NVFP4 do. They do so with the
    largest scale of all, which is returned there.
    """
    scale = (reach / spec.qmax).clamp(min=TINY)
    if spec.block_scale is None:
        return scale
    one = 2 ** Table.named(spec.table).mantissa if spec.table else 1  # the code of 1.0
    if spec.block_scale == "e4m3":
        unit = scale * one
        factor = (unit.amax(list(range(1, unit.ndim)), True) / E4M3).clamp(min=TINY)
        rounded = factor * (unit / factor).clamp(max=E4M3).to(torch.float8_e4m3fn).to(unit.dtype)
        return torch.where(rounded > 0, rounded, factor * E4M3) / one
    # Exact exponents: reach = m 2^e with m from 1/2 on.
    mantissa, exponent = reach.clamp(min=TINY * spec.qmax).frexp()
    top, top_exponent = torch.frexp(reach.new_tensor(spec.qmax / one))
    up = mantissa > top if spec.block_scale == "e8m0-up" else 0
    scale = torch.ldexp(torch.ones_like(reach), exponent - top_exponent + up) / one
    return torch.where(reach.isfinite(), scale, reach)  # those have no exponent, and must not look like numbers


def in_groups(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of the groups of a weight [O, C, ...], [O, groups, ...] each, from whole ranges.

    Factors of `block_scale` are of the whole weight.
    """
    own = QuantSpec(**spec.fields | {"rows": "token", "axis": 2})
    found = measured(weight[None], QParams(weight.new_ones(()), weight.new_zeros(()), own))
    shape = (1, *weight.shape)
    return tuple(t.expand(shape)[0, :, :: spec.group] if spec.group < shape[2] else t[0] for t in found[:2])


def quantize(x: Tensor, qparams: QParams) -> QTensor:
    """Codes of x; x itself where the spec is float.

    Differentiable by the straight-through estimator; no gradient where a value is clipped.

    A value that rounds to the first or last code without being clipped keeps its gradient. torch.clamp gave it one in
    torch 1 (which the released QuEST runs on) and gives it none in recent versions, so the rule is written out here.
    """
    scale, zero_point, spec = measured(x, qparams)
    if spec.bits == FLOAT:
        return QTensor(x, scale, zero_point)
    if spec.table is not None:
        exact = x / scale + zero_point
        nearest = Table.named(spec.table).nearest(exact.detach(), spec.symmetric)
        inside = (exact >= spec.qmin) & (exact <= spec.qmax)
        return QTensor(torch.where(inside, exact + (nearest - exact).detach(), nearest), scale, zero_point)
    codes = round_ste(x / scale) + zero_point
    clipped = codes.detach().clamp(spec.qmin, spec.qmax)
    if spec.widths is not None:
        clipped = torch.minimum(clipped, spec.highest(clipped))
    return QTensor(torch.where(clipped == codes, codes, clipped), scale, zero_point)


def clamp_(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """In-place clamp between tensors; on a CPU five times as fast as x.clamp_(low, high)."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        # Clamping before the zero point is added gives the values of equation 2 with two passes fewer.
        low, high = qmin - zero_point, qmax - zero_point
        v = x / scale
        wants_x, wants_scale, wants_zero = ctx.needs_input_grad[:3]
        if not (wants_x or wants_scale or wants_zero):
            return clamp_(v.round_(), low, high).mul_(scale)
        q = v.round()
        codes = torch.minimum(torch.maximum(q, low), high)
        inside = codes == q
        # d x~ / d scale: round(v) - v inside the range, clipped code less zero point outside.
        slope = torch.where(inside, q.sub_(v), codes) if wants_scale else None
        ctx.save_for_backward(inside, slope, scale if wants_zero else None)
        ctx.shape = scale.shape
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        inside, slope, scale = ctx.saved_tensors
        grad_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        grad_scale = (grad * slope).sum_to_size(ctx.shape) if slope is not None else None
        # d x~ / d zero point: 0 inside the range, where code and zero point cancel, and -scale outside.
        grad_zero = (torch.where(inside, 0.0, -grad) * scale).sum_to_size(ctx.shape) if scale is not None else None
        return grad_x, grad_scale, grad_zero, None, None


class _FusedFakeQuantize(torch.autograd.Function):
    """`_FakeQuantize` with one scale, in one pass of the compiled core each way: on a CPU a tenth of the time."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        z = float(zero_point)
        ctx.range = float(scale), qmin - z, qmax - z
        x = calls.dense(x)
        ctx.save_for_backward(x)
        return calls.fake_quantize(x, ctx.range)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x, grad_scale = calls.fake_quantize_backward(x, grad, ctx.range)
        wants_scale, wants_zero = ctx.needs_input_grad[1:3]
        grad_zero = (grad_x - grad).sum() * ctx.range[0] if wants_zero else None  # see `_FakeQuantize`
        return grad_x, grad.new_tensor(grad_scale) if wants_scale else None, grad_zero, None, None


def _fusible(x: Tensor, scale: Tensor) -> bool:
    return (
        scale.ndim == 0
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and available()
    )


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """`quantize(x, qparams).dequantize()` as one autograd function.

    Gradients: straight through to x inside the clipping range, none outside; to the scale that of LSQ
    (arXiv:1902.08153, equation 3) without its 1 / sqrt(N Qp) factor, as automatic differentiation of equations 2-3
    gives. A zero point that requires a gradient gets that of equation 2: -scale times the sum of the gradients of the
    values outside the range. It has to be a whole number (`round_ste`).
    """
    scale, zero_point, spec = measured(x, qparams)
    if spec.bits == FLOAT:
        return x
    if spec.table is not None or spec.widths is not None:
        static = replace(spec, rows=None, group=None, block_scale=None)
        return quantize(x, QParams(scale, zero_point, static)).dequantize()
    function = _FusedFakeQuantize if _fusible(x, scale) else _FakeQuantize
    return function.apply(x, scale, zero_point, spec.qmin, spec.qmax)
