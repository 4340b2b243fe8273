"""The integer kernel against what the reference means, on every instruction set of this machine."""

import ctypes
import os
from dataclasses import replace

import pytest
import torch
from operands import activation, exact, needs_core, poison, weight
from torch.nn import functional as F

from quest import kernels
from quest.affine import FLOAT, QParams, QTensor, QuantSpec, fake_quantize, quantize
from quest.kernels import reference
from quest.kernels.cpu import core, integer

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize(
    "rows, inputs, outputs", [(1, 1, 1), (63, 63, 17), (7, 1023, 5), (131, 48, 384), (12, 257, 31)]
)
def test_linear_sums_are_those_of_the_codes(isa, threads, monkeypatch, bits, rows, inputs, outputs):
    torch.manual_seed(0)
    w = replace(weight(outputs, inputs, bits=bits[0], outside=True), scale=torch.ones(outputs, 1))
    qparams = QParams(torch.tensor(1.0), torch.tensor(-3.0), QuantSpec(bits[1]))
    x = torch.randn(rows, inputs) * 2 ** (bits[1] - 1)
    poison(monkeypatch)
    y = integer.linear(x, qparams, integer.pack(w), None)
    # Scales of 1: the result is the sum itself, rounded once where it exceeds 24 bits.
    assert torch.equal(y, exact(x, qparams, w, F.linear).float())


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize(
    "shape, outputs, size, conv",
    [
        ((2, 48, 8, 8), 48, 3, {}),
        ((3, 5, 7, 9), 13, 3, {}),
        ((1, 1, 1, 1), 1, 3, {}),
        ((2, 63, 5, 4), 33, 3, {"stride": (2, 2)}),
        ((2, 17, 9, 9), 7, 3, {"stride": (2, 2), "padding": (0, 0)}),
        ((1, 16, 13, 4), 16, 3, {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        ((2, 31, 6, 6), 8, 1, {"padding": (0, 0)}),
        ((1, 6, 11, 11), 9, 5, {"padding": (2, 2)}),
        ((1, 6, 1, 3), 9, 1, {"padding": (2, 3), "stride": (7, 9)}),
        ((1, 320, 4, 4), 320, 3, {}),
        ((1, 150, 8, 8), 130, 3, {}),
    ],
)
def test_convolution_sums_are_those_of_the_codes(isa, threads, monkeypatch, bits, shape, outputs, size, conv):
    torch.manual_seed(0)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1)) | conv
    w = replace(weight(outputs, shape[1], size, size, bits=bits[0]), scale=torch.ones(outputs, 1, 1, 1))
    qparams = QParams(torch.tensor(1.0), torch.tensor(2.0 ** (bits[1] - 1)), QuantSpec(bits[1]))
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last) * 2 ** (bits[1] - 2)
    poison(monkeypatch)
    y = integer.conv2d(x, qparams, integer.pack(w), None, **conv, groups=1)
    assert torch.equal(y, exact(x, qparams, w, lambda a, b: F.conv2d(a, b, **conv)).float())
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 1024, 24, 24), (40, 96, 16, 16), (1500, 1024)], ids=str)
def test_inputs_of_several_blocks(isa, threads, monkeypatch, shape):
    """Lines of one image, whole images, and rows, where a block of them fills a cache."""
    torch.manual_seed(0)
    kernel = (3, 3) if len(shape) == 4 else ()
    w = weight(17, shape[1], *kernel, bits=4)
    w = replace(w, scale=torch.ones_like(w.scale))
    qparams = QParams(torch.tensor(1.0), torch.tensor(100.0), QuantSpec(8))
    x = torch.randn(shape) * 64
    poison(monkeypatch)
    if kernel:
        x = x.contiguous(memory_format=torch.channels_last)
        same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        y = integer.conv2d(x, qparams, integer.pack(w), None, **same, groups=1)
        expected = exact(x, qparams, w, lambda a, b: F.conv2d(a, b, **same))
    else:
        y, expected = integer.linear(x, qparams, integer.pack(w), None), exact(x, qparams, w, F.linear)
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("spec", [QuantSpec(8, True), QuantSpec(4, True), QuantSpec(4, True, wide=True)], ids=str)
def test_signed_inputs(isa, spec):
    torch.manual_seed(0)
    qparams = QParams(torch.tensor(1.0), torch.tensor(0.0), spec)
    x = torch.randn(3, 20, 6, 6).contiguous(memory_format=torch.channels_last) * 1.2 * spec.qmax
    codes = quantize(x, qparams).codes
    assert (codes.min(), codes.max()) == (spec.qmin, spec.qmax)  # both signs, and clipped at either end
    w = replace(weight(12, 20, 3, 3, bits=4), scale=torch.ones(12, 1, 1, 1))
    same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    y = integer.conv2d(x, qparams, integer.pack(w), None, **same, groups=1)
    assert torch.equal(y, exact(x, qparams, w, lambda a, b: F.conv2d(a, b, **same)).float())
    rows, w = x.flatten(1), replace(weight(5, 720, bits=8), scale=torch.ones(5, 1))
    assert torch.equal(integer.linear(rows, qparams, integer.pack(w), None), exact(rows, qparams, w, F.linear).float())
    q, k, v = (torch.randn(2, 9, 8) * spec.qmax for _ in range(3))
    p = QParams(torch.tensor(1 / 255), torch.tensor(0.0), QuantSpec(8))
    params = (qparams, qparams, qparams, p)
    assert integer.supports_attention(*[QParams(t.scale[None], t.zero_point[None], t.spec) for t in params]) is None
    torch.testing.assert_close(integer.attention(q, k, v, params, 0.01), reference.attention(q, k, v, params, 0.01))


