"""The contenders that compute a whole denoiser step: the suite's kernels, torch eager and compiled, and OpenVINO."""

import gc
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from quest.benchmark.shapes import PAPER
from quest.benchmark.single_layers import SUITE_KERNELS, absent, bits_of, compiled_openvino, qparams
from quest.diffusion import published
from quest.diffusion.models import MODELS, Model
from quest.quantization.layers import attentions, quant_layers
from quest.quantization.placement import place
from quest.quantization.swapping import swap

FLOAT_STEPS = ("fp32 compiled", "bf16", "bf16 compiled", "OpenVINO fp32", "OpenVINO int8")


@lru_cache(1)
def full_precision(name: str) -> nn.Module:
    """A model's denoiser in its published architecture, with random weights and channels innermost."""
    torch.manual_seed(0)
    return published.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last).requires_grad_(False)


def quantized(name: str, kernel: str) -> nn.Module:
    """`full_precision` quantized and placed on one of `suite_kernels`, without float weights, for random inputs."""
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
        layer.origin = None  # its packed form replaces it
    return denoiser


def _set(quantizer, params):
    quantizer.scale.data.fill_(params.scale)
    quantizer.zero_point.fill_(params.zero_point)


def suite_kernels(model: Model) -> tuple[str, ...]:
    """The suite's kernels for whole steps. Attention probabilities have 8 bits unless the name says otherwise."""
    more = (f"integer w4a8, softmax {model.softmax_bits} bits",) if model.softmax_bits > 8 else ()
    return (*SUITE_KERNELS[1:], *more, SUITE_KERNELS[0])  # the reference comes last, because it takes most memory


cached: dict[str, dict[str, nn.Module]] = {}  # the quantized denoisers of one model


def quantized_denoisers(name: str) -> dict[str, nn.Module]:
    """The quantized denoisers of a model by kernel. Only those of one model are in memory at a time."""
    if name not in cached:
        forget()
        kernels = [kernel for kernel in suite_kernels(MODELS[name]) if not reason_to_skip(name, kernel)]
        cached[name] = {kernel: quantized(name, kernel) for kernel in kernels}
    return cached[name]


def reason_to_skip(name: str, kernel: str) -> str | None:
    """Why one of the suite's kernels is not measured on a model; None if it is."""
    if name in PAPER and kernel == "integer w4a4":
        return "a gigabyte more, to multiply what integer w4a8 multiplies"
    if name in PAPER and "softmax" in kernel:
        return "a gigabyte more; its layers are those of integer w4a8, its attention is the reference's"
    return absent(kernel)


def forget() -> None:
    """Free the quantized denoisers."""
    cached.clear()
    gc.collect()


def rival(name: str, kernel: str, arguments: dict[str, Tensor]) -> Callable[[], object]:
    """A function that runs a model's denoiser as one of FLOAT_STEPS, with the current number of threads."""
    denoiser = full_precision(name)
    if kernel.startswith("bf16"):
        denoiser = _in_bf16(name)
        arguments = {key: value.bfloat16() if value.is_floating_point() else value for key, value in arguments.items()}
    if kernel.endswith("compiled"):
        from torch._inductor import config

        torch._dynamo.reset()
        config.freezing = True  # prepacks the weights
        return partial(torch.compile(denoiser, dynamic=False), **arguments)
    if kernel.startswith("OpenVINO"):
        return _openvino_step(denoiser, arguments, kernel.endswith("int8"))
    return partial(denoiser, **arguments)


@lru_cache(1)
def _in_bf16(name):
    denoiser = published.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last)
    return denoiser.bfloat16().requires_grad_(False)


def _openvino_step(denoiser, named, int8):
    """Quantize with NNCF's preset for transformers if `int8`, as its documentation does for U-Nets, and compile."""
    import openvino

    class Prediction(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *arguments):
            return self.denoiser(**dict(zip(named, arguments, strict=True))).sample

    network = openvino.convert_model(Prediction(), example_input=tuple(named.values()))
    network.reshape({port: list(v.shape) for port, v in zip(network.inputs, named.values(), strict=True)})
    inputs = [value.numpy() for value in named.values()]
    if int8:
        import nncf

        quick = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)  # it would change values, not speed
        network = nncf.quantize(
            network, nncf.Dataset([inputs]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=quick,
        )  # fmt: skip
    return compiled_openvino(network, inputs)
