"""The contenders that compute a single layer: the suite's kernels, torch, oneDNN, torchao and OpenVINO.

Weights and inputs are random, because speed does not depend on them; only Winograd's algorithm expects weights as large
as trained ones.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import nn
from torch.nn import functional as F

from quest import export
from quest.affine import QParams, QuantSpec, quantize
from quest.benchmark.machine import has_bf16, missing
from quest.benchmark.shapes import Layer
from quest.benchmark.stopwatch import seconds_of
from quest.kernels import reference
from quest.kernels.cpu import integer
from quest.quantization import ranges

SUITE_KERNELS = ("reference w8a8", "integer w8a8", "integer w4a8", "integer w4a4")
LAYER_KERNELS = (
    "fp32", "fp32 prepacked", "bf16", "bf16 prepacked", *SUITE_KERNELS,
    "oneDNN int8", "torchao int8", "OpenVINO int8",
)  # fmt: skip
ATTENTION_KERNELS = ("fp32", "bf16", "reference w8a8", "integer w8a8")
SLOW = 5  # a contender that takes longer than this many times fp32 on the probe is not measured
PROBE = (1, 64 * 64, 320, 320)  # batch, rows, inputs, outputs of a linear layer


def bits_of(kernel: str) -> tuple[int, int]:
    """(weight bits, activation bits) in a contender's name: "integer w4a8, softmax 16 bits" -> (4, 8)."""
    bits = next(word for word in kernel.replace(",", "").split() if word[0] == "w" and "a" in word)
    return int(bits[1 : bits.index("a")]), int(bits[bits.index("a") + 1 :])


def qparams(bits: int, width: float = 8.0, zero_point: float | None = None) -> QParams:
    """Parameters of a range of `width` around zero, such that normal inputs use all codes."""
    zero_point = 2.0 ** (bits - 1) if zero_point is None else zero_point
    return QParams(torch.tensor(width / 2**bits), torch.tensor(zero_point), QuantSpec(bits))


def contenders(layer: Layer, batch: int, names: tuple[str, ...]) -> dict[str, Callable[[], object] | str]:
    """Contender -> a function that computes a layer on a float32 batch, or the reason why there is no such function."""
    make = {"conv2d": _conv2d, "linear": _linear, "attention": _attention}[layer.kind]
    calls = {}
    for name in names:
        torch.manual_seed(0)  # the same weight and input for all
        try:
            calls[name] = absent(name) or make(layer, batch, name)
        except Exception as error:
            if name in SUITE_KERNELS:
                raise
            calls[name] = failed(error)  # private functions of torch and of other projects may change
    return calls


