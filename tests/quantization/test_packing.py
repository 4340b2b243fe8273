"""Packed codes: round trips at every width, and the bytes counted here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quest.affine import QuantSpec
from quest.quantization import packing

SPECS = [QuantSpec(b) for b in (2, 3, 4, 5, 8, 9)] + [QuantSpec(4, symmetric=True), QuantSpec(4, True, wide=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4, 3, 3), (2, 1, 3, 3), (130, 5)], ids=str)
def test_round_trip(spec, shape):
    torch.manual_seed(0)
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape).float()
    codes.view(-1)[0], codes.view(-1)[-1] = spec.qmin, spec.qmax
    packed = packing.pack(codes, spec)
    assert tuple(packed.shape) == packing.shape(shape, spec) and packed.dtype == packing.dtype(spec)
    assert packed.is_contiguous() and packed.numel() * packed.element_size() == packing.nbytes(shape, spec)
    unpacked = packing.unpack(packed, spec, shape)
    assert unpacked.dtype == torch.float32 and torch.equal(unpacked, codes)
    if len(shape) == 4:
        stride = codes.contiguous(memory_format=torch.channels_last).stride()
        unpacked = packing.unpack(packed, spec, shape, stride)
        assert unpacked.stride() == stride and torch.equal(unpacked, codes)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation made, beside the result that was allocated first."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not operation.is_view and not operation._schema.is_mutable:
            self.made.append(result.numel())
        return result


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(8), QuantSpec(9)], ids=str)
def test_nothing_beside_the_codes_is_as_large_as_a_large_weight(spec):
    packed = packing.pack(torch.randint(spec.qmin, spec.qmax + 1, (640, 50)), spec)
    with Sizes() as sizes:
        packing.unpack(packed, spec, (640, 50))
        packing.largest(packed, spec)
    assert sorted(sizes.made)[-1] == 640 * 50 and sorted(sizes.made)[-2] <= 64 * 50


def test_two_codes_share_a_byte_the_first_in_its_low_half():
    codes = torch.tensor([[1, 2, 3], [15, 0, 7]])
    assert packing.pack(codes, QuantSpec(4)).tolist() == [[0x21, 0x03], [0x0F, 0x07]]
    assert packing.pack(codes, QuantSpec(5)).tolist() == codes.tolist()
    assert packing.pack(codes - 8, QuantSpec(4, symmetric=True)).tolist() == [[0x21, 0x03], [0x0F, 0x07]]


def test_bytes():
    weight = (320, 4, 3, 3)
    assert packing.nbytes(weight, QuantSpec(4)) == packing.nbytes(weight, QuantSpec(2)) == 320 * 18
    assert packing.nbytes(weight, QuantSpec(8)) == 320 * 36 and packing.nbytes(weight, QuantSpec(9)) == 320 * 72
    assert packing.nbytes((2, 1, 3, 3), QuantSpec(4)) == 2 * 5  # nine codes to a row


def test_the_largest_code_of_either_half_is_seen():
    spec = QuantSpec(3)
    for byte, largest in ((0x07, 7), (0x70, 7), (0x0F, 15), (0xF0, 15)):
        assert packing.largest(torch.tensor([[0, byte]], dtype=torch.uint8), spec) == largest
    assert packing.largest(torch.tensor([[3, 700]], dtype=torch.uint16), QuantSpec(10)) == 700
