"""How long layers and whole denoiser steps take on the integer kernel, and on what else computes them on this machine.

Every contender of a comparison runs once in every round, so that what else a machine does falls on all of them, and a
speedup is the median of the rounds' own ratios. Weights and inputs are random: speed does not depend on them, but for
Winograd's algorithm, which takes weights of the size that trained ones have. What cannot be measured is said, too.
"""

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from quest import origins, ranges, timing
from quest.affine import QParams, QuantSpec, quantize
from quest.kernels import integer, reference
from quest.layers import attentions, layer_class, quant_layers, swap
from quest.models import MODELS, Model
from quest.placement import place
from quest.provenance import provenance
from quest.report import speed

ZOO = ("scenes-uncond", "scenes-class", "scenes-text")
PAPER = ("sd14", "lsun-bedrooms")  # Stable Diffusion v1.4 and LDM-4
# Of Stable Diffusion, one of each kind: measured first where time is short.
FIRST = (
    "residual convolution 320 > 320, 3x3, 64x64",
    "residual convolution 1280 > 1280, 3x3, 16x16",
    "resampling 320 > 320, 3x3, 64x64, stride 2",
    "attention q, k, v 320 > 320, 4096 rows",
    "feed-forward 640 > 5120, 1024 rows",
    "feed-forward 5120 > 1280, 256 rows",
)
OWN = ("reference w8a8", "integer w8a8", "integer w4a8", "integer w4a4")
LAYER_KERNELS = (
    "fp32", "fp32 prepacked", "bf16", "bf16 prepacked", *OWN, "oneDNN int8", "torchao int8", "OpenVINO int8",
)  # fmt: skip
ATTENTION_KERNELS = ("fp32", "bf16", "reference w8a8", "integer w8a8")
FLOAT_STEPS = ("fp32 compiled", "bf16", "bf16 compiled", "OpenVINO fp32", "OpenVINO int8")
SLOW = 5  # times fp32: from here on a probe says enough
PROBE = (1, 64 * 64, 320, 320)  # batch, rows, inputs, outputs of a linear layer


