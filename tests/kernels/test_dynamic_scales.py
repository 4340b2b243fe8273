"""Dynamic scales on the integer kernel, on every instruction set of this machine, against the reference kernel."""

from dataclasses import replace

import pytest
import torch
from operands import needs_core, poison, weight
from torch.nn import functional as F

from quest.affine import ROWS, QParams, QuantSpec, in_groups, quantize
from quest.kernels import reference
from quest.kernels.cpu import integer
from quest.quantization import ranges
from quest.quantization.quantizer import Quantizer

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]
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
    for kernel, conv in (
        (1, {}),
        (1, {"stride": (2, 1), "padding": (1, 0)}),
        (3, {"padding": (1, 1)}),
        (3, {"stride": (2, 2), "padding": (1, 1)}),
        (3, {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)}),
    ):
        conv = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) | conv
        x, w = torch.randn(3, 66, 9, 8), weight(70, 66, kernel, kernel, bits=4)
        x[1, :, 0, 0] = 0
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
            y = check("conv2d", laid_out, w, QParams(*CLIP, spec), **conv)
            assert y.is_contiguous(memory_format=torch.channels_last)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    check("conv2d", torch.randn(3, 4, 1, 1), weight(5, 4, 3, 3, bits=8), QParams(*CLIP, spec), **conv)
    empty = integer.conv2d(
        torch.ones(0, 4, 5, 5), QParams(*CLIP, spec), integer.pack(weight(6, 4, 3, 3, bits=8)), None, **conv
    )
    assert empty.shape == (0, 6, 5, 5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_channels_in_a_convolution(isa, threads, monkeypatch, symmetric):
    """Of a pixel; the last one is smaller. Another pixel's size changes no output outside of its reach."""
    torch.manual_seed(0)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    x, w, b = torch.randn(2, 40, 6, 7), weight(33, 40, 3, 3, bits=4), torch.randn(33)
    x = x * torch.linspace(0.1, 9, 40).view(-1, 1, 1)
    qparams = QParams(*CLIP, QuantSpec(4, symmetric, 1, rows="token", group=16))
    assert integer.supports(w, PER_CHANNEL, QParams(*(t[None] for t in CLIP), qparams.spec), **conv) is None
    packed = integer.pack(w, 16)
    assert torch.equal(integer.unpack(packed, w.shape), w.codes)
    poison(monkeypatch)
    y, e = integer.conv2d(x, qparams, packed, b, **conv), reference.conv2d(x, qparams, w, b, **conv)
    torch.testing.assert_close(y, e, rtol=0, atol=2e-6 * e.abs().max().item())
    x[0, :, 0, 0] *= 1000
    again = integer.conv2d(x, qparams, packed, b, **conv)
    outside = torch.ones(6, 7, dtype=torch.bool)
    outside[:2, :2] = False
    assert torch.equal(again[0][:, outside], y[0][:, outside]) and not torch.equal(again[0], y[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n, m, d", [(20, 33, 24), (1, 1, 7)])
def test_attention_of_tokens(isa, threads, monkeypatch, symmetric, n, m, d):
    """With probabilities of static and of dynamic scales, and with q, k and v of either kind."""
    torch.manual_seed(0)
    rows = [torch.randn(2, length, 3 * d).unflatten(2, (3, d)).transpose(1, 2) for length in (n, m, m)]
    rows = [t * torch.rand(2, 3, t.shape[2], 1) * 3 for t in rows]
    for t in rows:
        t[0, 0, 0] = 0
    fixed = QParams(torch.tensor(0.06), torch.tensor(128.0), QuantSpec(8))
    own = [QParams(*CLIP, QuantSpec(8, symmetric, axis, rows="token")) for axis in (-1, -1, -2)]
    static_p = QParams(torch.tensor(1 / 255), torch.tensor(0.0), QuantSpec(8))
    dynamic_p = QParams(*CLIP, QuantSpec(8, axis=-1, rows="token"))
    poison(monkeypatch)
    for formats in (
        (*own, dynamic_p),
        (*own, static_p),
        (own[0], fixed, fixed, static_p),
        (fixed, fixed, own[2], dynamic_p),
    ):
        assert integer.supports_attention(*(QParams(a[None], b[None], c) for a, b, c in formats)) is None
        y = integer.attention(*rows, formats, d**-0.5)
        e = reference.attention(*(t.flatten(0, 1) for t in rows), formats, d**-0.5).reshape(y.shape)
        # A probability at a tie may take the neighbouring code: a step of its scale times the largest value.
        assert (y - e).abs().max() <= 2.5 / 255 * rows[2].abs().max()
        assert ((y - e).abs() > 1e-5 * e.abs().max()).float().mean() < 0.02
        alone = integer.attention(*(t[1:] for t in rows), formats, d**-0.5)
        assert torch.equal(alone[0], y[1])


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
    with pytest.raises(ValueError, match="of all channels, or of a multiple of 16"):
        integer.pack(w, 24)


def test_dynamic_gated_linear(isa, threads):
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 70, 48), weight(160, 48, bits=8), torch.randn(160)
    for rows in ROWS:
        qparams = QParams(*CLIP, QuantSpec(8, axis=-1, rows=rows))
        hidden, gate = reference.linear(x, qparams, w, b).chunk(2, dim=-1)
        y, e = integer.linear(x, qparams, integer.pack(w), b, gated=True), hidden * F.gelu(gate)
        torch.testing.assert_close(y, e, rtol=0, atol=2e-6 * e.abs().max().item())


def test_inputs_that_a_dynamic_layer_cannot_take_are_errors(isa):
    x, w = torch.full((2, 6, 3, 3), torch.inf), weight(4, 6, 3, 3, bits=8)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for rows in ROWS:
        qparams = QParams(*CLIP, QuantSpec(8, axis=1, rows=rows))
        for bad in (torch.inf, torch.nan):
            with pytest.raises(ValueError, match="conv2d: the input holds NaN, or infinity"):
                integer.conv2d(torch.full_like(x, bad), qparams, integer.pack(w), None, **conv)
        with pytest.raises(ValueError, match=r"it takes \[N, C, H, W\] or \[C, H, W\]"):
            integer.conv2d(torch.ones(6, 3, 3), qparams, integer.pack(w), None, **conv)
        with pytest.raises(ValueError, match="conv2d, residual: a residual of shape"):
            wrong = torch.ones(4, 3, 3)
            integer.conv2d(torch.ones(2, 6, 3, 3), qparams, integer.pack(w), None, **conv, residual=wrong)
    q, of_rows = torch.ones(2, 3, 5, 8), [QParams(*CLIP, QuantSpec(8, axis=a, rows="token")) for a in (-1, -1, -2, -1)]
    with pytest.raises(ValueError, match="attention: the input holds NaN, or infinity"):
        integer.attention(q, q, q.masked_fill(torch.arange(8) == 3, torch.inf), of_rows, 0.3)
    static_p = QParams(torch.tensor(1 / 255), torch.tensor(0.0), QuantSpec(8))
    for formats in (of_rows, [*of_rows[:3], static_p]):
        assert integer.attention(1e18 * q, 1e18 * q, q, formats, 0.3).isfinite().all()
        with pytest.raises(ValueError, match="infinity or too large numbers"):  # scores of 1e39
            integer.attention(1e19 * q, 1e20 * q, q, formats, 0.3)
    said = integer.supports_attention(*(f._replace(spec=replace(f.spec, rows="tensor")) for f in of_rows))
    assert said == "q: scales dynamic per tensor"
    said = integer.supports_attention(*of_rows[:2], of_rows[0], of_rows[3])  # v has the axis of q
    assert said == "v: scales dynamic per token"
