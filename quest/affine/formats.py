"""Formats of quantized tensors: how many bits and which codes, and what shares a scale."""

import re
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT = 32  # bits of a tensor that is not quantized
ROWS = ("tensor", "token")  # what has a scale of its own in a dynamic format
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
    shifts: of a static activation with an axis, the scale of an index is one scale of the tensor times 2^-k, with k
    from 0 to `shifts`, and the zero point is the same for all. So codes less zero point, shifted to the left by
    `shifts` - k, add up as integers (DMQ, arXiv:2507.12933).
    widths: of a weight of whole numbers with axis 0, the bits of each output channel, a digit from 2 to 8 for each;
    `bits` is the largest of them. Codes are unsigned.
    wide: the symmetric rule of the released QuEST before August 2024: twice the codes that the bits allow and two more.
    A range of +-max takes 2^(bits + 1) + 1 of them, 33 at "4 bit".
    rows: None for a static format. A dynamic one computes its scales from each tensor that it quantizes: one for each
    sample ("tensor"), or one for each position of a sample, over all its channels ("token": a pixel, a token).
    Symmetric codes then end at +-(2^(bits - 1) - 1). `axis` is the dimension that the product sums over.
    group: the scales of an activation, dynamic or static, are of that many consecutive indices of `axis`; the last ones
    may be fewer. Of a weight, which has axis 0, those of dimension 1, apart for each tap of a convolution.
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
    shifts: int | None = None
    widths: str | None = None

    def __post_init__(self):
        if self.table is not None and sum(Table.named(self.table)) != self.bits - self.symmetric:
            raise ValueError(f"table: {self.table} has not {self.bits} bits")
        if self.block_scale not in (None, *BLOCK_SCALES):
            raise ValueError(f"block_scale: {self.block_scale!r} is not one of {', '.join(BLOCK_SCALES)}")
        if self.block_scale is not None and (self.group is None or self.block_scale != "e4m3" and not self.symmetric):
            raise ValueError("block_scale: of groups only, and powers of two of symmetric codes")
        if self.rows not in (None, *ROWS):
            raise ValueError(f"rows: {self.rows!r} is not one of {', '.join(ROWS)}, or None for a static format")
        if self.group is not None and self.axis is None:
            raise ValueError("group: of the indices of an axis: give one, 0 for a weight")
        if self.rows is not None and (self.axis is None or self.wide or self.bits == FLOAT):
            raise ValueError("rows: a dynamic format has an axis, 2 to 16 bits and no wide codes")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group: {self.group} is out of bounds; valid: 1 or more")
        if self.narrow and (not self.symmetric or self.wide):
            raise ValueError("narrow codes are symmetric and not wide: give symmetric=True, wide=False")
        if self.shifts is not None and (self.axis is None or self.rows or self.group or self.table or self.shifts < 1):
            raise ValueError("shifts: 1 or more, of a static format of whole numbers with an axis")
        if self.widths is not None and (
            not re.fullmatch("[2-8]+", self.widths)
            or self.bits != int(max(self.widths))
            or self.symmetric
            or self.axis != 0
            or (self.rows, self.group, self.table, self.shifts) != (None,) * 4
        ):
            raise ValueError("widths: digits from 2 to `bits`, of unsigned whole numbers with axis 0")
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

    def highest(self, like: Tensor) -> Tensor:
        """The largest code of each output channel of a weight with `widths`, shaped to broadcast against it."""
        return like.new_tensor([2 ** int(width) - 1 for width in self.widths]).view(-1, *[1] * (like.ndim - 1))

    @property
    def mean_bits(self) -> float:
        """The mean of the bits of all output channels; `bits` where they have the same."""
        return self.bits if self.widths is None else sum(map(int, self.widths)) / len(self.widths)

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
        what = f"per tensor, channels shifted by up to {self.shifts}" if self.shifts else what
        what += f", {min(self.widths)} to {max(self.widths)} bits" if self.widths else ""
        return what + (f", codes {self.table}" if self.table else "")

    @property
    def grouped_axis(self) -> int:
        """The dimension whose indices have scales in groups: `axis`, but 1 of a weight."""
        return self.axis or 1

    def scales(self, size: int) -> int:
        """Return how many scales `size` indices have, of `axis`, or of dimension 1 in a weight."""
        return -(-size // self.group) if self.group else 1