class Layer(NamedTuple):
    """A layer of a denoiser, or the two products of an attention; one of several that are alike.

    input: shape of one sample, [C, H, W] or [n, C]. kernel, stride, padding: of a convolution. heads, keys: of an
    attention, whose `outputs` are the channels of all heads. count: how many of these the denoiser has.
    """

    kind: str  # "conv2d", "linear" or "attention"
    role: str
    input: tuple[int, ...]
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    heads: int = 0
    keys: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        if self.kind == "attention":
            tokens, channels = self.input
            return f"{self.role} {self.heads} x {channels // self.heads}, {tokens} queries, {self.keys} keys"
        if self.kind == "linear":
            return f"{self.role} {self.input[-1]} > {self.outputs}, {math.prod(self.input[:-1])} rows"
        channels, height, width = self.input
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.role} {channels} > {self.outputs}, {self.kernel}x{self.kernel}, {height}x{width}{stride}"

    @property
    def output(self) -> tuple[int, ...]:
        if self.kind != "conv2d":
            return (*self.input[:-1], self.outputs)
        return (self.outputs, *((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.input[1:]))

    @property
    def weights(self) -> int:
        """Numbers in the weight, without the bias."""
        channels = self.input[0] if self.kind == "conv2d" else self.input[-1]
        return 0 if self.kind == "attention" else self.outputs * channels * self.kernel**2

    def macs(self, batch: int) -> int:
        """Multiply-accumulates."""
        if self.kind == "attention":
            return 2 * batch * self.input[0] * self.keys * self.outputs
        return batch * math.prod(self.output) // self.outputs * self.weights

    def bytes(self, batch: int, weight_bits: int) -> float:
        """Bytes that are read and written at least: float activations, and the weight."""
        read = math.prod(self.input)
        if self.kind == "attention":
            read += 2 * self.keys * self.outputs
        return 4 * batch * (read + math.prod(self.output)) + self.weights * weight_bits / 8


def layers(model: Model) -> list[Layer]:
    """The different layers and attentions of a model's denoiser as published, in the order in which they run.

    Traced on the meta device: no weights are needed.
    """
    denoiser = origins.denoiser(model)
    found: dict[Layer, int] = {}

    def note(layer):
        found[layer] = found.get(layer, 0) + 1

    def linear_or_conv(name):
        def hook(module, args):
            shape, role = tuple(args[0].shape[1:]), layer_class(name)
            if isinstance(module, nn.Linear):
                note(Layer("linear", role, shape, module.out_features))
            else:
                side, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
                note(Layer("conv2d", role, shape, module.out_channels, side, stride, padding))

        return hook

    def products(module, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        tokens = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
        role, keys = ("self-attention", tokens) if context is None else ("cross-attention", context.shape[1])
        channels = module.to_q.out_features
        note(Layer("attention", role, (tokens, channels), channels, heads=module.heads, keys=keys))

    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(linear_or_conv(name))
        elif isinstance(module, Attention):
            module.register_forward_pre_hook(products, with_kwargs=True)
    with torch.no_grad():
        denoiser(**timing.inputs(denoiser, model, 1, "meta"))
    return [layer._replace(count=count) for layer, count in found.items()]


def bits_of(kernel: str) -> tuple[int, int]:
    """(weight bits, activation bits) in a contender's name: "integer w4a8, softmax 16 bits" -> (4, 8)."""
    found = next(word for word in kernel.replace(",", "").split() if word[0] == "w" and "a" in word)
    return int(found[1 : found.index("a")]), int(found[found.index("a") + 1 :])


def qparams(bits: int, width: float = 8.0, zero_point: float | None = None) -> QParams:
    """A range of `width` around zero, of all of whose codes normal inputs make use."""
    zero_point = 2.0 ** (bits - 1) if zero_point is None else zero_point
    return QParams(torch.tensor(width / 2**bits), torch.tensor(zero_point), QuantSpec(bits))


def contenders(layer: Layer, batch: int, names: tuple[str, ...]) -> dict[str, Callable[[], object] | str]:
    """Functions that compute a layer on a batch, by contender; where there is none, why not. Inputs are float32."""
    make = {"conv2d": _conv2d, "linear": _linear, "attention": _attention}[layer.kind]
    found = {}
    for name in names:
        torch.manual_seed(0)  # the same weight and input for all
        try:
            found[name] = absent(name) or make(layer, batch, name)
        except Exception as error:
            if name in OWN:
                raise
            found[name] = failed(error)  # of a function that torch or another project does not promise to keep
    return found


def failed(error: Exception) -> str:
    """An error of another project's code as a reason why something is not measured."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def _conv2d(layer, batch, name):
    x = torch.randn(batch, *layer.input).contiguous(memory_format=torch.channels_last)
    weight, bias = _weight(layer)
    stride, padding, dilation = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
    conv = dict(stride=stride, padding=padding, dilation=dilation, groups=1)
    if name in OWN:
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
    if name in OWN:
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
        return partial(integer.attention, q, k, v, *params, scale)
    return lambda: reference.attention(*(t.flatten(0, 1) for t in (q, k, v)), *params, scale)


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


@lru_cache(len(OWN))
def _packed(layer, name):
    weight, _ = _weight(layer)
    spec = QuantSpec(bits_of(name)[0], axis=0)
    kernel = reference if name.startswith("reference") else integer
    packed = kernel.pack(quantize(weight, QParams(*ranges.minmax(weight, spec), spec)))
    if kernel is reference and layer.kind == "conv2d":
        packed = packed.contiguous(memory_format=torch.channels_last)
    return kernel, packed


def _int8(weight):
    """Signed codes, scales and zero points of a weight, symmetric: what oneDNN multiplies."""
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
    """A layer with both operands in eight bits: OpenVINO itself makes integers of its FakeQuantize nodes."""
    import numpy as np
    import openvino
    from openvino import opset13 as op

    def fake_quantize(node, low, high, levels):
        low, high = (op.constant(np.asarray(limit, np.float32)) for limit in (low, high))
        return op.fake_quantize(node, low, high, low, high, levels)

    largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1)).numpy()
    weight = fake_quantize(op.constant(weight.contiguous().numpy()), -largest, largest, 255)
    given = op.parameter(list(x.shape), np.float32)
    quantized = fake_quantize(given, -4.0, 4.0 - 8 / 256, 256)
    if layer.kind == "linear":
        result = op.matmul(quantized, weight, False, True)
    else:
        channels_first, channels_last = (op.constant(np.array(order)) for order in ([0, 3, 1, 2], [0, 2, 3, 1]))
        strides, pads = [layer.stride] * 2, [layer.padding] * 2
        convolved = op.convolution(op.transpose(quantized, channels_first), weight, strides, pads, pads, [1, 1])
        result = op.transpose(convolved, channels_last)
    return _compiled_openvino(openvino.Model([op.result(result)], [given]), [x.contiguous().numpy()])


def _compiled_openvino(network, inputs):
    import openvino

    precision = "bf16" if has_bf16() else "f32"
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(network, "CPU", options | {"INFERENCE_PRECISION_HINT": precision})
    return partial(compiled, inputs, share_inputs=True, share_outputs=True)


@cache
def absent(name: str) -> str | None:
    """Why a contender is not measured on this machine, found out once, with one thread; None where it is."""
    if name.startswith("OpenVINO"):
        return _missing("openvino", "nncf") if name.endswith("int8") else _missing("openvino")
    if name.startswith("integer"):
        return integer.unavailable(torch.device("cpu"))
    if name.startswith("bf16") and not has_bf16():
        return f"no bf16 instructions, {_slowdown('bf16'):.1f} times as long as fp32 on a probe"
    if name == "torchao int8":
        if reason := _missing("torchao"):
            return reason
        if (slower := _slowdown(name)) > SLOW:
            return f"{slower:.1f} times as long as fp32 on a probe"
    return None


def _missing(*packages):
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f'{package} is not installed: pip install -e ".[kernels]"'
    return None


def _slowdown(name):
    """Times as long as fp32 a linear layer takes, one run of each."""
    batch, rows, inputs, outputs = PROBE
    layer, threads = Layer("linear", "probe", (rows, inputs), outputs), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for call in (_linear(layer, batch, "fp32"), _linear(layer, batch, name)):
        call()
        seconds.append(_seconds(call))
    torch.set_num_threads(threads)
    return seconds[1] / seconds[0]


@cache
def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16; without them torch converts back and forth."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" in text


def interleaved(calls: dict[str, Callable], seconds: float, rounds: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds of every call in each of some rounds, {name: [rounds]}.

    Each runs once before (twice if it is short). Short ones are repeated until they take two milliseconds, of which the
    mean counts. There are as many rounds as fit into `seconds`, within `rounds`; each begins with another call.
    """
    repeats, estimate = {}, 0.0
    for name, call in calls.items():
        took = _seconds(call)
        took = took if took > 0.5 else _seconds(call)
        repeats[name] = math.ceil(2e-3 / took)
        estimate += took * repeats[name]
    number = min(max(int(seconds / estimate), rounds[0]), rounds[1])
    names, found = list(calls), {name: [] for name in calls}
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(_seconds(calls[name], repeats[name]))
    return found


def _seconds(call, repeats=1):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def peaks(threads: int) -> dict[str, float]:
    """What the machine allows: GOP/s (two to a multiply-accumulate) of the integer kernel's own instructions and of
    float32's, on registers alone, and GB/s of a copy that no cache holds. Raises AttributeError for an older core."""
    peak = integer.core().quest_peak
    peak.restype, peak.argtypes = integer.ctypes.c_int64, [integer.ctypes.c_char_p, integer.ctypes.c_int64]
    found = {}

    def rate(isa):
        start = time.thread_time()  # not wall time: it is registers that are measured, whoever else computes
        return 2e-9 * peak(isa.encode(), 5_000_000) / (time.thread_time() - start)

    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        for name, isa in (("integer", integer.best()), ("fp32", "float")):
            found[name] = max(sum(pool.map(rate, [isa] * threads)) for _ in range(5)) or math.nan
    source = torch.ones(64 << 20)  # 256 MB
    target = torch.empty_like(source)
    target.copy_(source)
    found["memory"] = 2e-9 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(7))
    return found


class Timers:
    """Seconds in the compiled core's functions while the context lasts, by what they compute."""

    KINDS = {
        "quest_linear": "layers",
        "quest_conv2d": "layers",
        "quest_attention": "attention",
        "quest_group_norm": "norms",
        "quest_layer_norm": "norms",
    }

    def __enter__(self) -> dict[str, float]:
        self.functions = {name: getattr(integer.core(), name) for name in self.KINDS}
        spent = dict.fromkeys(self.KINDS.values(), 0.0)

        def timed(function, kind):
            def call(*arguments):
                start = time.perf_counter()
                result = function(*arguments)
                spent[kind] += time.perf_counter() - start
                return result

            return call

        for name, function in self.functions.items():
            setattr(integer.core(), name, timed(function, self.KINDS[name]))
        return spent

    def __exit__(self, *error) -> None:
        for name, function in self.functions.items():
            setattr(integer.core(), name, function)


def shares(call: Callable) -> dict[str, float]:
    """Shares of a denoiser step on the integer kernel: in quantized layers and attention products on integers, in fused
    norms, and in all the rest, which is float (and Python)."""
    with Timers() as spent:
        whole = _seconds(call)
    found = {kind: seconds / whole for kind, seconds in spent.items()}
    return found | {"rest": 1 - sum(found.values())}


@lru_cache(1)
def full_precision(name: str) -> nn.Module:
    """A model's denoiser as published, with random weights, channels innermost."""
    torch.manual_seed(0)
    return origins.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last).requires_grad_(False)


