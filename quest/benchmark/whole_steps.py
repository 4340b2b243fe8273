"""The contenders that compute a whole denoiser step: the suite's kernels, torch, OpenVINO and onnxruntime.

A step is a function of the denoiser's arguments that returns an object with `sample`.
"""

import copy
import gc
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from quest import export
from quest.benchmark import trained
from quest.benchmark.shapes import PAPER
from quest.benchmark.single_layers import SUITE_KERNELS, absent, bits_of, compiled_openvino, qparams
from quest.diffusion import published
from quest.diffusion.models import MODELS, Model
from quest.planning.shapes import inputs
from quest.quantization.layers import attentions, quant_layers
from quest.quantization.placement import place
from quest.quantization.swapping import swap
from quest.runtime import memory

RIVALS = (
    "OpenVINO int8", "OpenVINO w8a8", "OpenVINO w8a8 accurate", "onnxruntime w8a8", "OpenVINO fp32",
    "bf16", "bf16 compiled", "fp32 compiled",
)  # fmt: skip
ROWS = 300  # of the calibration set, from which NNCF takes its ranges; its own default


@lru_cache(1)
def full_precision(name: str) -> nn.Module:
    """A model's denoiser with channels innermost: with its weights if it ships, otherwise with random ones."""
    if MODELS[name].ships:
        return trained.pipeline(name).unet
    torch.manual_seed(0)
    denoiser = published.denoiser(MODELS[name], "cpu").to(memory_format=torch.channels_last).requires_grad_(False)
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:  # bell-shaped, as trained weights are: Winograd's algorithm needs small codes
            parameter.normal_(0, parameter.std().item())
    return denoiser


def arguments(name: str, batch: int, folder: Path) -> dict[str, Tensor]:
    """Arguments of a denoiser call: of a model that ships from its trajectories, otherwise random."""
    if MODELS[name].ships:
        return trained.inputs(name, batch, folder)
    return inputs(published.denoiser(MODELS[name]), MODELS[name], batch, "cpu")


def quantized(name: str, kernel: str, folder: Path) -> nn.Module:
    """`full_precision` quantized and placed on one of `suite_kernels`, without float weights.

    Random weights are quantized for random inputs.
    """
    model, bits = MODELS[name], bits_of(kernel)
    if model.ships:
        return trained.quantized(name, "w{}a{}".format(*bits), kernel.split()[0], folder).unet
    softmax_bits = model.softmax_bits if "softmax" in kernel else 8
    pipe = SimpleNamespace(unet=full_precision(name), scheduler=None)
    denoiser = swap(pipe, *bits, keep=model.keep, softmax_bits=softmax_bits).unet
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


def quantized_denoisers(name: str, folder: Path) -> dict[str, nn.Module]:
    """The quantized denoisers of a model by kernel. Only those of one model are in memory at a time."""
    if name not in cached:
        forget()
        kernels = [kernel for kernel in suite_kernels(MODELS[name]) if not reason_to_skip(name, kernel)]
        cached[name] = {kernel: quantized(name, kernel, folder) for kernel in kernels}
    return cached[name]


def reason_to_skip(name: str, kernel: str) -> str | None:
    """Why one of the suite's kernels is not measured on a model; None if it is."""
    if name in PAPER and "softmax" in kernel:
        return "a gigabyte more; its layers are those of integer w4a8, its attention is the reference's"
    return absent(kernel)


def forget() -> None:
    """Free the denoisers, and give their memory back to the system, where another process may need it."""
    cached.clear()
    full_precision.cache_clear()
    gc.collect()
    memory.trim()


def rival(name: str, kernel: str, batch: int, folder: Path) -> Callable:
    """A model's denoiser step as one of RIVALS, for this batch size and the current number of threads."""
    if kernel == "OpenVINO int8" or kernel == "OpenVINO fp32":
        return _openvino_step(name, batch, folder, kernel.endswith("int8"))
    if "w8a8" in kernel:
        return _exported_step(name, kernel, batch, folder)
    denoiser = full_precision(name)
    if kernel.endswith("compiled"):
        from torch._inductor import config

        torch._dynamo.reset()
        config.freezing = True  # prepacks the weights
    if not kernel.startswith("bf16"):
        return torch.compile(denoiser, dynamic=False)
    denoiser = copy.deepcopy(denoiser).bfloat16()
    denoiser = torch.compile(denoiser, dynamic=False) if kernel.endswith("compiled") else denoiser

    def step(**given):
        cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
        return SimpleNamespace(sample=denoiser(**cast).sample.float())

    return step


def _step(function, take=lambda given: [value.numpy() for value in given.values()]):
    """A step of a function that maps numpy arrays to the prediction. take: makes its argument of the denoiser's."""
    return lambda **given: SimpleNamespace(sample=torch.from_numpy(function(take(given))))


def _openvino_step(name, batch, folder, int8):
    """OpenVINO's own conversion of the denoiser, quantized by NNCF if `int8`."""
    import openvino

    named, path = arguments(name, batch, folder), folder / f"{name}-{batch}-int8.xml"
    if int8 and path.exists():
        return _step(compiled_openvino(openvino.Core().read_model(path)))
    denoiser = full_precision(name)

    class Prediction(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, *given):
            return self.denoiser(**dict(zip(named, given, strict=True))).sample

    network = openvino.convert_model(Prediction(), example_input=tuple(named.values()))
    network.reshape({port: list(v.shape) for port, v in zip(network.inputs, named.values(), strict=True)})
    if int8:
        network = _by_nncf(network, name, named, folder)
        openvino.save_model(network, path)
    return _step(compiled_openvino(network))


def _by_nncf(network, name, named, folder):
    """Quantize a network with NNCF's preset for transformers, as its documentation does for U-Nets."""
    import nncf

    nncf.set_log_level("ERROR")
    calls, ships = [named], MODELS[name].ships
    if ships:
        rows = trained.trajectories(name, "calibration", folder)
        order, batch = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)), len(named["sample"])
        calls = [rows.inputs(part) for part in order[: max(ROWS // batch, 1) * batch].split(batch)]
    data = nncf.Dataset([[value.numpy() for value in call.values()] for call in calls])
    # Of random weights, a correction of biases would take minutes and change no speed.
    more = nncf.AdvancedQuantizationParameters(disable_bias_correction=not ships)
    kind = nncf.ModelType.TRANSFORMER
    return nncf.quantize(network, data, subset_size=len(calls), model_type=kind, advanced_parameters=more)


def _exported_step(name, kernel, batch, folder):
    """The suite's own W8A8 checkpoint, exported, on another runtime."""
    named = arguments(name, batch, folder)
    path = trained.exported(name, "w8a8", folder) if MODELS[name].ships else _exported(name, folder)

    def one_timestep(given):
        return {key: (value[0] if key == "timestep" else value).numpy() for key, value in given.items()}

    if kernel.startswith("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options)
        return _step(lambda given: session.run(None, given)[0], one_timestep)
    import openvino

    network = openvino.Core().read_model(path)
    network.reshape({key: list(value.shape) for key, value in one_timestep(named).items()})
    return _step(compiled_openvino(network, accurate="accurate" in kernel), one_timestep)


def _exported(name, folder):
    """The ONNX file of `quantized` random weights."""
    path = folder / f"{name}-w8a8.onnx"
    if not path.exists():
        denoiser = quantized(name, "reference w8a8", folder)
        export.write(export.exportable(denoiser), export.inputs_of(denoiser), path)
    return path
