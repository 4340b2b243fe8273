"""The error of each layer of a quantized denoiser, on the inputs that the layer has in full precision.

Others read from it whether a quantized model will work, without sampling (JoaoZaokk/comfy-quant-bench: a median above
0.21 breaks, one below 0.15 works). Errors of earlier layers are left out: it says what quantizing one layer does alone.
"""

from contextlib import nullcontext

import torch
from torch import nn

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of, hooked

CALLS = 3  # of a trajectory: the first one, one in the middle, and the last one
ROWS = 4  # of each call


@torch.no_grad()
def layer_errors(pipe, student, evaluation: CalibrationSet) -> dict[str, float]:
    """Return |y~ - y| / |y| of every Linear and Conv2d by name: the mean over calls, on full-precision trajectories.

    pipe: in full precision. student: the quantized pipeline, on any kernel. y: the output of a layer in full
    precision, [rows, ...]; y~: that of the quantized layer on the same input, with the ranges of the call's time group.
    """
    exact, quantized = denoiser_of(pipe), denoiser_of(student)
    groups = getattr(quantized, "time_groups", None)
    errors: dict[str, list[float]] = {}

    def hook(name):
        def compare(_module, args, output):
            difference = quantized.get_submodule(name)(args[0]) - output
            errors.setdefault(name, []).append((difference.norm() / output.norm()).item())

        return compare

    layers = {n: m for n, m in exact.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    last = int(evaluation.call.max())
    with hooked(module.register_forward_hook(hook(name)) for name, module in layers.items()):
        for call in dict.fromkeys(round(share * last / (CALLS - 1)) for share in range(CALLS)):
            inputs = evaluation.inputs(evaluation.rows_of_call(call)[:ROWS])
            with groups.inside(inputs["timestep"]) if groups is not None else nullcontext():
                exact(**inputs)
    return {name: sum(values) / len(values) for name, values in errors.items()}
