"""Dynamic scales on the integer kernel, on every instruction set of this machine, against the reference kernel."""

from dataclasses import replace

import pytest
import torch
from operands import poison, weight
from torch.nn import functional as F

from quest.affine import ROWS, QParams, QuantSpec, in_groups, quantize
from quest.kernels import reference
from quest.kernels.cpu import integer
from quest.quantization import ranges
from quest.quantization.quantizer import Quantizer

pytestmark = [
    pytest.mark.skipif(
        integer.unavailable(torch.device("cpu")) is not None,
        reason="no compiled core: installed without a C++ compiler",
    ),
    pytest.mark.usefixtures("no_gradients"),
]
PER_CHANNEL = QuantSpec(8, axis=0)
DYNAMIC = [QuantSpec(bits, symmetric, 1, rows=rows) for bits in (4, 8) for symmetric in (True, False) for rows in ROWS]
CLIP = torch.tensor(0.9), torch.tensor(0.0)  # codes of a dynamic format reach 0.9 of its range


@pytest.mark.parametrize("spec", DYNAMIC, ids=lambda spec: f"{spec.bits}-{spec.symmetric}-{spec.rows}")
def test_dynamic_scales(isa, monkeypatch, spec):
    """As in the reference, of each sample alone too; samples differ in size, and one has a row of zeros."""
    torch.manual_seed(0)
    poison(monkeypatch)

    def check(name, x, w, qparams, **conv):
        x = x * torch.tensor([1.0, 30.0, 0.01]).view(3, *[1] * (x.ndim - 1))
        assert integer.supports(w, PER_CHANNEL, QParams(*(t[None] for t in CLIP), qparams.spec), **conv) is None
        b, packed = torch.randn(len(w.codes)), integer.pack(w)
        own, expected = getattr(integer, name), getattr(reference, name)(x, qparams, w, b, **conv)
        residual = torch.randn(expected.shape)
        y = own(x, qparams, packed, b, **conv, residual=residual)
        for i, (one, e) in enumerate(zip(y, expected + residual, strict=True)):
            torch.testing.assert_close(one, e, rtol=0, atol=2e-6 * e.abs().max().item())
            alone = own(x[i : i + 1], qparams, packed, b, **conv, residual=residual[i : i + 1])
            assert torch.equal(alone[0], one)
        return y

    for shape in ((3, 37, 50), (3, 50)):
        x = torch.randn(shape)
        x[1, 0] = 0
        check("linear", x, weight(40, 50, bits=8), QParams(*CLIP, replace(spec, axis=-1)))
    for kernel, conv in ((1, {}), (1, {"stride": (2, 1)}), (3, {"padding": (1, 1)}), (3, {"stride": (2, 2)})):
        conv = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) | conv
        if kernel == 1 or spec.rows == "tensor":
            x, w = torch.randn(3, 66, 9, 8), weight(70, 66, kernel, kernel, bits=4)
            for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
                y = check("conv2d", laid_out, w, QParams(*CLIP, spec), **conv)
                assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spec", [PER_CHANNEL, QuantSpec(4, axis=0, group=32)], ids=["channel", "groups"])
def test_groups_of_channels(isa, threads, monkeypatch, spec):
    """Of the input, of the weight, and of both; the last one is smaller."""
    torch.manual_seed(0)
    x, own = torch.randn(2, 35, 200) * torch.linspace(0.1, 9, 200), torch.randn(75, 200) * torch.rand(75, 200)
    found = in_groups(own, spec) if spec.group else ranges.minmax(own, spec)
    quantizer = Quantizer(spec, tuple(found[0].shape[1:]))
    quantizer.size = 200
    quantizer.scale.data, quantizer.zero_point = found[0][None], found[1][None]
    w, b = quantize(own, quantizer.qparams), torch.randn(75)
    poison(monkeypatch)
    for symmetric in (True, False):
        for group in (32,) if spec.group else (16, 64, 256):
            for qparams in (
                QParams(*CLIP, QuantSpec(8, symmetric, -1, rows="token", group=group)),
                QParams(*CLIP, QuantSpec(8, symmetric, -1, rows="token")),
                QParams(torch.tensor(0.1), torch.tensor(0.0 if symmetric else 90.0), QuantSpec(8, symmetric)),
            ):
                of_all = QParams(*(t[None] for t in qparams[:2]), qparams.spec)
                assert integer.supports(w, spec, of_all) is None
                e = reference.linear(x, qparams, w, b)
                y = integer.linear(x, qparams, integer.pack(w, spec.group or group), b, residual=e)
                torch.testing.assert_close(y, 2 * e, rtol=0, atol=2e-6 * e.abs().max().item())


def test_groups_that_do_not_fit_are_refused():
    w = weight(4, 40, bits=8)
    token = QParams(torch.ones(1), torch.zeros(1), QuantSpec(8, axis=-1, rows="token", group=16))
    assert integer.supports(w, PER_CHANNEL, token) is None
    odd = token._replace(spec=replace(token.spec, group=24))
    assert integer.supports(w, PER_CHANNEL, odd) == "input: scales dynamic per token in groups of 24"
    said = integer.supports(w, QuantSpec(8, axis=0, group=32), token)
    assert said == "weight: scales in groups of 32, but those of the input in groups of 16"
    wide = QParams(torch.ones(1), torch.zeros(1), QuantSpec(8, True, wide=True))
    assert "more codes than a byte holds" in integer.supports(w, QuantSpec(8, axis=0, group=32), wide)
    conv = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    said = integer.supports(weight(4, 40, 1, 1, bits=8), QuantSpec(8, axis=0, group=16), wide, **conv)
    assert said == "weight: scales in groups of 16"
    given = QParams(*CLIP, token.spec)
    with pytest.raises(ValueError, match="packed for other groups"):
        integer.linear(torch.ones(3, 40), given, integer.pack(w), None)
    with pytest.raises(ValueError, match="a multiple of 16 in a linear layer"):
        integer.pack(w, 24)


def test_dynamic_gated_linear(isa, threads):
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 70, 48), weight(160, 48, bits=8), torch.randn(160)
    for rows in ROWS:
        qparams = QParams(*CLIP, QuantSpec(8, axis=-1, rows=rows))
        hidden, gate = reference.linear(x, qparams, w, b).chunk(2, dim=-1)
        y, e = integer.linear(x, qparams, integer.pack(w), b, gated=True), hidden * F.gelu(gate)
        torch.testing.assert_close(y, e, rtol=0, atol=2e-6 * e.abs().max().item())


def test_inputs_that_a_dynamic_layer_cannot_take_are_errors():
    x, w = torch.full((2, 6, 3, 3), torch.inf), weight(4, 6, 3, 3, bits=8)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    with pytest.raises(ValueError, match="conv2d: the input holds NaN, or infinity"):
        integer.conv2d(x, QParams(*CLIP, QuantSpec(8, axis=1, rows="tensor")), integer.pack(w), None, **conv)
    token = QParams(*CLIP, QuantSpec(8, axis=1, rows="token"))
    with pytest.raises(ValueError, match="scales of tokens"):
        integer.conv2d(x, token, integer.pack(w), None, **conv)
    conv["padding"] = (0, 0)
    with pytest.raises(ValueError, match="conv2d, residual: its shape is .* it takes 4 dimensions"):
        packed = integer.pack(weight(4, 6, 1, 1, bits=8))
        integer.conv2d(torch.ones(2, 6, 3, 3), token, packed, None, **conv, residual=torch.ones(4, 3, 3))
