"""Dynamic formats in the Triton kernel, whose scales are of rows, pixels or samples, against the reference.

How these tests run says `on_triton`.
"""

import pytest
import torch
from on_triton import close, computes, poison, setting  # noqa: F401
from operands import activation, weight

from quest.affine import QParams, QTensor, QuantSpec, fake_quantize
from quest.kernels import reference
from quest.kernels.triton import kernel as triton


def of_rows(bits: int, axis: int, rows: str = "token") -> QParams:
    """Parameters of a dynamic format whose codes reach 0.9 of a range."""
    return QParams(torch.tensor(0.9), torch.tensor(0.0), QuantSpec(bits, axis=axis, rows=rows))


@computes
@pytest.mark.parametrize("rows", ["token", "tensor"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(2, 19, 33), (37, 33), (1, 33), (3, 2, 4, 33)])
def test_scales_of_rows_in_a_linear_layer(monkeypatch, rows, fused, bits, shape):
    """An identity weight shows the codes themselves, other weights products of them."""
    poison(monkeypatch)
    monkeypatch.setattr(triton, "FUSED_OUTPUTS", 33 if fused else 0)
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None] + 0.3
    x[0] = 0.0 if rows == "tensor" else x[0]  # a sample of zeros
    qparams = of_rows(bits, -1, rows)
    eye = QTensor(torch.eye(33) * 16, torch.full((33, 1), 1 / 16), torch.zeros(33, 1))
    assert torch.equal(triton.linear(x, qparams, triton.pack(eye), None), fake_quantize(x, qparams) + 0.0)
    w, b = weight(33, 33, bits=bits, outside=True), torch.randn(33)
    close(*(k.linear(x, qparams, k.pack(w), b) for k in (triton, reference)))


@computes
@pytest.mark.parametrize("rows", ["token", "tensor"])
@pytest.mark.parametrize(
    "size, conv",
    [
        (3, {}),
        (3, {"stride": (2, 2), "padding": (0, 1)}),
        (3, {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
        (1, {"padding": (0, 0)}),
        (1, {"padding": (0, 0), "stride": (2, 2)}),
        (1, {}),
    ],
)
def test_scales_of_pixels_and_samples_in_a_convolution(monkeypatch, rows, size, conv):
    poison(monkeypatch)
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1) | conv
    x = torch.randn(3, 40, 6, 5) * torch.logspace(-2, 1, 30).view(6, 5) + 0.2
    for bits in (4, 8):
        w, b = weight(17, 40, size, size, bits=bits, outside=True), torch.randn(17)
        y, e = (k.conv2d(x, of_rows(bits, 1, rows), k.pack(w), b, **conv) for k in (triton, reference))
        close(y, e)
        alone = triton.conv2d(x[1:2], of_rows(bits, 1, rows), triton.pack(w), b, **conv)
        assert torch.equal(alone, y[1:2]) and y.is_contiguous(memory_format=torch.channels_last)


@computes
@pytest.mark.parametrize("rows", ["token", "tensor"])
def test_one_pixel_with_its_own_scale_is_as_in_a_batch(rows):
    conv, w = ((1, 1), (1, 1), (1, 1), 1), triton.pack(weight(4, 40, 3, 3, bits=4))
    x = torch.randn(3, 40, 1, 1)
    y = triton.conv2d(x, of_rows(8, 1, rows), w, None, *conv)
    assert all(torch.equal(triton.conv2d(x[i : i + 1], of_rows(8, 1, rows), w, None, *conv)[0], y[i]) for i in range(3))
    x, w = torch.full((1, 20, 1, 1), torch.nan), triton.pack(weight(4, 20, 1, 1, bits=8))
    y = triton.conv2d(x, of_rows(8, 1, rows), w, None, *conv)
    assert y[:, :, 1, 1].isnan().all() and y.isnan().sum() == 4  # not where there is only padding


@computes
def test_layers_with_scales_of_rows_are_compiled():
    dense, conv = triton.pack(weight(8, 16, bits=8)), triton.pack(weight(16, 8, 3, 3, bits=4))

    def layers(x):
        y = triton.conv2d(x, of_rows(8, 1), conv, None, (1, 1), (1, 1), (1, 1), 1)
        return triton.linear(y.flatten(2).transpose(1, 2), of_rows(8, -1), dense, None)

    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(torch.compile(layers, backend="eager", fullgraph=True)(x), layers(x))


@computes
@pytest.mark.parametrize("which", ["qkvp", "q", "k", "v", "p"])
def test_scales_of_tokens_in_attention(monkeypatch, which):
    poison(monkeypatch)
    rows = [torch.randn(2, length, 24).unflatten(2, (2, 12)).transpose(1, 2) for length in (7, 20, 20)]
    rows[1] = rows[1] * torch.logspace(-1, 0.5, 20)[:, None]
    params = [activation(8, 128.0, 12 / 255)] * 3 + [activation(8, 0.0, 1 / 255)]
    for name in which:
        params["qkvp".index(name)] = of_rows(8, -2 if name == "v" else -1)
    three = [t.flatten(0, 1) for t in rows]
    y = triton.attention(*rows, params, 0.3)
    e = reference.attention(*three, params, 0.3).reshape(y.shape)
    # A probability at a tie may take the neighbouring code: a step of its scale times the largest value.
    assert (y - e).abs().max() <= 2.5 / 255 * rows[2].abs().max()
    assert ((y - e).abs() > 1e-5 * e.abs().max()).float().mean() < 0.05
    assert torch.equal(triton.attention(*three, params, 0.3), y.flatten(0, 1))


@computes
def test_nan_in_a_row_with_its_own_scale_stays_there():
    x = torch.ones(3, 20)
    x[1, 4] = torch.nan
    y = triton.linear(x, of_rows(8, -1), triton.pack(weight(4, 20, bits=8)), None)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    x = torch.ones(2, 20, 5, 5)
    x[0, 3, 0, 0] = torch.nan
    w, conv = triton.pack(weight(4, 20, 3, 3, bits=4)), ((1, 1), (1, 1), (1, 1), 1)
    y = triton.conv2d(x, of_rows(8, 1), w, None, *conv)
    assert y[0, :, :2, :2].isnan().all() and y.isnan().sum() == 4 * 4
    y = triton.conv2d(x, of_rows(8, 1, "tensor"), w, None, *conv)
    assert y[0].isnan().all() and y[1].isfinite().all()
    with pytest.raises(RuntimeError, match="train on the reference"), torch.enable_grad():
        triton.linear(torch.ones(2, 20, requires_grad=True), of_rows(8, -1), w, None)
