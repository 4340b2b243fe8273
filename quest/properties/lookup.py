"""The work that TAQuant adds to a denoiser call: find the time group, then look up each quantizer's scales for it."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quest.quantization.layers import input_quantizers
from quest.quantization.placement import place


@torch.no_grad()
def look_up(denoiser: nn.Module, timestep: Tensor) -> None:
    """Do everything that a denoiser call does because of time groups, and nothing else."""
    with denoiser.time_groups.inside(timestep):
        for quantizer in input_quantizers(denoiser).values():
            _ = quantizer.qparams


@torch.no_grad()
def single(denoiser: nn.Module, timestep: Tensor) -> nn.Module:
    """Change the denoiser to use the scales of this timestep's group at all timesteps, and return it.

    At the timesteps of that group its results stay the same.
    """
    group = denoiser.time_groups.index(timestep)[:1]
    for quantizer in input_quantizers(denoiser).values():
        if len(quantizer.scale) > 1:
            quantizer.scale.data, quantizer.zero_point = quantizer.scale[group], quantizer.zero_point[group]
        quantizer.groups = None
    denoiser.time_groups.starts = denoiser.time_groups.starts[:1]
    place(denoiser, denoiser.placement.kernel)
    return denoiser


def seconds_in_turns(steps: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each step, run in turns so that other load affects all alike. One more turn warms up."""
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                measured[name].append(time.process_time() - start)
    return measured
