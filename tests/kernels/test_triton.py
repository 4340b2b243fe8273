"""The Triton kernel against what the reference means: on a GPU, or interpreted on a CPU (`on_triton`)."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_triton import DEVICE, INTERPRETED, close, computes, poison, setting  # noqa: F401
from operands import activation, exact, weight
from torch.nn import functional as F

from quest.affine import QTensor, QuantSpec, fake_quantize, quantize
from quest.kernels import reference
from quest.kernels.triton import kernel as triton
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


def unscaled(w: QTensor) -> QTensor:
    return replace(w, scale=torch.ones_like(w.scale))


BITS = pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])


@computes
@pytest.mark.parametrize("bits, zero_point", [((8, 8), -3.0), ((8, 8), 300.0), ((4, 8), 300.0), ((4, 4), -3.0)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 1, 1), (63, 63, 17), (17, 33, 63), (5, 130, 31)])
def test_linear_sums_are_those_of_the_codes(monkeypatch, bits, fused, rows, inputs, outputs, zero_point):
    poison(monkeypatch)
    monkeypatch.setattr(triton, "FUSED_OUTPUTS", outputs if fused else 0)
    w = unscaled(weight(outputs, inputs, bits=bits[0], outside=True))
    qparams = activation(bits[1], zero_point, 1.0)
    x = torch.randn(rows, inputs) * 2 ** (bits[1] - 1) - (zero_point if zero_point > 0 else 0)
    y = triton.linear(x, qparams, triton.pack(w), None)
    # Scales of 1: the result is the sum itself, rounded once where it exceeds 24 bits.
    assert torch.equal(y, exact(x, qparams, w, F.linear).float())


@computes
@pytest.mark.parametrize(
    "bits, zero_point", [((8, 8), 128.0), ((8, 8), -7.0), ((4, 8), 300.0), ((4, 4), 8.0), ((4, 4), -7.0)]
)
@pytest.mark.parametrize(
    "shape, outputs, size, conv",
    [
        ((1, 1, 1, 1), 1, 3, {}),
        ((2, 5, 4, 7), 13, 3, {}),
        ((2, 63, 5, 4), 33, 3, {"stride": (2, 2)}),
        ((2, 17, 9, 9), 7, 3, {"stride": (2, 2), "padding": (0, 0)}),
        ((1, 16, 13, 4), 16, 3, {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        ((2, 33, 6, 6), 17, 1, {"padding": (0, 0)}),
        ((2, 33, 6, 5), 17, 1, {"padding": (0, 0), "stride": (2, 2)}),
    ],
)
def test_convolution_sums_are_those_of_the_codes(monkeypatch, bits, shape, outputs, size, conv, zero_point):
    """Padding is zero, whether zero has a code or lies below or above all of them."""
    poison(monkeypatch)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1)) | conv
    w = unscaled(weight(outputs, shape[1], size, size, bits=bits[0], outside=True))
    qparams = activation(bits[1], zero_point, 1.0)
    x = torch.randn(shape) * 2 ** (bits[1] - 2) + 2.0 ** (bits[1] - 1) - zero_point
    y = triton.conv2d(x, qparams, triton.pack(w), None, **conv, groups=1)
    assert torch.equal(y, exact(x, qparams, w, lambda a, b: F.conv2d(a, b, **conv)).float())
    assert y.is_contiguous(memory_format=torch.channels_last)


@computes
@BITS
def test_outputs_are_within_rounding(bits):
    same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for z in (3.0, 2.0 ** (bits[1] - 1)):
        qparams = activation(bits[1], z, 6 / 2 ** bits[1])
        w, b = weight(40, 48, bits=bits[0]), torch.randn(40)
        x = torch.randn(2, 7, 48)
        close(triton.linear(x, qparams, triton.pack(w), b), reference.linear(x, qparams, w, b))
        w, x = weight(40, 40, 3, 3, bits=bits[0]), torch.randn(1, 40, 5, 5)
        close(triton.conv2d(x, qparams, triton.pack(w), b, **same), reference.conv2d(x, qparams, w, b, **same))


@computes
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("fused", [True, False])
def test_codes_are_the_references(monkeypatch, bits, fused):
    """An identity weight shows the codes themselves: ties, clipped and infinite values, a scale at the smallest."""
    monkeypatch.setattr(triton, "FUSED_OUTPUTS", 33 if fused else 0)
    eye = QTensor(torch.eye(33), torch.ones(33, 1), torch.zeros(33, 1))
    eye.codes[0, 0] = 1 if bits[0] == 4 else 16  # of more than 4 bits
    for scale, zero_point in ((0.1, 7.0), (0.037, -20.0), (1e-8, 3.0), (1.0, 0.0)):
        x = torch.cat([torch.randn(50, 33) * 5 * scale * 2 ** bits[1] / 8, (torch.arange(33.0)[None] - 16.5) * scale])
        x[0, 1], x[0, 2], x[0, 3] = torch.inf, -torch.inf, -0.0
        qparams = activation(bits[1], zero_point, scale)
        y = triton.linear(x, qparams, triton.pack(eye), None)
        assert torch.equal(y, fake_quantize(x, qparams) * eye.codes.diag() + 0.0)


@computes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    """Codes are those of the same values in float32, and the result is that of float32, rounded."""
    # The interpreter cuts bfloat16 off where a GPU rounds.
    rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    same = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    x, w, b = torch.randn(9, 40).to(dtype), triton.pack(weight(20, 40, bits=8)), torch.randn(20).to(dtype)
    y = triton.linear(x, activation(8, 128.0), w, b)
    e = triton.linear(x.float(), activation(8, 128.0), w, b.float()).to(dtype)
    torch.testing.assert_close(y, e, rtol=rtol, atol=0)
    x, w = torch.randn(2, 17, 5, 5).to(dtype), triton.pack(weight(20, 17, 3, 3, bits=4))
    y = triton.conv2d(x, activation(8, 128.0), w, b, **same)
    e = triton.conv2d(x.float(), activation(8, 128.0), w, b.float(), **same).to(dtype)
    torch.testing.assert_close(y, e, rtol=rtol, atol=0)
    rows = [torch.randn(2, 2, 20, 12).to(dtype) for _ in range(3)]
    params = [activation(8, 128.0)] * 3 + [activation(8, 0.0, 0.4 / 255)]
    y = triton.attention(*rows, params, 0.3)
    e = triton.attention(*(t.float() for t in rows), params, 0.3).to(dtype)
    torch.testing.assert_close(y, e, rtol=rtol, atol=0)


@computes
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channels of more", "rows of more"])
def test_layouts(layout):
    x = torch.randn(2, 40, 5, 4).contiguous(memory_format=torch.channels_last)
    x = {
        "channels_last": x,
        "contiguous": x.contiguous(),
        "channels of more": x[:, 8:],
        "rows of more": x[:, :, 1:4, 1:3],
    }[layout]
    w, b = weight(10, x.shape[1], 3, 3, bits=8), torch.randn(10)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    close(*(k.conv2d(x, activation(8, 120.0), k.pack(w), b, **conv) for k in (triton, reference)))
    rows = x.permute(0, 2, 3, 1).flatten(1, 2) if layout == "channels_last" else x.transpose(1, 3)
    w = weight(10, rows.shape[-1], bits=8)
    close(*(k.linear(rows, activation(8, 120.0), k.pack(w), b) for k in (triton, reference)))


@computes
@pytest.mark.parametrize(
    "bits, n, m, d, heads, zero_points",
    [
        (8, 33, 33, 12, 2, (128, 129, 130, 0)),
        (8, 7, 20, 24, 2, (128, 100, 140, 0)),
        (4, 33, 1, 40, 1, (8, 9, 7, 0)),
        (8, 5, 63, 7, 3, (128, 128, 128, 0)),
        (4, 16, 65, 160, 1, (8, 8, 8, 0)),
        (8, 17, 17, 80, 1, (128, 128, 128, -3)),
        (8, 1, 17, 64, 2, (-20, 300, 260, 0)),
    ],
)
def test_attention(monkeypatch, bits, n, m, d, heads, zero_points):
    poison(monkeypatch)
    rows = [torch.randn(2, length, heads * d).unflatten(2, (heads, d)).transpose(1, 2) for length in (n, m, m)]
    params = []
    for t, z in zip(rows, zero_points, strict=False):
        # A tensor that its codes hold, wherever zero lies.
        t += (2.0 ** (bits - 1) - z) * 6 / 2**bits
        params.append(activation(bits, float(z), 6 / 2**bits))
    top = 0.4 if m > 1 else 1.0
    params.append(activation(8, float(zero_points[3]), top / 255))
    y = triton.attention(*rows, params, d**-0.5)
    e = reference.attention(*(t.flatten(0, -3) for t in rows), params, d**-0.5).reshape(y.shape)
    # A probability at a tie may take the neighbouring code: a step of its scale times the largest value.
    assert (y - e).abs().max() <= 2.5 * top / 255 * rows[2].abs().max()
    assert ((y - e).abs() > 1e-5 * e.abs().max()).float().mean() < 0.02


@computes
def test_heads_may_be_counted_with_the_batch():
    rows = [torch.randn(2, 9, 24).unflatten(2, (3, 8)).transpose(1, 2) for _ in range(3)]
    params = [activation(8, 128.0)] * 3 + [activation(8, 0.0, 0.4 / 255)]
    y = triton.attention(*rows, params, 0.3)
    assert torch.equal(triton.attention(*(t.flatten(0, 1) for t in rows), params, 0.3), y.flatten(0, 1))


@computes
def test_attention_sums_are_those_of_the_codes():
    """Equal scores and a probability scale of 1 / m: every probability has code 1, the sum is that of the values."""
    m = 40
    q, k, v = torch.randn(1, 1, 3, 8), torch.ones(1, 1, m, 8), torch.randn(1, 1, m, 8) * 50
    params = activation(8, 128.0, 0.1), activation(8, 7.0, 0.1), activation(8, 100.0, 1.0)
    y = triton.attention(q, k, v, (*params, activation(8, 0.0, 1 / m)), 0.3)
    v_int = quantize(v, params[2])
    torch.testing.assert_close(y, ((v_int.codes - 100).sum(2, keepdim=True) / m).expand_as(y), rtol=1e-6, atol=0)


@computes
def test_nan_in_is_nan_out():
    w, conv = triton.pack(weight(4, 20, bits=8)), triton.pack(weight(4, 20, 3, 3, bits=4))
    for column in (0, 17, 19):
        x = torch.zeros(3, 20)
        x[1, column] = torch.nan
        y = triton.linear(x, activation(8, 3.0), w, None)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    x = torch.zeros(1, 20, 5, 5)
    x[0, 3, 0, 0] = torch.nan
    y = triton.conv2d(x, activation(8, 3.0), conv, None, (1, 1), (1, 1), (1, 1), 1)
    assert y[:, :, :2, :2].isnan().all() and y.isnan().sum() == 4 * 4
    params = [activation(8, 128.0)] * 3 + [activation(8, 0.0, 1 / 255)]
    for which, expected in ((0, (slice(None), 2)), (1, slice(None)), (2, (slice(None), slice(None), 1))):
        rows = [torch.zeros(1, 5, 4) for _ in range(3)]
        rows[which][0, 2, 1] = torch.nan
        y = triton.attention(*rows, params, 0.5)
        assert y[expected].isnan().all() and y.isnan().sum() == y[expected].numel()


@computes
def test_scales_are_those_of_the_time_group():
    groups = TimeGroups([900, 500, 100])
    quantizer = Quantizer(QuantSpec(8), groups=groups)
    quantizer.scale.data = torch.tensor([0.01, 0.03, 0.05])
    quantizer.zero_point = torch.tensor([120.0, 100.0, 90.0])
    x, w = torch.randn(9, 20), weight(6, 20, bits=8)
    outputs = []
    for timestep in (900, 300, 0):
        groups.enter(torch.tensor(timestep))
        outputs.append(triton.linear(x, quantizer(x), triton.pack(w), None))
        close(outputs[-1], reference.linear(x, quantizer(x), w, None))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


@computes
def test_operators():
    """What torch traces: fake tensors, shapes and layouts, under torch.library's own checks."""
    scale, z, b = torch.tensor(0.05), torch.tensor(120.0), torch.randn(10)
    w = triton.pack(weight(10, 6, 3, 3, bits=4))
    x = torch.randn(1, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    ops, checks = torch.ops.quest, ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.triton_conv2d, (x, w, b, scale, z, 0, 255, [2, 2], [1, 1], [1, 1], False), test_utils=checks
    )
    w = triton.pack(weight(10, 6, bits=8))
    torch.library.opcheck(ops.triton_linear, (torch.randn(3, 4, 6), w, b, scale, z, 0, 255, False), test_utils=checks)
    limits = [0, 255] * 4
    for shape in ((2, 3, 5, 8), (2, 5, 8)):
        rows = [torch.randn(shape) for _ in range(3)]
        given = (*rows, [scale] * 4, [z, z, z, torch.tensor(0.0)], limits, [False] * 4, 0.3)
        torch.library.opcheck(ops.triton_attention, given, test_utils=checks)


