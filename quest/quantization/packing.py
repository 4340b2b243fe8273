"""Codes of a weight as they lie in a file: two to a byte, one to a byte, or two bytes each.

Up to 16 levels (2 to 4 bits, asymmetric) two codes share a byte, the first in its low half; up to 256 each has a byte;
more, two bytes. A row is an output channel with its other dimensions in their order (C, kh, kw); a row of odd length
ends in a half that is zero. What is stored is code less qmin, so that it is unsigned.
"""

import math

import torch
from torch import Tensor

from quest.affine import QuantSpec

BLOCK = 64  # output channels that are unpacked at a time


def shape(weight: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Shape of the packed codes of a weight of this shape: [rows, bytes or, of more than 256 levels, pairs of them]."""
    row = math.prod(weight[1:])
    return weight[0], (row + 1) // 2 if _levels(spec) <= 16 else row


def dtype(spec: QuantSpec) -> torch.dtype:
    return torch.uint8 if _levels(spec) <= 256 else torch.uint16


def nbytes(weight: tuple[int, ...], spec: QuantSpec) -> int:
    """Bytes that the codes of a weight of this shape take."""
    return math.prod(shape(weight, spec)) * dtype(spec).itemsize


def fits(packed: Tensor, weight: tuple[int, ...], spec: QuantSpec) -> bool:
    """Whether a tensor can be the packed codes of a weight of this shape."""
    return (tuple(packed.shape), packed.dtype) == (shape(weight, spec), dtype(spec))


def pack(codes: Tensor, spec: QuantSpec) -> Tensor:
    """codes [O, ...], whole numbers from spec.qmin to spec.qmax of any dtype -> uint8 or uint16, see `shape`."""
    rows = (codes.flatten(1) - spec.qmin).to(torch.int32).to(dtype(spec))
    if _levels(spec) > 16:
        return rows.contiguous()
    if rows.shape[1] % 2:
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)
    return rows[:, ::2] | rows[:, 1::2] << 4


def unpack(packed: Tensor, spec: QuantSpec, weight: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Tensor:
    """The codes that `pack` was given, float32 of the shape `weight`, in the memory layout `stride`."""
    codes = torch.empty(weight, dtype=torch.float32, device=packed.device)
    if stride is not None:
        codes = codes.as_strided(weight, stride)
    # In blocks, so that no other tensor is as large as the weight.
    for block, rows in zip(codes.split(BLOCK), packed.split(BLOCK), strict=True):
        if _levels(spec) <= 16:
            rows = torch.stack([rows & 15, rows >> 4], 2).flatten(1)[:, : math.prod(weight[1:])]
        block.copy_(rows.reshape(block.shape)).add_(spec.qmin)
    return codes


def largest(packed: Tensor, spec: QuantSpec) -> int:
    """The largest of the codes that `pack` packed, less qmin. What fills up a row is zero."""
    parts = (rows.to(torch.int32) for rows in packed.split(BLOCK))
    if _levels(spec) <= 16:
        return max(int(torch.maximum(part & 15, part >> 4).max()) for part in parts)
    return max(int(part.max()) for part in parts)


def _levels(spec: QuantSpec) -> int:
    return spec.qmax - spec.qmin + 1