def test_inputs_of_more_codes_than_a_byte_holds(isa):
    """In layers each becomes several bytes; in attention they are refused."""
    torch.manual_seed(0)
    qparams = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec(8, symmetric=True, wide=True))
    x = torch.randn(3, 20, 6, 6).contiguous(memory_format=torch.channels_last) * 300
    same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    of_all_groups = QParams(*(t[None] for t in qparams[:2]), qparams.spec)
    for bits in (4, 8):
        w = replace(weight(12, 20, 3, 3, bits=bits), scale=torch.ones(12, 1, 1, 1))
        assert integer.supports(w, PER_CHANNEL, of_all_groups, groups=1, padding=(1, 1)) is None
        y = integer.conv2d(x, qparams, integer.pack(w), None, **same, groups=1)
        assert torch.equal(y, exact(x, qparams, w, lambda a, b: F.conv2d(a, b, **same)).float())
    assert integer.supports_attention(*[of_all_groups] * 4) == "q: 514 codes, more than a byte holds"


def test_winograd_and_direct_sums_agree_to_the_bit(isa):
    """Beyond the bound up to which the transform is exact, and for zero points far outside, the direct way is taken."""
    torch.manual_seed(0)
    same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for zero_point in (-400.0, -72.0, 0.0, 128.0, 255.0, 327.0, 328.0, 2000.0):
        for outputs, channels in ((24, 40), (64, 68)):
            x = torch.randn(2, channels, 8, 8).contiguous(memory_format=torch.channels_last)
            qparams = QParams(torch.tensor(0.02), torch.tensor(zero_point), QuantSpec(8))
            w = weight(outputs, channels, 3, 3, bits=8, outside=True)
            expected = exact(x, qparams, w, lambda a, b: F.conv2d(a, b, padding=1))
            y = integer.conv2d(x, qparams, integer.pack(replace(w, scale=torch.ones(outputs, 1, 1, 1))), None, **same)
            assert torch.equal(y, (expected.float() * torch.tensor(0.02))), (zero_point, channels)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channels of more", "rows of more"])
