"""What TAQuant asks of inference: before each call, which time group it is in, and each quantizer's scales in it."""

import torch
from torch import Tensor, nn

from quest.quantization.layers import input_quantizers
from quest.quantization.placement import place


@torch.no_grad()
def look_up(denoiser: nn.Module, timestep: Tensor) -> None:
    """All that a call does because of time groups, and nothing else."""
    with denoiser.time_groups.inside(timestep):
        for quantizer in input_quantizers(denoiser).values():
            _ = quantizer.qparams


@torch.no_grad()
def single(denoiser: nn.Module, timestep: Tensor) -> nn.Module:
    """Keep the scales of the group of this timestep only, for all timesteps; the denoiser itself is changed.

    At the timesteps of that group it computes what it did before.
    """
    group = denoiser.time_groups.index(timestep)[:1]
    for quantizer in input_quantizers(denoiser).values():
        if len(quantizer.scale) > 1:
            quantizer.scale.data, quantizer.zero_point = quantizer.scale[group], quantizer.zero_point[group]
        quantizer.groups = None
    denoiser.time_groups.starts = denoiser.time_groups.starts[:1]
    place(denoiser, denoiser.placement.kernel)
    return denoiser
