"""Which kernel each layer and each attention of a quantized denoiser runs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from quest import kernels
from quest.affine import QParams
from quest.diffusion.calibration_set import CalibrationSet
from quest.kernels.cpu import blocks
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantConv2d, QuantLayer, attentions, quant_layers
from quest.quantization.quantizer import Quantizer


class Placement(NamedTuple):
    """kernel: a name in KERNELS. refused: why a layer or attention stays on the reference kernel, by its name."""

    kernel: str
    refused: dict[str, str]


def place(denoiser: nn.Module, kernel: str = "auto") -> Placement:
    """Pack every layer for a kernel, and let it and every attention run there if the kernel supports it exactly.

    The others run on the reference kernel. A weight that is still learned is frozen. Norms and activations around
    integer layers are fused (`kernels.cpu.blocks`), the reference leaves the blocks as diffusers has them. The result
    is also kept as `denoiser.placement`.
    Raises ValueError for an unknown kernel and for one that is not available on the denoiser's device.
    """
    name = kernels.choose(kernel, denoiser.device, denoiser.dtype)
    refused = {}
    for layer_name, layer in quant_layers(denoiser):
        if not layer.is_frozen:
            layer.freeze()
        reason = refusal(layer, name)
        layer.freeze("reference" if reason else name)
        layer.input_quantizer.as_numbers(name == "integer" and not reason)
        if reason:
            refused[layer_name] = reason
    for attention_name, attention in attentions(denoiser):
        processor = attention.processor
        if not isinstance(processor, QuantAttention):
            continue
        quantizers = processor.q, processor.k, processor.v, processor.p
        reason = kernels.get(name).supports_attention(*map(every_group, quantizers))
        processor.kernel_name = "reference" if reason else name
        for quantizer in quantizers:
            quantizer.as_numbers(name == "integer" and not reason)
        if reason:
            refused[f"{attention_name}.processor"] = reason
    if name == "integer":
        blocks.fuse(denoiser)
    else:
        blocks.unfuse(denoiser)
    denoiser.placement = Placement(name, refused)
    return denoiser.placement


def realizable(denoiser: nn.Module, work: dict[str, int]) -> float:
    """Share of a placed denoiser's multiply-accumulates that run on integers; 0 on the reference kernel.

    work: by layer of the full-precision denoiser, see `cost.macs`. A split convolution counts if both halves do.
    Products of an attention count if its last call had no mask.
    """
    if denoiser.placement.kernel == "reference":
        return 0.0
    refused = {name.removesuffix(".hidden").removesuffix(".skip") for name in denoiser.placement.refused}
    refused |= {f"{name}.processor" for name, m in attentions(denoiser) if getattr(m.processor, "masked", False)}
    return sum(count for name, count in work.items() if name not in refused) / sum(work.values())


@torch.no_grad()
def refusal(layer: QuantLayer, kernel: str) -> str | None:
    """Why a kernel cannot compute a layer exactly; None where it can."""
    conv = {}
    if isinstance(layer, QuantConv2d):
        conv = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    spec = layer.weight_quantizer.spec
    return kernels.get(kernel).supports(layer.qweight, spec, every_group(layer.input_quantizer), **conv)


def every_group(quantizer: Quantizer) -> QParams:
    """Scale and zero point of all time groups, [T, ...]."""
    return QParams(quantizer.scale.data, quantizer.zero_point, quantizer.spec)


@contextmanager
def on_reference(denoiser: nn.Module) -> Iterator[None]:
    """Compute on the reference kernel for a few calls: what is packed is kept, and used again afterwards."""
    layers = [(layer, layer.operand, layer.codes, layer.kernel_name) for _, layer in quant_layers(denoiser)]
    processors = [m.processor for _, m in attentions(denoiser) if isinstance(m.processor, QuantAttention)]
    kernels_of = [processor.kernel_name for processor in processors]
    quantizers = [(m, m.numbers) for m in denoiser.modules() if isinstance(m, Quantizer)]
    for layer, *_ in layers:
        layer.freeze("reference")
    for processor in processors:
        processor.kernel_name = "reference"
    for quantizer, _ in quantizers:
        quantizer.as_numbers(False)
    blocks.unfuse(denoiser)
    try:
        yield
    finally:
        for layer, operand, codes, name in layers:
            layer.operand, layer.codes, layer.kernel_name = operand, codes, name
        for processor, name in zip(processors, kernels_of, strict=True):
            processor.kernel_name = name
        for quantizer, numbers in quantizers:
            quantizer.numbers = numbers
        if denoiser.placement.kernel == "integer":
            blocks.fuse(denoiser)


@torch.no_grad()
def deviation(denoiser: nn.Module, evaluation: CalibrationSet, rows: int = 8) -> float:
    """Relative difference |e - e_r| / |e_r| of the noise prediction from that of the reference kernel.

    Of a few rows of a call in the middle of held-out full-precision trajectories. The denoiser is on its kernel again
    afterwards. Rounding moves some values to a neighbouring code and layers multiply such differences; one that exceeds
    the error of quantization itself has another cause.

    Raises RuntimeError where the prediction is further from the reference's than that is from full precision.
    """
    kernel = denoiser.placement.kernel
    if kernel == "reference":
        return 0.0
    chosen = (evaluation.call == evaluation.call.max() // 2).nonzero().flatten()[:rows]
    inputs, target = evaluation.inputs(chosen), evaluation.target[chosen]
    own = denoiser(**inputs).sample
    with on_reference(denoiser):
        reference = denoiser(**inputs).sample
    difference, error = (own - reference).norm(), (reference - target).norm()
    if not difference <= error:
        raise RuntimeError(
            f"the {kernel} kernel's prediction differs by {difference / reference.norm():.3g} of its size from the "
            f"reference kernel's, which is {error / reference.norm():.3g} from full precision; sample with "
            "--kernel reference and report this"
        )
    return (difference / reference.norm()).item()
