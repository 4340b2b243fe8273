"""Uniform affine quantization: x ~ scale * (code - zero_point) (QuEST, arXiv:2402.03666, equations 2-3).

`quantize(...).dequantize()` is what every quantizer of the suite means. `fake_quantize` computes the same values in one
fused autograd function (four passes over one buffer instead of an autograd node per operation); an integer kernel
multiplies the codes of the same `QTensor`. The three cannot disagree about rounding, clamping or the zero point.

A dynamic format takes scales and zero points from the tensor itself (`measured`), so both functions do that first.
A format of small floats has codes that are whole numbers too, but not all of them (`Table`): 4-bit E2M1 has 0, 1, 2, 3,
4, 6, 8, 12 and their negatives, which are its values times 2.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.kernels.cpu.core import available, calls

FLOAT = 32  # bits of a tensor that is not quantized
ROWS = ("tensor", "token")  # what has a scale of its own in a dynamic format
TINY = 1e-10  # least scale of a dynamic format, so that zeros stay zeros
E4M3 = 448.0  # the largest value of an 8-bit float with 4 bits of exponent
BLOCK_SCALES = ("e4m3", "e8m0", "e8m0-up")  # formats of the scales of groups


class Table(NamedTuple):
    """Floats of few bits: e of exponent, m of mantissa (bias 1, subnormals, no infinity), times 2^m to be whole.

    E2M1 is 0, .5, 1, 1.5, 2, 3, 4, 6; e = 1 gives equal distances.
    """

    exponent: int
    mantissa: int

    @classmethod
    def named(cls, name: str) -> "Table":
        """Read a name such as "e2m1", with 1 to 5 bits of exponent. Raises ValueError for another one."""
        if not re.fullmatch("e[1-5]m[0-9]", name):  # with more of exponent, codes are larger than numbers here
            raise ValueError(f"table: {name!r} is not of the form e2m1, with 1 to 5 bits of exponent")
        return cls(int(name[1]), int(name[3]))

    @property
    def magnitudes(self) -> list[int]:
        """The codes from 0 on, 2^(e + m) of them."""
        one = 2**self.mantissa
        return [j if i == 0 else (one + j) * 2 ** (i - 1) for i in range(2**self.exponent) for j in range(one)]

    def nearest(self, x: Tensor, symmetric: bool) -> Tensor:
        """Return the nearest code of each value, ties to the even mantissa; unsigned codes end at 0. NaN stays NaN."""
        magnitudes = torch.tensor(self.magnitudes, dtype=x.dtype, device=x.device)
        ends = (magnitudes[:-1] + magnitudes[1:]) / 2  # a value on an end goes to the code below
        ends[1::2] = ends[1::2].nextafter(ends.new_zeros(()))  # above a code with an odd mantissa, to the one above
        codes = magnitudes[torch.bucketize((x.abs() if symmetric else x.clamp(min=0)).contiguous(), ends)]
        return torch.where(x.isnan(), x, codes.copysign(x) if symmetric else codes)


@dataclass(frozen=True)
class QuantSpec:
    """Integer format of one tensor.

    bits: code width, 2 to 16, or 32 for a tensor that stays in float: no code, scale 1, zero point 0.
    symmetric: signed codes and zero point 0, else unsigned codes.
    axis: None for one scale per tensor, else the dimension that has a scale of its own for every index.
    narrow: of a static symmetric format, codes end at +-(2^(bits - 1) - 1), as those of a dynamic one do. Without it
    they start at -2^(bits - 1), as in the code that Q-Diffusion and QuEST released.
    wide: the symmetric rule of the released QuEST before August 2024: twice the codes that the bits allow and two more.
    A range of +-max takes 2^(bits + 1) + 1 of them, 33 at "4 bit".
    rows: None for a static format. A dynamic one computes its scales from each tensor that it quantizes: one for each
    sample ("tensor"), or one for each position of a sample, over all its channels ("token": a pixel, a token).
    Symmetric codes then end at +-(2^(bits - 1) - 1). `axis` is the dimension that the product sums over.
    group: of a dynamic format, the scales are of that many consecutive indices of `axis`; the last ones may be fewer.
    Of a weight, whose format is static and has axis 0, those of dimension 1, apart for each tap of a convolution.
    table: None, or the name of a `Table` whose codes these are; with a sign (`symmetric`) e + m is one bit less.
    block_scale: None, or the format to which the scales of groups are rounded: "e4m3", an 8-bit float times one factor
    per sample or weight (NVFP4), "e8m0", the power of two of the largest value (MXFP4, OCP's rule, which saturates), or
    "e8m0-up", the next one that reaches it.
    """

    bits: int
    symmetric: bool = False
    axis: int | None = None
    wide: bool = False
    rows: str | None = None
    group: int | None = None
    table: str | None = None
    block_scale: str | None = None
    narrow: bool | None = None

    def __post_init__(self):
        if self.table is not None and sum(Table.named(self.table)) != self.bits - self.symmetric:
            raise ValueError(f"table: {self.table} has not {self.bits} bits")
        if self.block_scale not in (None, *BLOCK_SCALES):
            raise ValueError(f"block_scale: {self.block_scale!r} is not one of {', '.join(BLOCK_SCALES)}")
        if self.block_scale is not None and (self.group is None or self.block_scale != "e4m3" and not self.symmetric):
            raise ValueError("block_scale: of groups only, and powers of two of symmetric codes")
        if self.rows not in (None, *ROWS):
            raise ValueError(f"rows: {self.rows!r} is not one of {', '.join(ROWS)}, or None for a static format")
        if self.rows is None and self.group is not None and self.axis != 0:
            raise ValueError("group: of a dynamic format, or of a weight: give rows, or axis=0")
        if self.rows is not None and (self.axis is None or self.wide or self.bits == FLOAT):
            raise ValueError("rows: a dynamic format has an axis, 2 to 16 bits and no wide codes")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group: {self.group} is out of bounds; valid: 1 or more")
        if self.narrow and (not self.symmetric or self.wide):
            raise ValueError("narrow codes are symmetric and not wide: give symmetric=True, wide=False")
        if self.wide and not self.symmetric:
            raise ValueError("wide codes are symmetric: give symmetric=True")
        if not (2 <= self.bits <= 16 or self.bits == FLOAT):
            raise ValueError(f"bits must be between 2 and 16, or 32 for float, not {self.bits}")

    @property
    def qmin(self) -> int:
        if self.wide:
            return -(2**self.bits) - 1
        if self.symmetric and (self.dynamic or self.group or self.table or self.narrow):
            return -self.qmax
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        if self.wide:
            return 2**self.bits
        if self.table:
            return Table.named(self.table).magnitudes[-1]
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def fields(self) -> dict:
        """The format in a dictionary for JSON; what only dynamic formats have is left out of others."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "axis"}

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from each tensor that is quantized."""
        return self.rows is not None

    @property
    def granularity(self) -> str:
        """What shares a scale, in words."""
        what = "per tensor" if self.axis is None else f"per channel {self.axis}"
        what = f"dynamic per {self.rows}" if self.dynamic else what
        what += f" in groups of {self.group}" if self.group else ""
        what += f", scales {self.block_scale}" if self.block_scale else ""
        return what + (f", codes {self.table}" if self.table else "")

    def scales(self, size: int) -> int:
        """Return how many scales `size` indices have, of `axis` in a dynamic format and of dimension 1 in a weight."""
        return -(-size // self.group) if self.group else 1


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
    if spec.table is not None:
        static = replace(spec, rows=None, group=None, block_scale=None)
        return quantize(x, QParams(scale, zero_point, static)).dequantize()
    function = _FusedFakeQuantize if _fusible(x, scale) else _FakeQuantize
    return function.apply(x, scale, zero_point, spec.qmin, spec.qmax)
