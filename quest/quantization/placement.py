"""Decides on which kernel each layer and each attention of a quantized denoiser runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from quest import kernels
from quest.affine import QParams
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import changed
from quest.kernels.cpu import blocks
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantConv2d, QuantLayer, attentions, quant_layers
from quest.quantization.quantizer import Quantizer


class Placement(NamedTuple):
    """kernel: a name in KERNELS. refused: by name, why a layer or an attention stays on the reference kernel."""

    kernel: str
    refused: dict[str, str]


def place(denoiser: nn.Module, kernel: str = "auto") -> Placement:
    """Put every layer and every attention that a kernel computes exactly on it, and the others on the reference kernel.

    Weights that are still learned are frozen first. With the integer kernel, blocks of the denoiser are also fused
    (`kernels.cpu.blocks`); with others they are those of diffusers. The result is also stored as `denoiser.placement`.
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
    """Return the share of a placed denoiser's multiply-accumulates that run on integers; 0 on the reference kernel.

    work: the result of `cost.macs` for the full-precision denoiser. A split convolution counts if both of its halves
    run on integers, and the products of an attention count if its last call had no mask. Branches run in float: theirs
    are added to all.
    """
    if denoiser.placement.kernel == "reference":
        return 0.0
    refused = {name.removesuffix(".hidden").removesuffix(".skip") for name in denoiser.placement.refused}
    refused |= {f"{name}.processor" for name, m in attentions(denoiser) if getattr(m.processor, "masked", False)}
    branches = sum(
        layer.branch.macs(work[name] // math.prod(layer.weight_shape[1:]))
        for name, layer in quant_layers(denoiser)
        if layer.branch is not None
    )
    return sum(count for name, count in work.items() if name not in refused) / (sum(work.values()) + branches)


@torch.no_grad()
def refusal(layer: QuantLayer, kernel: str) -> str | None:
    """Return why a kernel cannot compute a layer exactly; None if it can."""
    if kernel != "reference" and layer.prologue is not None and layer.prologue.single:
        return "weight: rotated after it is quantized"
    conv = {}
    if isinstance(layer, QuantConv2d):
        conv = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    spec = layer.weight_quantizer.spec
    return kernels.get(kernel).supports(layer.qweight, spec, every_group(layer.input_quantizer), **conv)


def every_group(quantizer: Quantizer) -> QParams:
    """Return scale and zero point of all time groups, [T, ...]."""
    return QParams(quantizer.scale.data, quantizer.zero_point, quantizer.spec)


@contextmanager
def on_reference(denoiser: nn.Module) -> Iterator[None]:
    """Run a denoiser on the reference kernel inside this context; operands of its own kernel are kept."""
    layers = [(layer, layer.operand, layer.codes, layer.kernel_name) for _, layer in quant_layers(denoiser)]
    processors = [m.processor for _, m in attentions(denoiser) if isinstance(m.processor, QuantAttention)]
    quantizers = [m for m in denoiser.modules() if isinstance(m, Quantizer)]
    for layer, *_ in layers:
        layer.freeze("reference")
    blocks.unfuse(denoiser)
    try:
        with changed(processors, "kernel_name", "reference"), changed(quantizers, "numbers", None):
            yield
    finally:
        for layer, operand, codes, name in layers:
            layer.operand, layer.codes, layer.kernel_name = operand, codes, name
        if denoiser.placement.kernel == "integer":
            blocks.fuse(denoiser)


@torch.no_grad()
def deviation(denoiser: nn.Module, evaluation: CalibrationSet, rows: int = 8) -> float:
    """Measure the relative difference |e - e_r| / |e_r| of the noise prediction e to e_r of the reference kernel.

    It uses a few rows of one call in the middle of held-out full-precision trajectories. Afterwards the denoiser is on
    its kernel again. Rounding moves some values to a neighbouring code, and later layers amplify such differences. A
    difference above the error of quantization itself must have another cause.

    Raises RuntimeError if the prediction is further from the reference kernel's than that one is from full precision.
    """
    kernel = denoiser.placement.kernel
    if kernel == "reference":
        return 0.0
    chosen = evaluation.rows_of_call(evaluation.call.max() // 2)[:rows]
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
