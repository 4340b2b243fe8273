"""Clip ratios of dynamic formats: how much of each row's or group's range the codes reach."""

import torch
from torch import nn

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked
from quest.learning.reconstruction import float_activations
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantLayer, freeze, input_quantizers
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups

RATIOS = tuple(1 - 0.05 * i for i in range(9))  # 1, 0.95, ..., 0.6


def rows_of_each_step(calibration: CalibrationSet, rows: int, seed: int) -> list[torch.Tensor]:
    """Return `rows` random rows of every timestep of a calibration set, or all that it has, noisiest first."""
    generator = torch.Generator().manual_seed(seed)
    of_each = TimeGroups(calibration.timesteps).rows(calibration.timestep)
    return [own[torch.randperm(len(own), generator=generator, device="cpu")[:rows]] for own in of_each]


@torch.no_grad()
def search_clips(denoiser: nn.Module, calibration: CalibrationSet, *, rows: int, seed: int) -> None:
    """Choose the clip ratio of each dynamic quantizer: of RATIOS the one whose output of the layer has the least error.

    The error is the squared difference, added up over `rows` random rows of each timestep, between the output of a
    layer (or of an attention's two products) with this tensor quantized and with all of its activations in float. The
    layer's input is that of the denoiser with quantized weights and activations in float. Weights are frozen.
    """
    freeze(denoiser)
    quantizers = [q for q in input_quantizers(denoiser).values() if q.spec.dynamic]
    if not quantizers:  # all activations are in float
        return
    specs = {q: q.spec for q in quantizers}
    errors = {q: torch.zeros(len(RATIOS), dtype=torch.float64, device=q.scale.device) for q in quantizers}

    def try_ratios(module, args, output):
        for q in (m for m in module.children() if isinstance(m, Quantizer) and m in specs):
            q.spec = specs[q]
            for i, ratio in enumerate(RATIOS):
                q.scale.data.fill_(ratio)
                errors[q][i] += (module.forward(*args) - output).square().sum(dtype=torch.float64)
            q.spec = float_spec

    modules = [m for m in denoiser.modules() if isinstance(m, QuantLayer | QuantAttention)]
    tried = hooked(m.register_forward_hook(try_ratios) for m in modules)
    with tried, float_activations(input_quantizers(denoiser).values()):
        float_spec = next(iter(specs)).spec
        for own in rows_of_each_step(calibration, rows, seed):
            denoiser(**calibration.inputs(own))
    for q, found in errors.items():
        q.scale.data.fill_(RATIOS[int(found.argmin())])
