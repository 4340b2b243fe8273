"""The error of a quantized denoiser's noise prediction against full precision."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of


@torch.no_grad()
def eps_error(pipe: DiffusionPipeline, calibration: CalibrationSet) -> tuple[Tensor, list[int | float]]:
    """Measure the relative squared error of the noise prediction, |e~ - e|^2 / |e|^2, on full-precision trajectories.

    Returns the errors [trajectories, calls] and the timestep of each call. A guided call has a conditional and an
    unconditional half; their errors are averaged.
    """
    trajectories = calibration.trajectory.cpu().unique()
    calls = int(calibration.call.max()) + 1
    errors, steps = torch.zeros(len(trajectories), calls), []
    for number in range(calls):
        rows = (calibration.call == number).nonzero().flatten()
        steps.append(calibration.timestep[rows[0]].item())
        prediction = denoiser_of(pipe)(**calibration.inputs(rows)).sample.cpu()
        target = calibration.target[rows].cpu()
        error = (prediction - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
        place = torch.searchsorted(trajectories, calibration.trajectory[rows].cpu())
        halves = len(rows) // len(trajectories)
        errors[:, number].index_add_(0, place, error / halves)
    return errors, steps
