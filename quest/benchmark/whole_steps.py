"""What computes a whole denoiser step on this machine: the suite's kernels, torch eager and compiled, and OpenVINO."""

import gc
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from quest.benchmark.shapes import PAPER
from quest.benchmark.single_layers import OWN, absent, bits_of, compiled_openvino, qparams
from quest.diffusion import published
from quest.diffusion.models import MODELS, Model
from quest.quantization.layers import attentions, quant_layers
from quest.quantization.placement import place
from quest.quantization.swapping import swap

FLOAT_STEPS = ("fp32 compiled", "bf16", "bf16 compiled", "OpenVINO fp32", "OpenVINO int8")


@lru_cache(1)
def full_precision(name: str) -> nn.Module:
    """A model's denoiser as published, with random weights, channels innermost."""
    torch.manual_seed(0)
    return published.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last).requires_grad_(False)


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


loaded: dict[str, dict[str, nn.Module]] = {}  # the quantized denoisers of one model


def own_denoisers(name: str) -> dict[str, nn.Module]:
    """The quantized denoisers of a model by kernel, those of one model at a time."""
    if name not in loaded:
        forget()
        loaded[name] = {kernel: quantized(name, kernel) for kernel in own(MODELS[name]) if not spared(name, kernel)}
    return loaded[name]


def spared(name: str, kernel: str) -> str | None:
    """Why a denoiser is not made for one of the suite's kernels; None where it is."""
    if name in PAPER and kernel == "integer w4a4":
        return "a gigabyte more, to multiply what integer w4a8 multiplies"
    if name in PAPER and "softmax" in kernel:
        return "a gigabyte more; its layers are those of integer w4a8, its attention is the reference's"
    return absent(kernel)


def forget() -> None:
    """Let go of the quantized denoisers."""
    loaded.clear()
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
    denoiser = published.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last)
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
    return compiled_openvino(network, inputs)
