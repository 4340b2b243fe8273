"""Layers of the shipped models (1 and 64 images) and six of Stable Diffusion v1.4 (1 image): every kernel, and fp32.

`pytest tests/benchmarks --benchmark-group-by=group --benchmark-columns=median,iqr,rounds`: compare within one run, on a
machine that does nothing else. Weights are random; speed does not depend on them. One thread.
"""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from quest.affine import QParams, QTensor, QuantSpec
from quest.kernels import integer, reference


class Layer(NamedTuple):
    """A convolution (kernel 1 or 3) or, with kernel 0, a linear layer over `size` x `size` tokens."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    size: int
    stride: int = 1
    batch: tuple[int, ...] = (1, 64)


LAYERS = (
    Layer("zoo conv_in", 8, 48, 3, 8),
    Layer("zoo conv 48", 48, 48, 3, 8),
    Layer("zoo conv 144 > 48", 144, 48, 3, 8),
    Layer("zoo conv 96", 96, 96, 3, 4),
    Layer("zoo conv 96 upsampled", 96, 96, 3, 8),
    Layer("zoo downsampler", 48, 48, 3, 8, stride=2),
    Layer("zoo shortcut", 144, 48, 1, 8),
    Layer("zoo to_q", 48, 48, 0, 8),
    Layer("zoo feed-forward in", 48, 384, 0, 8),
    Layer("zoo feed-forward out", 192, 48, 0, 8),
    Layer("sd14 conv 320", 320, 320, 3, 64, batch=(1,)),
    Layer("sd14 conv 1280", 1280, 1280, 3, 16, batch=(1,)),
    Layer("sd14 downsampler 320", 320, 320, 3, 64, stride=2, batch=(1,)),
    Layer("sd14 to_q 320", 320, 320, 0, 64, batch=(1,)),
    Layer("sd14 feed-forward in 640", 640, 5120, 0, 32, batch=(1,)),
    Layer("sd14 feed-forward out 1280", 5120, 1280, 0, 16, batch=(1,)),
)
HEADS = {  # batch, heads, queries, keys, channels
    "zoo self-attention": (64, 4, 64, 64, 12),
    "zoo cross-attention": (64, 4, 64, 20, 12),
    "sd14 cross-attention": (1, 8, 4096, 77, 40),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def quantizer(bits: int, scale: float, zero_point: float) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point), QuantSpec(bits))


@pytest.mark.parametrize("how", ["fp32", "reference", "w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize(
    "layer, batch", [(layer, b) for layer in LAYERS for b in layer.batch], ids=lambda v: getattr(v, "name", v)
)
def test_layer(benchmark, layer, batch, how):
    benchmark.group = f"{layer.name}, batch {batch}"
    torch.manual_seed(0)
    weight_bits, bits = (int(how[1]), int(how[3])) if how[0] == "w" else (8, 8)
    shape = (layer.outputs, layer.inputs) + (layer.kernel,) * 2 * (layer.kernel > 0)
    column = (layer.outputs,) + (1,) * (len(shape) - 1)
    codes = torch.randint(0, 2**weight_bits, shape).float()
    weight = QTensor(codes, torch.full(column, 0.01), torch.full(column, 2.0 ** (weight_bits - 1)))
    x = torch.randn(batch, layer.inputs, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    bias, qparams = torch.randn(layer.outputs), quantizer(bits, 8 / 2**bits, 2.0 ** (bits - 1))
    conv = dict(stride=(layer.stride,) * 2, padding=(layer.kernel // 2,) * 2, dilation=(1, 1), groups=1)
    kernel = reference if how == "reference" else integer
    packed = weight.dequantize() if how == "fp32" else kernel.pack(weight)
    if packed.ndim == 4 and kernel is reference:
        packed = packed.contiguous(memory_format=torch.channels_last)
    if layer.kernel:
        function = F.conv2d if how == "fp32" else kernel.conv2d
        given = (x, packed, bias) if how == "fp32" else (x, qparams, packed, bias)
        benchmark(function, *given, **conv)
    else:
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        function = F.linear if how == "fp32" else kernel.linear
        benchmark(function, *((x, packed, bias) if how == "fp32" else (x, qparams, packed, bias)))


@pytest.mark.parametrize("how", ["fp32", "reference", "integer"])
@pytest.mark.parametrize("name", HEADS)
def test_attention(benchmark, name, how):
    benchmark.group = name
    torch.manual_seed(0)
    batch, heads, n, m, d = HEADS[name]
    q, k, v = (torch.randn(batch, rows, heads * d).unflatten(2, (heads, d)).transpose(1, 2) for rows in (n, m, m))
    params = [quantizer(8, 0.03, 128.0)] * 3 + [quantizer(8, 1 / 255, 0.0)]
    if how == "fp32":
        benchmark(F.scaled_dot_product_attention, q, k, v)
    elif how == "integer":
        benchmark(integer.attention, q, k, v, *params, d**-0.5)
    else:
        benchmark(lambda: reference.attention(*(t.flatten(0, 1) for t in (q, k, v)), *params, d**-0.5))
