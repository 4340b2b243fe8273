"""AdaRound, weights only: what Q-Diffusion (arXiv:2302.04304) and all that build on it share below the activations.

The weight pass sees no quantized activation, so its result, one file for each model and weight bits, is where methods
with any activation bits start from (`init: adaround`).
"""

from dataclasses import dataclass, replace

import torch

from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.reconstruction import reconstruct_weights
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import quant_layers
from quest.quantization.splitting import shortcut_splits
from quest.quantization.swapping import swap

TRAVEL = 20  # lr of alpha times iterations, as published: 1e-3 * 20,000
STEPS = 20  # sampler calls of a calibration set, as published for DDIM


@dataclass(frozen=True)
class Preset:
    """Iterations of every unit in the two passes, mini-batch, learning rate of the activation steps, and the weight
    bits from which rounding is nearest."""

    weight_iterations: int
    activation_iterations: int
    batch: int
    activation_lr: float = 4e-4
    nearest_from: int = FLOAT


PRESETS = {
    "full": Preset(20000, 5000, 32),  # as published
    # Rates times iterations are the published ones in both passes.
    "short": Preset(1000, 250, 16, activation_lr=8e-3, nearest_from=8),
}


def settings(preset: str, **given) -> Preset:
    """A preset with what is given, and not None, in place of its own. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})


def uniform(calibration: CalibrationSet, rows: int, seed: int) -> CalibrationSet:
    """About `rows` rows from every k-th sampler call, both halves of a guided one (arXiv:2302.04304, section 4.1).

    About 20 calls are kept, and the same number of trajectories from each; the released code takes the first ones, here
    the seed draws them. Rows lie in the order of the calls, noisiest first.
    """
    calls = calibration.calls()
    trajectories = len(calibration.trajectory.unique())
    calls = calls.view(-1, trajectories, calls.shape[1])  # [calls, trajectories, halves]
    kept = calls[:: max(1, len(calls) // STEPS)]
    n = max(1, rows // (len(kept) * kept.shape[2]))
    drawn = torch.randperm(trajectories, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return calibration.subset(kept[:, drawn].flatten())


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int = FLOAT,
    *,
    init: str | None = None,  # nothing to start from: must stay None
    preset: str = "short",  # "short" or "full", see PRESETS
    weight_iterations: int | None = None,  # of every unit; default: the preset's
    batch: int | None = None,  # default: the preset's
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    split: bool = False,  # quantize the two parts of a decoder shortcut's input apart, as published for SD and CIFAR-10
    rows: int = 1024,  # of the calibration set
    seed: int = 0,  # of the calibration rows and the mini-batches
):
    """Round the weights by AdaRound; activations stay in float. Returns a new pipeline.

    Departure from the released commands of Q-Diffusion: 1,024 rows instead of 5,120 (20 steps of 256), or 6,400 for
    Stable Diffusion.
    Raises ValueError for activation bits other than 32.
    """
    return round_weights_only(
        pipe,
        uniform(calibration, rows, seed),
        w,
        a,
        init=init,
        keep=keep,
        split=split,
        settings=settings(preset, weight_iterations=weight_iterations, batch=batch),
        seed=seed,
    )


def round_weights_only(
    pipe, drawn: CalibrationSet, w: int, a: int, *, init: str | None, keep, split: bool, settings: Preset, seed: int
):
    """`quantize` on calibration rows already drawn."""
    if init is not None:
        raise ValueError("init: AdaRound starts from the full-precision weights")
    if a != FLOAT:
        raise ValueError(f"AdaRound quantizes weights only: its bits are w{w}a32, not w{w}a{a}")
    student = swap(pipe, w, a, keep=keep, splits=splits(pipe, drawn) if split else None)
    round_weights(student, pipe, drawn, settings, seed)
    return student


def splits(pipe, calibration: CalibrationSet) -> dict[str, int]:
    """Where the decoder's shortcuts are split. Raises ValueError for a denoiser without any."""
    found = shortcut_splits(pipe.unet, calibration.inputs(torch.arange(1)))
    if not found:
        raise ValueError("split: the denoiser has no shortcut convolution over a concatenation")
    return found


def round_weights(student, pipe, drawn: CalibrationSet, settings: Preset, seed: int) -> None:
    """MSE ranges for each output channel, then AdaRound of a swapped pipeline's weights, supervised by `pipe`.

    Layers of `settings.nearest_from` bits and more keep their nearest codes.
    """
    coarse = []
    for name, layer in quant_layers(student.unet):
        layer.choose_weight_range(ranges.mse)
        if layer.weight_quantizer.spec.bits < settings.nearest_from:
            coarse.append(name)
    if not coarse or not settings.weight_iterations:
        return
    reconstruct_weights(
        student.unet,
        pipe.unet,
        drawn,
        torch.arange(len(drawn)),
        iterations=settings.weight_iterations,
        batch=settings.batch,
        lr=TRAVEL / settings.weight_iterations,
        exclude=[name for name, _ in quant_layers(student.unet) if name not in coarse],
        generator=torch.Generator().manual_seed(seed),
    )
