"""Weight dilation, the first part of DilateQuant (Liu et al., arXiv:2409.14307): activations shrink at no cost.

An output channel's weights reach from its least to its largest one. Input channels that attain neither in any output
channel have room: their weights can grow by a factor s >= 1 and their activations shrink by it, and no weight range
moves. s is the largest factor that leaves every output channel's range as it was. For an output channel with weights
0.4, -0.1 and 0.2 the third input channel may grow by 2, until it meets 0.4.

Channels with many outputs have little room: of C input channels about e^(-2 O / C) attain no extreme of O output
channels.
"""

import logging

import torch
from torch import Tensor

from baselines.granularity import Granularity, ranges_work, set_ranges, swapped
from baselines.method import Method, Paper, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.quantization import ranges
from quest.quantization.layers import quant_layers

log = logging.getLogger(__name__)


@takes(Granularity)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Granularity):
    """Dilate weights, then round to nearest. Returns a new pipeline.

    Weight ranges are those of `rtn-mse`, chosen before, so the row differs in activation ranges and codes alone.
    The log says how much of each layer was dilated. Departure from the paper: its second part, blockwise distillation
    with ranges for each step, is left out.
    """
    student = swapped(pipe, calibration, w, a, recipe)
    for name, layer in quant_layers(denoiser_of(student)):
        layer.choose_weight_range(ranges.mse)
        if layer.weight_quantizer.spec.bits == FLOAT or layer.groups > 1:
            continue
        factors = dilation(layer.weight.detach())
        layer.scale_input(factors)
        share, middle, most = (factors > 1).float().mean(), factors.median(), factors.max()
        log.info("dilate %s: %.0f %% of channels, median %.2f, largest %.2f", name, 100 * share, middle, most)
    set_ranges(denoiser_of(student), calibration, a, recipe)
    return student


def dilation(weight: Tensor) -> Tensor:
    """Return the largest factors s [C], from 1 on, with which weight [O, C, ...] times s has the ranges of the weight.

    1 for a channel of zeros.
    """
    each = weight.flatten(2) if weight.ndim > 2 else weight[..., None]  # [O, C, taps]
    most, least = each.amax((1, 2), True), each.amin((1, 2), True)
    room = torch.where(each > 0, most / each, torch.where(each < 0, least / each, torch.inf))
    factors = room.amin((0, 2))
    factors = torch.where(factors.isinf(), 1.0, factors)
    for _ in range(2):  # a product may exceed the extreme by its last bit
        scaled = each * factors[:, None]
        over = ((scaled > most) | (scaled < least)).any(0).any(1) & (factors > 1)
        factors = torch.where(over, factors.nextafter(torch.ones_like(factors)), factors)
    return factors


METHOD = Method(
    "dilate",
    quantize,
    about="round to nearest after weight dilation, the first part of DilateQuant",
    work=ranges_work,
    paper=Paper(
        "liu2025dilatequant",
        "2409.14307",
        "{DilateQuant}: Accurate and Efficient Quantization-Aware Training for Diffusion Models via Weight Dilation",
        "Liu, Xuewen and Li, Zhikai and Gu, Qingyi",
        "ACM MM",
        2025,
    ),
)