def test_layouts(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 9, 8).contiguous(memory_format=torch.channels_last)
    x = {
        "channels_last": x,
        "contiguous": x.contiguous(),
        "channels of more": x[:, 8:],
        "rows of more": x[:, :, 1:8, 2:7],
    }[layout]
    w, b = weight(10, x.shape[1], 3, 3, bits=8), torch.randn(10)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    a = integer.conv2d(x, activation(8, 120.0), integer.pack(w), b, **conv)
    e = reference.conv2d(x, activation(8, 120.0), w, b, **conv)
    torch.testing.assert_close(a, e, rtol=0, atol=2e-6 * e.abs().max().item())
    rows = x.permute(0, 2, 3, 1).flatten(1, 2) if layout == "channels_last" else x.transpose(1, 3)
    w = weight(10, rows.shape[-1], bits=8)
    a, e = (k.linear(rows, activation(8, 120.0), k.pack(w), b) for k in (integer, reference))
    torch.testing.assert_close(a, e, rtol=0, atol=2e-6 * e.abs().max().item())


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_codes_are_the_references(isa, bits):
    """An identity weight shows the codes themselves: ties, clipped and infinite values, a scale at the smallest."""
    spec = QuantSpec(bits[1])
    eye = QTensor(torch.eye(33), torch.ones(33, 1), torch.zeros(33, 1))
    for scale, zero_point in ((0.1, 7.0), (0.037, -20.0), (1e-8, 3.0), (1.0, 0.0)):
        x = torch.cat([torch.randn(400, 33) * 5 * scale * 2 ** bits[1] / 8, (torch.arange(33.0)[None] - 16.5) * scale])
        x[0, 0], x[0, 1], x[0, 2] = torch.inf, -torch.inf, -0.0
        qparams = QParams(torch.tensor(scale), torch.tensor(zero_point), spec)
        y = integer.linear(x, qparams, integer.pack(eye), None)
        assert torch.equal(y, fake_quantize(x, qparams) + 0.0)


@pytest.mark.parametrize(
    "q, n, m, d, heads",
    [
        (8, 64, 64, 12, 4),
        (8, 7, 20, 24, 2),
        (4, 33, 1, 40, 2),
        (8, 5, 63, 7, 3),
        (4, 16, 131, 160, 1),
        (8, 64, 64, 80, 1),
        (8, 1, 17, 64, 2),
    ],
)
@pytest.mark.parametrize("heads_apart", [True, False])
def test_attention(isa, threads, monkeypatch, q, n, m, d, heads, heads_apart):
    torch.manual_seed(0)
    rows = [torch.randn(2, length, heads * d).unflatten(2, (heads, d)).transpose(1, 2) for length in (n, m, m)]
    if not heads_apart:
        rows = [t.flatten(0, 1) for t in rows]
    top = 0.4 if m > 1 else 1.0
    params = [activation(q, 2.0 ** (q - 1) + i, 6 / 2**q) for i in range(3)] + [activation(8, 0.0, top / 255)]
    poison(monkeypatch)
    y = integer.attention(*rows, params, d**-0.5)
    e = reference.attention(*(t.flatten(0, -3) for t in rows), params, d**-0.5).reshape(y.shape)
    # A probability at a tie may take the neighbouring code: a step of its scale times the largest value.
    step = top / 255 * 6
    assert (y - e).abs().max() <= 2.5 * step
    assert ((y - e).abs() > 1e-5 * e.abs().max()).float().mean() < 0.02


