"""The error of a quantized denoiser's noise prediction against full precision."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from quest.diffusion.calibration_set import CalibrationSet, guide
from quest.diffusion.denoisers import denoiser_of


def eps_error(pipe: DiffusionPipeline, calibration: CalibrationSet) -> tuple[Tensor, list[int | float]]:
    """Measure the relative squared error of the noise prediction, |e~ - e|^2 / |e|^2, on full-precision trajectories.

    Returns the errors [trajectories, calls] and the timestep of each call. A guided call has a conditional and an
    unconditional half; their errors are averaged.
    """
    errors, _, steps = eps_errors(pipe, calibration, None)
    return errors, steps


@torch.no_grad()
def eps_errors(
    pipe: DiffusionPipeline, calibration: CalibrationSet, guidance: float | None
) -> tuple[Tensor, Tensor | None, list[int | float]]:
    """`eps_error`, and the same error of the guided prediction, from one pass over full-precision trajectories.

    guidance: the scale s of classifier-free guidance (arXiv:2207.12598). Where calls have two halves, the second
    result is the error [trajectories, calls] of e_u + s (e_c - e_u), by which the sampler steps; otherwise, or without
    a scale, it is None. It leaves out the variances that some denoisers predict too: guidance does not combine them.
    """
    trajectories, channels = calibration.trajectory.cpu().unique(), calibration.sample.shape[1]
    calls = int(calibration.call.max()) + 1
    errors, steps, of_guided = torch.zeros(len(trajectories), calls), [], []
    for number in range(calls):
        rows = calibration.rows_of_call(number)
        steps.append(calibration.timestep[rows[0]].item())
        prediction = denoiser_of(pipe)(**calibration.inputs(rows)).sample.cpu()
        target = calibration.target[rows].cpu()
        error = _relative(prediction, target)
        of_row = calibration.trajectory[rows].cpu()
        place = torch.searchsorted(trajectories, of_row)
        halves = len(rows) // len(trajectories)
        errors[:, number].index_add_(0, place, error / halves)
        if guidance is not None and halves == 2:
            pairs = of_row.argsort(stable=True).view(-1, halves)  # without, with the condition
            of_guided.append(_relative(*(guide(one[pairs][:, :, :channels], guidance) for one in (prediction, target))))
    return errors, torch.stack(of_guided, 1) if of_guided else None, steps


def _relative(prediction: Tensor, target: Tensor) -> Tensor:
    """|prediction - target|^2 / |target|^2 of each row, [N]."""
    return (prediction - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
