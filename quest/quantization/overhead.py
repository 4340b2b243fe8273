"""Work of a quantized denoiser that is no product of codes: scales of activations, and additions and multiply-adds.

Multiply-accumulates and bit operations (`cost`) do not show what finer scales and prologues cost. A sum of products of
codes is exact while all of its scales are the same, so an output needs one accumulator for each scale in its sum:

    scales of the input            accumulators of an output of a 3x3 convolution of C channels
    static, or one per sample      1
    groups of G, or per sample     C / G     taps of a group are summed together
    one per pixel                  9         taps come from different pixels
    groups of G per pixel          9 C / G

In attention a scale per token of q, k or p, or per channel of v, is constant over a sum, and groups are not.
"""

import math

import torch
from torch import Tensor, nn

from quest.affine import FLOAT, QuantSpec
from quest.diffusion.denoisers import hooked
from quest.quantization.attention import QuantAttention
from quest.quantization.branch import BITS
from quest.quantization.layers import QuantConv2d, QuantLayer

SCALE, ZERO_POINT = 16, 8  # bits of a scale that is computed from activations, and of its zero point
WIDTH = 3  # bits that say how many an output channel has, 2 to 8


@torch.no_grad()
def overhead(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Count the work beside the products in one call of a quantized denoiser on one sample:

    - scale_bits: bits of the scales and zero points that dynamic formats compute from activations.
    - float_fmas: multiply-adds with which accumulators become outputs, one for each accumulator.
    - float_additions: additions of rotations of activations, C log2(b) for C channels in blocks of b.
    - weight_scale_bits: bits of the scales (and zero points) of weights in groups, as their formats have them. A file
      has 32 bits of each. Where output channels have bits of their own, 3 for each, which say how many.
    - static_scale_bits: bits of the scales (and zero points) of groups of channels of static activations, of all time
      groups, and of powers of two of channels (`QuantSpec.shifts`). A file has 32 bits of each.
    - branch_macs, branch_bops: multiply-accumulates of low-rank branches, and their bit operations at 16 x 16 bits. In
      `macs` and `bops` of a footprint they are not.

    Layers and products with a float operand have none. The multiplications of a prologue are no extra work: a kernel
    multiplies each input by 1 / scale anyway. inputs: keyword arguments of the denoiser, with batch size 1.
    """
    names = ("scale_bits", "float_fmas", "float_additions", "weight_scale_bits", "static_scale_bits", "branch_macs")
    counted = dict.fromkeys(names, 0)

    def layer(module: QuantLayer, args, output: Tensor) -> None:
        x, spec = args[0], module.input_quantizer.spec
        if module.prologue is not None:
            counted["float_additions"] += x.numel() * round(math.log2(module.prologue.block))
        if module.branch is not None:
            counted["branch_macs"] += module.branch.macs(output.numel())
        counted["scale_bits"] += scale_bits(spec, x.shape)
        if spec.shifts:
            counted["static_scale_bits"] += module.input_quantizer.scale.numel() * spec.shifts.bit_length()
        if spec.group and not spec.dynamic:
            counted["static_scale_bits"] += module.input_quantizer.scale.numel() * _bits(spec)
        weight = module.weight_quantizer.spec
        counted["weight_scale_bits"] += weight_scale_bits(weight, module.weight_shape)
        if max(spec.bits, weight.bits) < FLOAT:
            apart = spec.rows == "token" or weight.group is not None
            taps = math.prod(module.kernel_size) if isinstance(module, QuantConv2d) and apart else 1
            groups = max(accumulators(spec, x.shape), weight.scales(module.weight_shape[1]))
            counted["float_fmas"] += output.numel() * taps * groups

    def products(module: QuantAttention, args, _output) -> None:
        q, k, v = args[:3]
        logits = (*q.shape[:-1], k.shape[-2])
        for quantizer, shape in ((module.q, q.shape), (module.k, k.shape), (module.v, v.shape), (module.p, logits)):
            counted["scale_bits"] += scale_bits(quantizer.spec, shape)
        if max(module.q.spec.bits, module.k.spec.bits) < FLOAT:
            counted["float_fmas"] += math.prod(logits) * accumulators(module.q.spec, q.shape)
        if max(module.p.spec.bits, module.v.spec.bits) < FLOAT:
            counted["float_fmas"] += q.numel() * accumulators(module.v.spec, v.shape)

    handles = [m.register_forward_hook(layer) for m in denoiser.modules() if isinstance(m, QuantLayer)]
    handles += [m.register_forward_hook(products) for m in denoiser.modules() if isinstance(m, QuantAttention)]
    with hooked(handles):
        denoiser(**inputs)
    return counted | {"branch_bops": counted["branch_macs"] * BITS**2}


def accumulators(spec: QuantSpec, shape: torch.Size) -> int:
    """Return how many accumulators each tap of an output needs for an operand of this format and shape."""
    return 1 if spec.axis is None else spec.scales(shape[spec.axis])


def scale_bits(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Return the bits of the scales that a dynamic format computes for a tensor of this shape; 0 for a static one."""
    if not spec.dynamic:
        return 0
    rows = shape[0] if spec.rows == "tensor" else math.prod(shape) // shape[spec.axis]
    return rows * spec.scales(shape[spec.axis]) * _bits(spec)


def weight_scale_bits(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Return the bits of the scales of a weight in groups, or of the widths of its channels; 0 for one without."""
    if spec.widths is not None:
        return WIDTH * len(spec.widths)
    return 0 if spec.group is None else shape[0] * spec.scales(shape[1]) * math.prod(shape[2:]) * _bits(spec)


def _bits(spec: QuantSpec) -> int:
    """Return the bits of one scale and its zero point."""
    return (8 if spec.block_scale else SCALE) + (0 if spec.symmetric else ZERO_POINT)