def quantized(name: str, kernel: str) -> nn.Module:
    """The same quantized and placed, without its float weights; ranges suit random inputs. kernel: see `own`."""
    model = MODELS[name]
    softmax_bits = model.softmax_bits if "softmax" in kernel else 8
    pipe = SimpleNamespace(unet=full_precision(name), scheduler=None)
    denoiser = swap(pipe, *bits_of(kernel), keep=model.keep, softmax_bits=softmax_bits).unet
    for _, layer in quant_layers(denoiser):
        layer.choose_weight_range()
        _set(layer.input_quantizer, qparams(layer.input_quantizer.spec.bits))
    for _, module in attentions(denoiser):
        for quantizer in (module.processor.q, module.processor.k, module.processor.v):
            _set(quantizer, qparams(quantizer.spec.bits))
        bits = module.processor.p.spec.bits
        _set(module.processor.p, qparams(bits, 2**bits / (2**bits - 1), 0.0))
    place(denoiser, kernel.split()[0])
    for _, layer in quant_layers(denoiser):
        layer.weight.data = torch.empty(0)  # what is packed stands for it
    return denoiser


def _set(quantizer, params):
    quantizer.scale.data.fill_(params.scale)
    quantizer.zero_point.fill_(params.zero_point)


def own(model: Model) -> tuple[str, ...]:
    """The kernels of the suite that a step is measured on; attention probabilities have 8 bits unless the name says."""
    more = (f"integer w4a8, softmax {model.softmax_bits} bits",) if model.softmax_bits > 8 else ()
    return (*OWN[1:], *more, OWN[0])  # the reference last: it takes most memory