@computes
def test_wrong_inputs():
    w = triton.pack(weight(4, 8, bits=8))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="train on the reference"):
        triton.linear(torch.zeros(2, 8, requires_grad=True), activation(8, 1.0), w, None)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16, not torch.float64"):
        triton.linear(torch.zeros(2, 8).double(), activation(8, 1.0), w, None)
    with pytest.raises(ValueError, match="40 channels; the weight was packed for another number"):
        triton.linear(torch.zeros(2, 40), activation(8, 1.0), w, None)
    conv = triton.pack(weight(4, 8, 3, 3, bits=8))
    for qparams in (activation(8, 1.0), activation(8, 1.0)._replace(spec=QuantSpec(8, axis=1, rows="token"))):
        with pytest.raises(ValueError, match=r"it takes \[N, C, H, W\]"):
            triton.conv2d(torch.zeros(8, 5, 5), qparams, conv, None, (1, 1), (1, 1), (1, 1), 1)
    params = [activation(8, 128.0)] * 4
    with pytest.raises(ValueError, match="attention of q"):
        triton.attention(torch.zeros(2, 5, 8), torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), params, 0.3)


@pytest.mark.gpu
def test_calls_wait_for_nothing_and_replay_from_a_cuda_graph():
    """Input, timestep and with it the group of the scales change between replays."""
    with torch.device("cpu"):
        groups = TimeGroups([900, 500, 100])
    quantizer = Quantizer(QuantSpec(8), groups=groups)
    quantizer.scale.data = torch.tensor([0.01, 0.03, 0.05])
    quantizer.zero_point = torch.tensor([120.0, 100.0, 90.0])
    probability = activation(8, 0.0, 0.4 / 255)
    dense, conv = triton.pack(weight(40, 32, bits=4)), triton.pack(weight(32, 32, 3, 3, bits=8))
    x, timestep = torch.randn(2, 32, 8, 8), torch.tensor([900, 900])

    def step():
        groups.enter(timestep)
        y = triton.conv2d(x, quantizer(x), conv, None, (1, 1), (1, 1), (1, 1), 1).flatten(2).transpose(1, 2)
        y = triton.attention(y, y, y, [*[quantizer(y)] * 3, probability], 0.2)
        return triton.linear(y, quantizer(y), dense, None)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # times the tilings
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in (900, 400, 0):
        x.normal_()
        timestep.fill_(t)
        graph.replay()
        assert torch.equal(captured, step())


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize(
    "recipe", [{"method": "rtn", "samples": 8}, {"method": "dynamic", "dynamic": "token"}], ids=str
)
def test_whole_denoisers(bits, recipe, request):
    """Codes at ties differ, and what follows multiplies the difference; it stays below the error of quantization."""
    import quest
    from quest.quantization.placement import place

    with torch.device("cpu"):
        pipe, calibration = (request.getfixturevalue(f"uncond_{what}") for what in ("pipe", "calibration"))
        denoiser = quest.quantize(pipe, bits=bits, calibration=calibration, **recipe).unet
    inputs = {name: t.to(DEVICE) for name, t in calibration.inputs(torch.arange(4)).items()}
    target = calibration.target[:4].to(DEVICE)
    denoiser.to(DEVICE)
    assert place(denoiser, "triton") == ("triton", {})
    y = denoiser(**inputs).sample
    place(denoiser, "reference")
    e = denoiser(**inputs).sample
    assert 0 < (y - e).square().sum() < 0.5 * (e - target).square().sum()


if not INTERPRETED:
    needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

    @needs_triton
    def test_interpreted():
        """The tests that compute, here and in test_triton_rows.py, on a CPU."""
        options = ["--noconftest", "-p", "no:cacheprovider", "-q", "-W", "ignore::RuntimeWarning"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, __file__, Path(__file__).with_name("test_triton_rows.py")],
            capture_output=True,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            encoding="utf-8",
        )
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
