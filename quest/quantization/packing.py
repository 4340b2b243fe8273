"""Packs the codes of a weight for a file. Stored values are code minus qmin, so they are unsigned; of a format with a
table, the place of the code in it.

    levels      codes per byte      example: a row of three codes
    up to 16    two                 codes 1 2 15       ->  bytes 0x21 0x0F    (the first code in the low half)
    up to 256   one                 codes 1 2 255      ->  bytes 0x01 0x02 0xFF
    more        half a code         codes 1 2 300      ->  uint16 1 2 300
    `widths`    8 / bits            codes 1 2 7        ->  bytes 0xD1 0x01    (3 bits each, the first in the lowest)

A row is an output channel, with its other dimensions in their order (C, kh, kw). If a row of half-byte codes has odd
length, its last half byte is zero. Output channels with bits of their own (`QuantSpec.widths`) have as many bytes as
they need, one row after the other in one dimension. Formats of 2 to 4 bits have at most 16 levels; `wide` ones more.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.affine import QuantSpec, Table

BLOCK = 64  # output channels that are unpacked at once


def shape(weight: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the packed codes of a weight of this shape: [rows, values of `dtype`]; [bytes] of widths."""
    row = math.prod(weight[1:])
    if spec.widths is not None:
        return (sum(_bytes(row, spec)),)
    return weight[0], (row + 1) // 2 if levels(spec) <= 16 else row


def dtype(spec: QuantSpec) -> torch.dtype:
    """Return the dtype of packed codes of a format."""
    return torch.uint8 if levels(spec) <= 256 else torch.uint16


def nbytes(weight: tuple[int, ...], spec: QuantSpec) -> int:
    """Return how many bytes the packed codes of a weight of this shape take."""
    return math.prod(shape(weight, spec)) * dtype(spec).itemsize


def fits(packed: Tensor, weight: tuple[int, ...], spec: QuantSpec) -> bool:
    """Return whether a tensor has the shape and dtype of packed codes of a weight of this shape."""
    return (tuple(packed.shape), packed.dtype) == (shape(weight, spec), dtype(spec))


def pack(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Pack codes [O, ...], whole numbers of any dtype from spec.qmin to spec.qmax, to `dtype` in the shape `shape`."""
    rows = codes.flatten(1)
    if spec.widths is not None:
        return _pack_widths(rows, spec)
    rows = (rows - spec.qmin).to(torch.int32) if spec.table is None else torch.bucketize(rows, _table(spec, rows))
    rows = rows.to(dtype(spec))
    if levels(spec) > 16:
        return rows.contiguous()
    if rows.shape[1] % 2:
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)
    return rows[:, ::2] | rows[:, 1::2] << 4


def unpack(packed: Tensor, spec: QuantSpec, weight: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Tensor:
    """Return the codes that `pack` packed, float32 of the shape `weight`, with these strides (default: contiguous)."""
    codes = torch.empty(weight, dtype=torch.float32, device=packed.device)
    if stride is not None:
        codes = codes.as_strided(weight, stride)
    if spec.widths is not None:
        return codes.copy_(_unpack_widths(packed, spec, math.prod(weight[1:])).view(weight))
    # Blocks limit the memory: no second tensor is as large as the weight.
    for block, rows in zip(codes.split(BLOCK), packed.split(BLOCK), strict=True):
        if levels(spec) <= 16:
            rows = torch.stack([rows & 15, rows >> 4], 2).flatten(1)[:, : math.prod(weight[1:])]
        rows = rows.reshape(block.shape)
        if spec.table is None:
            block.copy_(rows).add_(spec.qmin)
        else:
            block.copy_(_table(spec, block)[rows.long()])
    return codes


def largest(packed: Tensor, spec: QuantSpec) -> int:
    """Return the largest stored value, which is code minus qmin. The unused half byte of an odd row is zero."""
    if spec.widths is not None:  # of whatever bits there are
        return 0
    parts = (rows.to(torch.int32) for rows in packed.split(BLOCK))
    if levels(spec) <= 16:
        return max(int(torch.maximum(part & 15, part >> 4).max()) for part in parts)
    return max(int(part.max()) for part in parts)


def _bytes(row: int, spec: QuantSpec) -> list[int]:
    """Return the bytes of each output channel of so many codes."""
    return [-(-row * int(width) // 8) for width in spec.widths]


def _places(row: int, spec: QuantSpec, device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each number of bits: the output channels that have it, and the places of their bytes, [channels, bytes]."""
    sizes = torch.tensor(_bytes(row, spec), dtype=torch.long, device=device)
    starts = sizes.cumsum(0) - sizes
    for width in sorted(set(spec.widths)):
        own = torch.tensor([i for i, each in enumerate(spec.widths) if each == width], dtype=torch.long, device=device)
        yield int(width), own, starts[own][:, None] + torch.arange(int(sizes[own[0]]), device=device)


def _pack_widths(rows: Tensor, spec: QuantSpec) -> Tensor:
    packed = torch.empty(shape((*rows.shape,), spec), dtype=torch.uint8, device=rows.device)
    for width, own, places in _places(rows.shape[1], spec, rows.device):
        bits = (rows[own].long()[..., None] >> torch.arange(width, device=rows.device) & 1).flatten(1)
        bits = F.pad(bits, (0, 8 * places.shape[1] - bits.shape[1])).unflatten(1, (-1, 8))
        packed[places] = (bits << torch.arange(8, device=rows.device)).sum(-1).to(torch.uint8)
    return packed


def _unpack_widths(packed: Tensor, spec: QuantSpec, row: int) -> Tensor:
    codes = torch.empty(len(spec.widths), row, dtype=torch.float32, device=packed.device)
    for width, own, places in _places(row, spec, packed.device):
        bits = (packed[places].long()[..., None] >> torch.arange(8, device=packed.device) & 1).flatten(1)
        bits = bits[:, : row * width].unflatten(1, (row, width))
        codes[own] = (bits << torch.arange(width, device=packed.device)).sum(-1).float()
    return codes


def _table(spec: QuantSpec, like: Tensor) -> Tensor:
    """Return all codes of a format with a table, in rising order."""
    magnitudes = Table.named(spec.table).magnitudes
    return like.new_tensor([*(-m for m in magnitudes[:0:-1]), *magnitudes] if spec.symmetric else magnitudes)


def levels(spec: QuantSpec) -> int:
    """Return how many codes a format has."""
    if spec.table is not None:
        return len(Table.named(spec.table).magnitudes) * (2 if spec.symmetric else 1) - spec.symmetric
    return spec.qmax - spec.qmin + 1