_loaded: dict[str, dict[str, nn.Module]] = {}  # the quantized denoisers of one model


def _own_denoisers(name):
    if name not in _loaded:
        _forget()
        _loaded[name] = {kernel: quantized(name, kernel) for kernel in own(MODELS[name]) if not _spared(name, kernel)}
    return _loaded[name]


def _spared(name, kernel):
    """Why a denoiser is not made for one of the suite's kernels; None where it is."""
    if name in PAPER and kernel == "integer w4a4":
        return "a gigabyte more, to multiply what integer w4a8 multiplies"
    if name in PAPER and "softmax" in kernel:
        return "a gigabyte more; its layers are those of integer w4a8, its attention is the reference's"
    return absent(kernel)


def _forget():
    _loaded.clear()
    gc.collect()


def rival(name: str, kernel: str, given: dict[str, Tensor]) -> Callable[[], object]:
    """A function that calls a model's denoiser once on one of FLOAT_STEPS, with the threads that are set now."""
    denoiser = full_precision(name)
    if kernel.startswith("bf16"):
        denoiser = _in_bf16(name)
        given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    if kernel.endswith("compiled"):
        from torch._inductor import config

        torch._dynamo.reset()
        config.freezing = True  # prepacks the weights
        return partial(torch.compile(denoiser, dynamic=False), **given)
    if kernel.startswith("OpenVINO"):
        return _openvino_step(denoiser, given, kernel.endswith("int8"))
    return partial(denoiser, **given)


@lru_cache(1)
def _in_bf16(name):
    denoiser = origins.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last)
    return denoiser.bfloat16().requires_grad_(False)


