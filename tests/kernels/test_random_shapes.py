"""Random layers over the whole range of what the integer kernel says it supports: exact, on every instruction set."""

import random
from dataclasses import replace

import pytest
import torch
from operands import activation, exact, needs_core, weight
from torch.nn import functional as F

from quest.affine import QParams, QuantSpec
from quest.kernels import reference
from quest.kernels.cpu import integer

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]
CASES = 300
LAYOUTS = (
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
)


def quantized(draw: random.Random, shape: tuple[int, ...]):
    """An input with its range, and a weight of that shape with scales of 1: what comes out is the sum itself."""
    bits, spec = draw.choice((4, 8)), QuantSpec(draw.choice((2, 4, 8)), symmetric=draw.random() < 0.2)
    w = weight(*shape, bits=bits, outside=draw.random() < 0.3)
    w = replace(w, scale=torch.ones_like(w.scale))
    inside = draw.randint(spec.qmin, spec.qmax)
    zero_point = 0 if spec.symmetric else draw.choice((inside, inside, inside, -draw.randint(1, 300), 900))
    qparams = QParams(torch.tensor(1.0), torch.tensor(float(zero_point)), spec)
    of_all_groups = QParams(*(t[None] for t in qparams[:2]), spec)
    return w, qparams, of_all_groups


def values(qparams: QParams, *shape: int) -> torch.Tensor:
    middle = (qparams.spec.qmin + qparams.spec.qmax) / 2 - qparams.zero_point
    return torch.randn(shape) * 2.0 ** (qparams.spec.bits - 2) + middle


def test_convolutions(isa):
    """Kernels, strides, paddings and dilations of any size, each side its own: padding wider than the kernel, strides
    that skip pixels, inputs that are smaller than the kernel but for their padding, and no samples."""
    draw = random.Random(0)
    torch.manual_seed(0)
    tried = 0
    while tried < CASES:
        kernel, stride, padding, dilation, size = (
            (draw.randint(low, high), draw.randint(low, high))
            for low, high in ((1, 5), (1, draw.choice((1, 3, 9))), (0, draw.choice((1, 3, 9))), (1, 3), (1, 12))
        )
        channels, outputs, samples = draw.randint(1, 40), draw.randint(1, 40), draw.choice((0, 1, 2, 3))
        if draw.random() < 0.3:
            kernel, dilation = draw.choice(((1, 1), (3, 3))), (1, 1)
        if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
            continue
        w, qparams, of_all_groups = quantized(draw, (outputs, channels, *kernel))
        conv = dict(stride=stride, padding=padding, dilation=dilation, groups=1)
        if integer.supports(w, QuantSpec(8, axis=0), of_all_groups, **conv):
            continue
        tried += 1
        x = draw.choice(LAYOUTS)(values(qparams, samples, channels, *size))
        expected = exact(x, qparams, w, lambda a, b, conv=conv: F.conv2d(a, b, **conv)).float()
        y = integer.conv2d(x, qparams, integer.pack(w), None, **conv)
        assert torch.equal(y, expected), (kernel, stride, padding, dilation, x.shape, outputs, qparams)
        residual = torch.randn_like(y)
        y = integer.conv2d(x, qparams, integer.pack(w), None, **conv, residual=residual)
        assert torch.equal(y, expected + residual)


def test_linear_layers(isa):
    draw = random.Random(1)
    torch.manual_seed(1)
    for _ in range(CASES):
        rows, channels, outputs = draw.choice((0, 1, 5, 97, 300)), draw.randint(1, 200), draw.randint(1, 90)
        w, qparams, of_all_groups = quantized(draw, (outputs, channels))
        if integer.supports(w, QuantSpec(8, axis=0), of_all_groups):
            continue
        x = values(qparams, rows, channels + 3)[:, draw.choice((0, 3)) :][:, :channels]
        expected = exact(x, qparams, w, F.linear).float()
        assert torch.equal(integer.linear(x, qparams, integer.pack(w), None), expected)
        residual = torch.randn(rows, outputs)
        assert torch.equal(integer.linear(x, qparams, integer.pack(w), None, residual=residual), expected + residual)


def test_attentions(isa):
    """Sums of probabilities in codes: a probability may take the neighbouring code where it is a tie."""
    draw = random.Random(2)
    torch.manual_seed(2)
    for _ in range(CASES // 3):
        batch, heads, d = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 70)
        n, m, bits = draw.choice((1, 7, 40)), draw.choice((1, 9, 16, 70)), draw.choice((4, 8))
        params = [activation(bits, float(draw.randint(0, 2**bits - 1)), 6 / 2**bits) for _ in range(3)]
        params.append(activation(8, 0.0, draw.choice((0.3, 1.0)) / 255))
        rows = []
        for length, p in zip((n, m, m), params, strict=False):
            x = torch.randn(batch, length, heads * d) + (2.0 ** (bits - 1) - p.zero_point) * p.scale
            rows.append(x.unflatten(2, (heads, d)).transpose(1, 2))
        if draw.random() < 0.5:
            rows = [t.contiguous() for t in rows]
        y = integer.attention(*rows, params, d**-0.5)
        e = reference.attention(*(t.flatten(0, 1) for t in rows), params, d**-0.5).view(y.shape)
        assert (y - e).abs().max() <= 2.5 * params[3].scale * rows[2].abs().max()
        assert ((y - e).abs() > 1e-5 * e.abs().max()).float().mean() < 0.1
