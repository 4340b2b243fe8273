"""AdaRound, weights only: learned rounding as in Q-Diffusion (arXiv:2302.04304), on which most methods here build.

Rounding every weight to its nearest code is not best for a layer's output. AdaRound (arXiv:2004.10568) decides for each
weight whether to round up or down:

1. Choose a scale s for each output channel by the least error of the weights.
2. Make the rounding soft: w~ = s (floor(w / s) + h), with h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1) (equations 22, 23).
   One alpha per weight starts where w~ = w.
3. For each unit, such as a residual block, learn alpha with Adam. The loss is the squared error of the unit's output
   against full precision, on inputs from the network whose weights are quantized (equation 25), plus a regulariser that
   pushes every h to 0 or 1 (equation 24).
4. Round h to 0 or 1. The weights are codes now.

No activation is quantized meanwhile. So one result for each model and number of weight bits is the starting point of
methods at all activation bits (`init: adaround`).
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch

from baselines.method import Count, Iterations, Method, Positive, Seed, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.adam import Descent
from quest.learning.reconstruction import CHECK, reconstruct_weights
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import quant_layers
from quest.quantization.splitting import concatenation_splits
from quest.quantization.swapping import swap

TRAVEL = 20  # learning rate of the rounding times its iterations, as published: 1e-3 * 20,000
STEPS = 20  # sampler calls from which calibration rows are drawn, as published for DDIM


@dataclass(frozen=True)
class Preset:
    """Length of the two passes over all units: rounding of weights, then activation steps."""

    weight_iterations: int  # of every unit
    activation_iterations: int  # of every unit
    batch: int  # rows of a mini-batch
    activation_lr: float = 4e-4
    nearest_from: int = FLOAT  # layers with at least so many weight bits are rounded to nearest
    weight_lr: float | None = None  # of the rounding; default: TRAVEL / weight_iterations

    def rounding(self, generator: torch.Generator) -> Descent:
        """How the rounding is learned, in at least one iteration."""
        lr = TRAVEL / self.weight_iterations if self.weight_lr is None else self.weight_lr
        return Descent(self.weight_iterations, self.batch, lr, generator)


PRESETS = {
    "full": Preset(20000, 5000, 32),  # as published
    # In both passes, the learning rate times the iterations is as published.
    "short": Preset(1000, 250, 16, activation_lr=8e-3, nearest_from=8),
}


@dataclass(frozen=True, kw_only=True)
class RoundingRecipe:
    """How weights are rounded: the keywords of all methods that reconstruct units."""

    preset: Annotated[str, one_of(PRESETS)] = "short"
    weight_iterations: Iterations | None = None  # of every unit, without init; default: the preset's
    weight_lr: Positive | None = None  # of the rounding, without init; default: 20 / weight_iterations, as published
    batch: Count | None = None  # default: the preset's
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    rows: Count = 1024  # of the calibration set, for reconstruction
    seed: Seed = 0  # of the calibration rows, their order and the mini-batches


@dataclass(frozen=True, kw_only=True)
class SplitRecipe(RoundingRecipe):
    """Which convolutions over a concatenation quantize its two parts apart (arXiv:2302.04304, section 4.2)."""

    split: bool = True  # the decoder's shortcuts, as published for Stable Diffusion and CIFAR-10
    split_conv1: bool = False  # the first convolution of the same residual blocks; not published


def preset_of(recipe) -> Preset:
    """The preset of a recipe. Numbers that the recipe sets override it."""
    numbers = {field.name: getattr(recipe, field.name, None) for field in fields(Preset)}
    return replace(PRESETS[recipe.preset], **{name: value for name, value in numbers.items() if value is not None})


def uniform(calibration: CalibrationSet, rows: int, seed: int) -> CalibrationSet:
    """About `rows` rows, evenly from about 20 sampler calls (arXiv:2302.04304, section 4.1).

    Every k-th call is used, with the same trajectories and both halves of a guided call. The seed draws the
    trajectories; the released code takes the first ones. Rows lie in the order of the calls, noisiest first.
    """
    calls = calibration.calls()
    trajectories = len(calibration.trajectory.unique())
    calls = calls.view(-1, trajectories, calls.shape[1])  # [calls, trajectories, halves]
    calls = calls[:: max(1, len(calls) // STEPS)]
    n = max(1, rows // (len(calls) * calls.shape[2]))
    chosen = torch.randperm(trajectories, generator=torch.Generator().manual_seed(seed), device="cpu")[:n].sort().values
    return calibration.subset(calls[:, chosen].flatten())


@takes(SplitRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: SplitRecipe):
    """Round the weights by AdaRound; activations stay in float. Returns a new pipeline.

    Departure from the released commands of Q-Diffusion: 1,024 rows by default. The paper's models set the published
    5,120 (20 steps of 256), or 6,400 for Stable Diffusion.
    Raises ValueError for activation bits other than 32.
    """
    drawn = uniform(calibration, recipe.rows, recipe.seed)
    return weights_only(pipe, drawn, w, a, recipe, splits(pipe, drawn, recipe))


def weights_only(pipe, drawn: CalibrationSet, w: int, a: int, recipe: RoundingRecipe, parts: dict | None = None):
    """`quantize` on `drawn`, the rows that a method chose from its calibration set. parts: see `splits`."""
    if a != FLOAT:
        raise ValueError(f"AdaRound quantizes weights only: its bits are w{w}a32, not w{w}a{a}")
    student = swap(pipe, w, a, keep=recipe.keep, splits=parts)
    round_weights(student, pipe, drawn, recipe)
    return student


def splits(pipe, calibration: CalibrationSet, recipe: SplitRecipe) -> dict[str, int]:
    """Convolution -> channel at which the recipe splits it; empty for a denoiser that concatenates nothing."""
    kinds = {"conv_shortcut": recipe.split, "conv1": recipe.split_conv1}
    if not any(kinds.values()):
        return {}
    found = concatenation_splits(denoiser_of(pipe), calibration.inputs(torch.arange(1, device="cpu")))
    return {name: channels for name, channels in found.items() if kinds[name.rpartition(".")[2]]}


def round_weights(student, pipe, drawn: CalibrationSet, recipe: RoundingRecipe) -> None:
    """Choose weight ranges of least error for each output channel, then learn the rounding with `pipe` as the target.

    student: a pipeline after `swap`; it is changed. Layers with `nearest_from` bits or more keep their nearest codes.
    """
    preset = preset_of(recipe)
    learned_layers = []
    for name, layer in quant_layers(denoiser_of(student)):
        layer.choose_weight_range(ranges.mse)
        if layer.weight_quantizer.spec.bits < preset.nearest_from:
            learned_layers.append(name)
    if not learned_layers or not preset.weight_iterations:
        return
    descent = preset.rounding(torch.Generator().manual_seed(recipe.seed))
    reconstruct_weights(denoiser_of(student), denoiser_of(pipe), drawn, descent, learned_layers)


def uniform_rows(recipe, model, trajectories: int) -> int:
    """How many rows `uniform` draws."""
    calls = len(range(0, model.calls, max(1, model.calls // STEPS)))
    return calls * model.halves * min(trajectories, max(1, recipe.rows // (calls * model.halves)))


def rounding_work(recipe, w: int, rows: int) -> Counter:
    """The `work` of AdaRound on `rows` rows. It is empty where a checkpoint has the weights already (`init`)."""
    preset = preset_of(recipe)
    if getattr(recipe, "init", None):
        return Counter()
    work = Counter({"weight ranges": 1})
    if w < preset.nearest_from and preset.weight_iterations:
        # Both networks process all rows once, and CHECK rows judge every unit before and after.
        work["call"] = 2 * rows + 2 * min(CHECK, rows)
        work["rounding"], work["rounding row"] = preset.weight_iterations, preset.weight_iterations * preset.batch
    return work


METHOD = Method(
    "adaround",
    quantize,
    about="learned rounding of the weights, activations in float: one file for each model and weight width; rows with "
    "`init: adaround` start from it",
    work=lambda recipe, w, model, trajectories: rounding_work(recipe, w, uniform_rows(recipe, model, trajectories)),
    weights_only=True,
)