def _openvino_step(denoiser, given, int8):
    """Post-training quantization by NNCF with the preset for transformers, as its documentation has it for U-Nets."""
    import openvino

    class Prediction(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *arguments):
            return self.denoiser(**dict(zip(given, arguments, strict=True))).sample

    network = openvino.convert_model(Prediction(), example_input=tuple(given.values()))
    network.reshape({port: list(v.shape) for port, v in zip(network.inputs, given.values(), strict=True)})
    inputs = [value.numpy() for value in given.values()]
    if int8:
        import nncf

        quick = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)  # changes numbers, not how many
        network = nncf.quantize(
            network, nncf.Dataset([inputs]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=quick,
        )  # fmt: skip
    return _compiled_openvino(network, inputs)


class Point(NamedTuple):
    """What is measured at a time. kernel: "own" (the suite's) or one of FLOAT_STEPS for a step; else all there are."""

    part: str  # "peak", "layer" or "step"
    threads: int
    model: str = ""
    layer: Layer | None = None
    batch: int = 0
    kernel: str = ""

    def names(self) -> tuple[str, ...]:
        """Contenders, each a row."""
        if self.part == "peak":
            return ("integer", "fp32", "memory")
        if self.part == "step":
            return ("fp32", *own(MODELS[self.model])) if self.kernel == "own" else (self.kernel,)
        return ATTENTION_KERNELS if self.layer.kind == "attention" else LAYER_KERNELS


def points(models: tuple[str, ...], threads: tuple[int, ...]) -> list[Point]:
    """Everything there is to measure, what says most about a machine first.

    Layers that two models share are measured once, under the first.
    """
    zoo, paper = ([name for name in models if (name in ZOO) == shipped] for shipped in (True, False))
    first, second, seen = [], {1: [], 2: []}, set()
    for name in models:
        for layer in layers(MODELS[name]):
            if (key := layer._replace(count=0)) in seen:
                continue
            seen.add(key)
            for batch in (1, 64) if name in ZOO else (1, 2):
                early = name in ZOO or (name == "sd14" and batch == 1 and layer.name in FIRST)
                into = first if early else second[batch]
                into += [Point("layer", n, name, layer, batch) for n in threads]

    def steps(names, batches, kernels):
        return [
            Point("step", n, name, batch=batch, kernel=kernel)
            for name in names
            for kernel in kernels
            for batch in (batches or (1, sampling_batch(MODELS[name])))
            for n in threads
        ]

    allowed = [Point("peak", n) for n in threads]
    found = allowed + first + steps(zoo, None, ("own",)) + steps(paper, (1,), ("own",))
    found += second[1] + steps(zoo, None, ("OpenVINO int8", "OpenVINO fp32", "bf16", "bf16 compiled"))
    found += second[2] + steps(paper, (2,), ("own",)) + steps(zoo, None, ("fp32 compiled",))
    rivals = ("OpenVINO int8", "OpenVINO fp32", "fp32 compiled", "bf16", "bf16 compiled")
    return found + [point for name in paper for point in steps([name], (1, 2), rivals)]


def sampling_batch(model: Model) -> int:
    """Samples of one denoiser call: both halves of a guided one."""
    return model.batch_size * (2 if model.guidance > 1 else 1)


def measure(point: Point) -> list[dict]:
    """Rows of a point, of `speed.COLUMNS`, for all of its contenders."""
    torch.set_num_threads(point.threads)
    before = _busy()
    with torch.no_grad():
        rows = {"peak": _measure_peak, "layer": _measure_layer, "step": _measure_step}[point.part](point)
    others = round(_busy_elsewhere(before), 2)
    return [row | {"others": others} for row in rows]


def measure_apart(point: Point) -> list[dict]:
    """The same in a process of its own, which a converter or compiler may take down with it."""
    _forget()
    full_precision.cache_clear()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, point).result()
        except BrokenProcessPool:
            return unmeasured(point, f"{point.kernel} crashed")


def unmeasured(point: Point, why: str) -> list[dict]:
    """Rows that say why a point's contenders are not measured."""
    return [_row(point, name) | {"note": f"not measured: {why}"} for name in point.names()]


def _row(point, kernel):
    row = {"part": point.part, "model": point.model, "batch": point.batch, "threads": point.threads, "kernel": kernel}
    if point.layer is None:
        return row
    return row | {"layer": point.layer.name, "count": point.layer.count}


def _measure_peak(point):
    try:
        found = peaks(point.threads)
    except AttributeError:
        return unmeasured(point, "the compiled core is older than its source; `pip install -e .` builds it")
    for name, value in found.items():
        if not value <= (best := _best.get((point.threads, name), 0.0)):
            _best[point.threads, name] = value
        else:
            found[name] = best
    return [_row(point, name) | {"gops" if name != "memory" else "gbs": found[name]} for name in point.names()]


_best: dict[tuple[int, str], float] = {}  # by threads and peak: a busy machine needs several tries