def failed(error: Exception) -> str:
    """Format an error of another project's code as the reason why a contender is not measured."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def _conv2d(layer, batch, name):
    x = torch.randn(batch, *layer.input).contiguous(memory_format=torch.channels_last)
    weight, bias = _weight(layer)
    stride, padding, dilation = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
    conv = dict(stride=stride, padding=padding, dilation=dilation, groups=1)
    if name in SUITE_KERNELS:
        kernel, packed = _packed(layer, name)
        return partial(kernel.conv2d, x, qparams(bits_of(name)[1]), packed, bias, **conv)
    if name.startswith("bf16"):
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    if name in ("fp32", "bf16"):
        return partial(F.conv2d, x, weight, bias, **conv)
    if "prepacked" in name:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, 1, list(x.shape))
        call = torch.ops.mkldnn._convolution_pointwise
        return partial(call, x, packed, bias, padding, stride, dilation, 1, "none", [], "")
    if name == "oneDNN int8":
        codes, scales, zero_points = _int8(weight)
        step, zero = 8 / 256, 128
        packed = torch.ops.onednn.qconv_prepack(
            codes, scales, step, zero, stride, padding, dilation, 1, list(x.shape)
        )  # fmt: skip

        def call():
            return torch.ops.onednn.qconv_pointwise(
                _uint8(x, step, zero), step, zero, packed, scales, zero_points, bias, stride, padding, dilation, 1,
                1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip

        return call
    if name == "torchao int8":
        return "torchao computes no convolutions on integers"
    return _openvino_layer(layer, x.permute(0, 2, 3, 1), weight)


def _linear(layer, batch, name):
    x = torch.randn(batch, *layer.input)
    weight, bias = _weight(layer)
    if name in SUITE_KERNELS:
        kernel, packed = _packed(layer, name)
        return partial(kernel.linear, x, qparams(bits_of(name)[1]), packed, bias)
    if name.startswith("bf16"):
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    if name in ("fp32", "bf16"):
        return partial(F.linear, x, weight, bias)
    rows = x.numel() // layer.input[-1]
    if name == "fp32 prepacked" and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return partial(torch.ops.mkl._mkl_linear, x, packed, weight, bias, rows)
    if "prepacked" in name:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias, "none", [], "")
    if name == "oneDNN int8":
        codes, scales, zero_points = _int8(weight)
        packed = torch.ops.onednn.qlinear_prepack(codes, list(x.shape))
        step, zero = 8 / 256, 128

        def call():
            return torch.ops.onednn.qlinear_pointwise(
                _uint8(x, step, zero), step, zero, packed, scales, zero_points, bias, 1.0, 0, torch.float32, "none",
                [], "",
            )  # fmt: skip

        return call
    if name == "torchao int8":
        return partial(_torchao(weight, bias), x)
    return _openvino_layer(layer, x, weight)


def _attention(layer, batch, name):
    tokens, channels = layer.input
    q, k, v = (
        torch.randn(batch, n, channels).unflatten(2, (layer.heads, -1)).transpose(1, 2)
        for n in (tokens, layer.keys, layer.keys)
    )  # [B, heads, n, d]
    scale = (channels // layer.heads) ** -0.5
    if name in ("fp32", "bf16"):
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        return partial(F.scaled_dot_product_attention, *(t.to(dtype) for t in (q, k, v)))
    params = [qparams(8)] * 3 + [qparams(8, 256 / 255, 0.0)]
    if name.startswith("integer"):
        return partial(integer.attention, q, k, v, params, scale)
    return lambda: reference.attention(*(t.flatten(0, 1) for t in (q, k, v)), params, scale)


@lru_cache(1)
def _weight(layer):
    """Weight and bias of a layer, the same for all batches and contenders."""
    torch.manual_seed(1)
    if layer.kind == "linear":
        weight = torch.randn(layer.outputs, layer.input[-1])
    else:
        weight = torch.randn(layer.outputs, layer.input[0], layer.kernel, layer.kernel)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, torch.randn(layer.outputs)


@lru_cache(len(SUITE_KERNELS))
def _packed(layer, name):
    weight, _ = _weight(layer)
    spec = QuantSpec(bits_of(name)[0], axis=0)
    kernel = reference if name.startswith("reference") else integer
    packed = kernel.pack(quantize(weight, QParams(*ranges.minmax(weight, spec), spec)))
    if kernel is reference and layer.kind == "conv2d":
        packed = packed.contiguous(memory_format=torch.channels_last)
    return kernel, packed


def _int8(weight):
    """Signed codes, scales and zero points of a weight, quantized symmetrically as oneDNN expects."""
    scales = weight.abs().flatten(1).amax(1) / 127
    codes = (weight / scales.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
    return codes, scales, torch.zeros(len(weight), dtype=torch.int64)


def _uint8(x, step, zero):
    return torch.quantize_per_tensor(x, step, zero, torch.quint8).int_repr()


def _torchao(weight, bias):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    holder[0].weight.data, holder[0].bias.data = weight, bias
    quantize_(holder, Int8DynamicActivationInt8WeightConfig())
    return holder[0]


def _openvino_layer(layer, x, weight):
    """A layer with two 8-bit operands. OpenVINO itself converts the FakeQuantize nodes to integer operations."""
    import numpy as np
    import openvino
    from openvino import opset13 as op

    def fake_quantize(node, low, high, levels):
        low, high = (op.constant(np.asarray(limit, np.float32)) for limit in (low, high))
        return op.fake_quantize(node, low, high, low, high, levels)

    largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1)).numpy()
    weight = fake_quantize(op.constant(weight.contiguous().numpy()), -largest, largest, 255)
    source = op.parameter(list(x.shape), np.float32)
    quantized = fake_quantize(source, -4.0, 4.0 - 8 / 256, 256)
    if layer.kind == "linear":
        result = op.matmul(quantized, weight, False, True)
    else:
        channels_first, channels_last = (op.constant(np.array(order)) for order in ([0, 3, 1, 2], [0, 2, 3, 1]))
        strides, pads = [layer.stride] * 2, [layer.padding] * 2
        convolved = op.convolution(op.transpose(quantized, channels_first), weight, strides, pads, pads, [1, 1])
        result = op.transpose(convolved, channels_last)
    compiled = compiled_openvino(openvino.Model([op.result(result)], [source]))
    return partial(compiled, [x.contiguous().numpy()])


def compiled_openvino(network, accurate: bool = False) -> Callable:
    """A function of the inputs, a list or a dict of arrays, that runs an OpenVINO network and returns its first output.

    It has the number of threads that torch is set to now, and computes in bf16 where the processor can. accurate: all
    that is not quantized in float32, and no input is quantized once more. The next call overwrites the output.
    """
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if accurate:
        options["EXECUTION_MODE_HINT"] = "ACCURACY"
    else:
        options["INFERENCE_PRECISION_HINT"] = "bf16" if has_bf16() else "f32"
    compiled = openvino.Core().compile_model(network, "CPU", options)
    return lambda inputs: compiled(inputs, share_inputs=True, share_outputs=True)[0]


@cache
def absent(name: str) -> str | None:
    """Why a contender is not measured on this machine; None if it is. Determined once, with one thread."""
    if "w8a8" in name and name.startswith(("OpenVINO", "onnxruntime")):
        return missing(*export.NEEDED[".xml" if name.startswith("OpenVINO") else ".onnx"])
    if name.startswith("OpenVINO"):
        return missing("openvino", "nncf") if name.endswith("int8") else missing("openvino")
    if name.startswith("integer"):
        return integer.unavailable(torch.device("cpu"))
    if name.startswith("bf16") and not has_bf16():
        return f"no bf16 instructions, {_slowdown('bf16'):.1f} times as long as fp32 on a probe"
    if name == "torchao int8":
        if reason := missing("torchao"):
            return reason
        if (slower := _slowdown(name)) > SLOW:
            return f"{slower:.1f} times as long as fp32 on a probe"
    return None


def _slowdown(name):
    """How many times as long as fp32 a linear layer takes, from one run of each."""
    batch, rows, inputs, outputs = PROBE
    layer, threads = Layer("linear", "probe", (rows, inputs), outputs), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for call in (_linear(layer, batch, "fp32"), _linear(layer, batch, name)):
        call()
        seconds.append(seconds_of(call))
    torch.set_num_threads(threads)
    return seconds[1] / seconds[0]