@pytest.fixture
def regions():
    """Notes the threads of every parallel region that the core begins, in torch's OpenMP runtime."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if entry is None:
        pytest.skip("torch computes here without an OpenMP runtime that the core could use")
    seen, kind = [], ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    begin = kind(ctypes.cast(entry, ctypes.c_void_p).value)

    @kind
    def noted(task, argument, threads, flags):
        seen.append(threads)
        begin(task, argument, threads, flags)

    core.core().quest_use_openmp(ctypes.cast(noted, ctypes.c_void_p))
    yield seen
    core.core().quest_use_openmp(ctypes.cast(entry, ctypes.c_void_p))


def test_threads_do_not_touch_a_bit(isa, regions):
    """Of work that is large enough for three threads."""
    torch.manual_seed(0)
    x = torch.randn(5, 48, 8, 8).contiguous(memory_format=torch.channels_last)
    w, b = integer.pack(weight(40, 48, 3, 3, bits=8)), torch.randn(40)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    head = [torch.randn(2, 3, 200, 12) for _ in range(3)]
    params = [activation(8, 128.0)] * 3 + [activation(8, 0.0, 0.01)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        convolved = integer.conv2d(x, activation(8, 99.0), w, b, **conv)
        results.append((convolved, integer.attention(*head, params, 0.3)))
    torch.set_num_threads(1)
    assert regions == [2, 2, 3, 3]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("outputs", [38, 160])
def test_gated_linear(isa, threads, outputs):
    torch.manual_seed(0)
    x, w, b = torch.randn(70, 48), weight(outputs, 48, bits=8), torch.randn(outputs)
    hidden, gate = reference.linear(x, activation(8, 128.0), w, b).chunk(2, dim=-1)
    y = integer.linear(x, activation(8, 128.0), integer.pack(w), b, gated=True)
    e = hidden * F.gelu(gate)
    torch.testing.assert_close(y, e, rtol=0, atol=2e-6 * e.abs().max().item())


@pytest.mark.parametrize("rows, inputs, outputs", [(37, 20, 45), (600, 96, 64), (1, 7, 160)])
def test_residual_of_a_linear_layer(isa, threads, rows, inputs, outputs):
    torch.manual_seed(0)
    w, b, qparams = integer.pack(weight(outputs, inputs, bits=8)), torch.randn(outputs), activation(8, 100.0)
    x, residual = torch.randn(2, rows, inputs), torch.randn(2, rows, outputs)
    expected = integer.linear(x, qparams, w, b) + residual
    assert torch.equal(integer.linear(x, qparams, w, b, residual=residual), expected)
    transposed = residual.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(integer.linear(x, qparams, w, b, residual=transposed), expected)
    with pytest.raises(ValueError, match="a residual of shape"):
        integer.linear(x, qparams, w, b, residual=residual[:1])


@pytest.mark.parametrize("kernel, stride, padding, size", [(3, 1, 1, 16), (3, 1, 1, 9), (3, 2, 1, 9), (1, 1, 0, 7)])
def test_residual_of_a_convolution(isa, threads, kernel, stride, padding, size):
    torch.manual_seed(0)
    w, b, qparams = integer.pack(weight(38, 20, kernel, kernel, bits=4)), torch.randn(38), activation(4, 7.0, 0.4)
    conv = dict(stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), groups=1)
    x = torch.randn(5, 20, size, size).contiguous(memory_format=torch.channels_last)
    y = integer.conv2d(x, qparams, w, b, **conv)
    for residual in (torch.randn(y.shape), torch.randn(y.shape).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(integer.conv2d(x, qparams, w, b, **conv, residual=residual), y + residual)


def test_between_calls_torch_may_use_the_same_registers():
    """oneDNN computes bfloat16 on AMX tiles, which have one shape at a time."""
    torch.manual_seed(0)
    x, w, b = torch.randn(70, 64), weight(160, 64, bits=8), torch.randn(160)
    half = torch.randn(256, 256, dtype=torch.bfloat16)
    packed, image = integer.pack(w), half.view(4, 64, 16, 16)
    results = []
    for _ in range(3):
        product = half @ half
        results.append((product, F.conv2d(image, image), integer.linear(x, activation(8, 128.0), packed, b)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nan_is_an_error():
    w = integer.pack(weight(4, 20, bits=8))
    for column in (0, 17, 19):
        x = torch.zeros(3, 20)
        x[1, column] = torch.nan
        with pytest.raises(ValueError, match="linear: the input holds NaN"):
            integer.linear(x, activation(8, 3.0), w, None)


def test_packed_sizes():
    """Half a byte or a byte for each code, and little beside."""
    for bits, size in ((8, 1), (4, 0.5)):
        assert integer.pack(weight(320, 640, bits=bits)).numel() == pytest.approx(320 * 640 * size, rel=0.05)
        assert integer.pack(weight(512, 512, 3, 3, bits=bits)).numel() == pytest.approx(512 * 512 * 9 * size, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (32, 48), (5, 3, 3, 3), (33, 10, 1, 1), (16, 4, 5, 2)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernel", ["integer", "triton"])
def test_packed_codes_are_given_back(kernel, bits, shape):
    torch.manual_seed(0)
    w, kernel = weight(*shape, bits=bits, outside=True), kernels.get(kernel)
    codes = kernel.unpack(kernel.pack(w), shape)
    assert torch.equal(codes, w.codes) and codes.is_contiguous()


def groups(spec: QuantSpec, *zero_points: float) -> QParams:
    return QParams(torch.ones(len(zero_points)), torch.tensor(zero_points), spec)


PER_CHANNEL = QuantSpec(8, axis=0)
SAME = {"groups": 1, "padding": (1, 1)}


@pytest.mark.parametrize(
    "spec, qparams, conv, reason",
    [
        (PER_CHANNEL, groups(QuantSpec(FLOAT), 0.0), {}, "input in float"),
        (QuantSpec(FLOAT), groups(QuantSpec(8), 0.0), {}, "weight in float"),
        (QuantSpec(8, True), groups(QuantSpec(8), 0.0), {}, "weight: signed codes"),
        (PER_CHANNEL, groups(QuantSpec(16), 0.0), {}, "input: 16 bits, more than 8"),
        (PER_CHANNEL, groups(QuantSpec(8, axis=1), 0.0), {}, "input: one scale per channel"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0, 4e7), {}, "input: zero point 40000000 exceeds 16 bits"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0, 0.5), {}, "input: zero points are no integers"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0, torch.nan), {}, "input: not calibrated"),
        (QuantSpec(8, axis=1), groups(QuantSpec(8), 0.0), {}, "weight: one scale per input"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0)._replace(scale=torch.zeros(1)), {}, "input: scales are not positive"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0)._replace(scale=-torch.ones(1)), {}, "input: scales are not positive"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0), {"groups": 2, "padding": (1, 1)}, "grouped"),
        (PER_CHANNEL, groups(QuantSpec(8), 0.0), {"groups": 1, "padding": "same"}, "by name"),
        (PER_CHANNEL, groups(QuantSpec(8, axis=1, rows="token", group=4), 0.0), SAME, "per token in groups of 4"),
        (PER_CHANNEL, groups(QuantSpec(8, axis=1, rows="tensor", group=4), 0.0), SAME, "per tensor in groups of 4"),
        (PER_CHANNEL, groups(QuantSpec(8, axis=-1, rows="tensor"), 0.0), SAME, "input: scales dynamic per tensor"),
    ],
)
def test_what_is_not_exact_is_refused(spec, qparams, conv, reason):
    w = weight(4, 6, 3, 3, bits=8)
    assert reason in integer.supports(w, spec, qparams, **conv)
    for signed in (QuantSpec(8), QuantSpec(8, symmetric=True), QuantSpec(4, symmetric=True, wide=True)):
        assert integer.supports(w, PER_CHANNEL, groups(signed, -300.0, 128.0), groups=1, padding=(1, 1)) is None


def test_long_sums_are_refused():
    w = QTensor(torch.full((2, 40000), 255.0), torch.ones(2, 1), torch.zeros(2, 1))
    x = QParams(torch.ones(1), torch.zeros(1), QuantSpec(8))
    assert integer.supports(w, QuantSpec(8, axis=0), x) == "sums exceed 32 bits"
    with pytest.raises(ValueError, match="exceed the integers"):
        integer.linear(torch.ones(1, 40000), QParams(*(t[0] for t in x[:2]), x.spec), integer.pack(w), None)


def test_attention_of_16_bit_probabilities_is_refused():
    a = QParams(torch.ones(1), torch.zeros(1), QuantSpec(8))
    assert integer.supports_attention(a, a, a, a) is None
    assert "p: 16 bits" in integer.supports_attention(a, a, a, a._replace(spec=QuantSpec(16)))


def test_training_needs_the_reference():
    w = integer.pack(weight(4, 8, bits=8))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="train on the reference"):
        integer.linear(torch.zeros(2, 8, requires_grad=True), activation(8, 1.0), w, None)
    with pytest.raises(TypeError, match="float32 on a CPU"):
        integer.linear(torch.zeros(2, 8).double(), activation(8, 1.0), integer.pack(weight(4, 8, bits=8)), None)


def test_operators():
    """What torch traces: fake tensors, shapes and layouts, under torch.library's own checks."""
    torch.manual_seed(0)
    ops, scale, z = torch.ops.quest, torch.tensor(0.05), torch.tensor(120.0)
    w, b = integer.pack(weight(10, 6, 3, 3, bits=4)), torch.randn(10)
    x = torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.integer_conv2d, (x, w, b, scale, z, 0, 255, [2, 2], [1, 1], [1, 1], None))
    residual = torch.randn(2, 10, 8, 8)
    torch.library.opcheck(ops.integer_conv2d, (x, w, b, scale, z, 0, 255, [1, 1], [1, 1], [1, 1], residual))
    w = integer.pack(weight(10, 6, bits=8))
    torch.library.opcheck(ops.integer_linear, (torch.randn(3, 4, 6), w, b, scale, z, 0, 255, True, None))
    torch.library.opcheck(ops.integer_linear, (torch.randn(3, 4, 6), w, b, scale, z, 0, 255, False, None, 1))
    rows = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    limits = [0, 255] * 4
    torch.library.opcheck(
        ops.integer_attention, (*rows, [scale] * 4, [z, z, z, torch.tensor(0.0)], limits, [0, 1, 1, 0], 0.3)
    )
