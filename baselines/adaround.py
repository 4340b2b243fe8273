"""AdaRound, weights only: what Q-Diffusion (arXiv:2302.04304) and all that build on it share below the activations.

The weight pass sees no quantized activation, so its result, one file for each model and weight bits, is where methods
with any activation bits start from (`init: adaround`).
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch

from baselines.method import Count, Iterations, Method, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.reconstruction import CHECK, reconstruct_weights
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


@dataclass(frozen=True, kw_only=True)
class RoundingRecipe:
    """How weights are rounded: what all methods that reconstruct units have in common."""

    preset: Annotated[str, one_of(PRESETS)] = "short"
    weight_iterations: Iterations | None = None  # of every unit, without init; default: the preset's
    batch: Count | None = None  # default: the preset's
    keep: Keep | None = None  # layer glob -> bits kept at least; default: the first and last layer at 8
    rows: Count = 1024  # of the calibration set, for reconstruction
    seed: int = 0  # of the calibration rows, their order and the mini-batches


@dataclass(frozen=True, kw_only=True)
class Recipe(RoundingRecipe):
    split: bool = False  # quantize the two parts of a decoder shortcut's input apart, as published for SD and CIFAR-10


def preset_of(recipe) -> Preset:
    """A recipe's preset, with the recipe's own numbers in place where it has them."""
    own = {field.name: getattr(recipe, field.name, None) for field in fields(Preset)}
    return replace(PRESETS[recipe.preset], **{name: value for name, value in own.items() if value is not None})


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
    drawn = torch.randperm(trajectories, generator=torch.Generator().manual_seed(seed), device="cpu")[:n].sort().values
    return calibration.subset(kept[:, drawn].flatten())


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Round the weights by AdaRound; activations stay in float. Returns a new pipeline.

    Departure from the released commands of Q-Diffusion: 1,024 rows instead of 5,120 (20 steps of 256), or 6,400 for
    Stable Diffusion.
    Raises ValueError for activation bits other than 32.
    """
    return weights_only(pipe, uniform(calibration, recipe.rows, recipe.seed), w, a, recipe, recipe.split)


def weights_only(pipe, drawn: CalibrationSet, w: int, a: int, recipe: RoundingRecipe, split: bool = False):
    """`quantize` on calibration rows already drawn."""
    if a != FLOAT:
        raise ValueError(f"AdaRound quantizes weights only: its bits are w{w}a32, not w{w}a{a}")
    student = swap(pipe, w, a, keep=recipe.keep, splits=splits(pipe, drawn) if split else None)
    round_weights(student, pipe, drawn, recipe)
    return student


def splits(pipe, calibration: CalibrationSet) -> dict[str, int]:
    """Where the decoder's shortcuts are split. Raises ValueError for a denoiser without any."""
    found = shortcut_splits(pipe.unet, calibration.inputs(torch.arange(1, device="cpu")))
    if not found:
        raise ValueError("split: the denoiser has no shortcut convolution over a concatenation")
    return found


def round_weights(student, pipe, drawn: CalibrationSet, recipe: RoundingRecipe) -> None:
    """MSE ranges for each output channel, then AdaRound of a swapped pipeline's weights, supervised by `pipe`.

    Layers with as many bits as the preset's `nearest_from`, or more, keep their nearest codes.
    """
    preset = preset_of(recipe)
    coarse = []
    for name, layer in quant_layers(student.unet):
        layer.choose_weight_range(ranges.mse)
        if layer.weight_quantizer.spec.bits < preset.nearest_from:
            coarse.append(name)
    if not coarse or not preset.weight_iterations:
        return
    reconstruct_weights(
        student.unet,
        pipe.unet,
        drawn,
        torch.arange(len(drawn), device="cpu"),
        iterations=preset.weight_iterations,
        batch=preset.batch,
        lr=TRAVEL / preset.weight_iterations,
        exclude=[name for name, _ in quant_layers(student.unet) if name not in coarse],
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def uniform_rows(recipe, model, trajectories: int) -> int:
    """How many rows `uniform` draws."""
    kept = len(range(0, model.calls, max(1, model.calls // STEPS)))
    return kept * model.halves * min(trajectories, max(1, recipe.rows // (kept * model.halves)))


def rounding_work(recipe, w: int, rows: int) -> Counter:
    """What AdaRound of all weights takes on `rows` rows, where there is no checkpoint to start from."""
    preset = preset_of(recipe)
    if getattr(recipe, "init", None):
        return Counter()
    work = Counter({"weight ranges": 1})
    if w < preset.nearest_from and preset.weight_iterations:
        # Both networks see the rows once, and every unit some of them before and after.
        work["call"] = 2 * rows + 2 * min(CHECK, rows)
        work["rounding"], work["rounding row"] = preset.weight_iterations, preset.weight_iterations * preset.batch
    return work


METHOD = Method(
    "adaround",
    quantize,
    about="learned rounding of the weights, activations in float: one file for each model and weight width, where the"
    " next start",
    work=lambda recipe, w, model, trajectories: rounding_work(recipe, w, uniform_rows(recipe, model, trajectories)),
    weights_only=True,
)
