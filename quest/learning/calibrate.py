"""Ranges of activations from calibration rows: one forward pass, or running averages over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers


def static_rows(a: int) -> int:
    """How many calibration rows set an activation range that holds at all timesteps, by activation bits.

    Chosen on held-out trajectories (results/LOG.md): the search for the range of least error shrinks from the extremes,
    which grow with the number of rows, and 4 bits are too few for a range that holds them.
    """
    return 64 if a >= 8 else 8


@contextmanager
def calibrating(denoiser: nn.Module, choose: Callable) -> Iterator[None]:
    """While inside, a forward pass sets the range of each activation quantizer from its own (quantized) input.

    Softmax probabilities take [0, max] whatever is chosen for the others.
    """
    quantizers = input_quantizers(denoiser)
    for name, q in quantizers.items():
        q.choose = ranges.always_zero if name.endswith("processor.p") else choose
    try:
        yield
    finally:
        for q in quantizers.values():
            q.choose = None


def running(quantizer: str, momentum: float) -> ranges.Running:
    """Running averages as the range of the activation quantizer of this name; softmax probabilities keep [0, max]."""
    return ranges.Running(momentum, ranges.positive if quantizer.endswith("processor.p") else ranges.extremes)


@torch.no_grad()
def calibrate(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    choose: Callable,
    *,
    samples: int,
    seed: int,
    momentum: float | None = None,
) -> None:
    """Set every activation range from one forward pass on `samples` random rows: of each time group, or of all rows.

    momentum: instead of `choose`, running averages of the whole ranges over all rows in batches of `samples`; they
    start at the first batch, which is met again (the released QuEST's running statistics, momentum 0.95).
    """
    groups = getattr(denoiser, "time_groups", None)
    groups_rows = groups.rows(calibration.timestep) if groups else [torch.arange(len(calibration), device="cpu")]
    generator = torch.Generator().manual_seed(seed)
    with calibrating(denoiser, choose):
        for rows in groups_rows:
            rows = rows[torch.randperm(len(rows), generator=generator, device="cpu")]
            if momentum is None:
                denoiser(**calibration.inputs(rows[:samples]))
                continue
            for name, q in input_quantizers(denoiser).items():
                q.choose = running(name, momentum)
            for batch in (rows[:samples], *rows.split(samples)):
                denoiser(**calibration.inputs(batch))