def _measure_layer(point):
    made = contenders(point.layer, point.batch, point.names())
    seconds = interleaved({name: call for name, call in made.items() if callable(call)}, 0.4, (3, 25))
    rows = []
    for name, call in made.items():
        if not callable(call):
            rows.append(_row(point, name) | {"note": f"not measured: {call}"})
            continue
        macs, bits = point.layer.macs(point.batch), bits_of(name)[0] if "w" in name else 8 if "int8" in name else 32
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        row |= {"gops": 2e-6 * macs / row["ms"], "intensity": 2 * macs / point.layer.bytes(point.batch, bits)}
        rows.append(row)
    return rows


def _measure_step(point):
    model = MODELS[point.model]
    denoiser = origins.denoiser(model)  # on the meta device
    size = 4 * sum(p.numel() for p in denoiser.parameters())
    needed, there = (3.7 if point.kernel == "own" else 6) * size, _available()
    if point.kernel != "own" and (reason := absent(point.kernel)):
        return unmeasured(point, reason)
    if there is not None and needed > there and point.model not in _loaded:
        return unmeasured(point, f"it takes {needed / 1e9:.0f} GB of memory, of which {there / 1e9:.0f} are free")
    given = timing.inputs(denoiser, model, point.batch, "cpu")
    if point.kernel == "own":
        calls = {name: partial(one, **given) for name, one in _own_denoisers(point.model).items()}
    else:
        try:
            calls = {point.kernel: rival(point.model, point.kernel, given)}
        except Exception as error:  # of another project's converter or compiler
            return unmeasured(point, failed(error))
    seconds = interleaved({"fp32": partial(full_precision(point.model), **given)} | calls, 10.0, (3, 25))
    rows = []
    for name in point.names():
        if name not in seconds:
            rows.append(_row(point, name) | {"note": f"not measured: {_spared(point.model, name)}"})
            continue
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        if name.startswith("integer"):
            row |= {f"in_{kind}": share for kind, share in shares(calls[name]).items()}
        rows.append(row)
    return rows


def timed(seconds: list[float], fp32: list[float]) -> dict[str, float]:
    """Median and quartiles of the milliseconds, and of how many times as fast as fp32 of the same round."""
    found = {"rounds": len(seconds)}
    for name, values in (
        ("ms", [1e3 * s for s in seconds]),
        ("speedup", [f / s for f, s in zip(fp32, seconds, strict=True)]),
    ):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return found


def _available():
    """Bytes of memory that are free; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _busy():
    """(wall time, seconds that all processors were busy, seconds of this process); None where the system is mute."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def _busy_elsewhere(before):
    """Processors that others kept busy since `before`, on average."""
    if before is None:
        return math.nan
    wall, busy, mine = (now - then for now, then in zip(_busy(), before, strict=True))
    return max(0.0, busy - mine) / wall


def run(models: tuple[str, ...], threads: tuple[int, ...], budget: float, known: set[tuple] = frozenset()) -> Iterator:
    """Yield the rows of every point, one point after the other; after `budget` minutes, rows that say what is left out.

    known: keys of rows (`speed.key`) that are there already; their points come last.
    """
    where = {"isa": instruction_set(), "machine": speed.machine(), **_versions()}
    where |= {"load": round(os.getloadavg()[0], 2)}
    until = time.monotonic() + 60 * budget
    everything = points(models, threads)
    everything.sort(key=lambda p: p.part != "peak" and all(speed.key(_row(p, n)) in known for n in p.names()))
    for point in everything + [point for point in everything if point.part == "peak"]:
        if time.monotonic() > until and point.part != "peak":
            rows = unmeasured(point, f"the {budget:g} minutes of this run were over")
        else:
            rows = (measure_apart if point.kernel in FLOAT_STEPS and not absent(point.kernel) else measure)(point)
        yield [{"note": ""} | row | where for row in rows]


def instruction_set() -> str:
    """What the integer kernel computes with here; empty where it has no compiled core."""
    return "" if integer.unavailable(torch.device("cpu")) else integer.best()


def _versions():
    made = provenance()
    versions = {"torch": torch.__version__}
    for package in ("openvino", "torchao"):
        if _missing(package) is None:
            versions[package] = metadata.version(package)
    commit = made["commit"] and made["commit"] + ("-dirty" if made["dirty"] else "")
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {"versions": told, "commit": commit or "", "date": made["date"]}
