"""DMQ: learned equivalent scaling, and powers of two for the channels of shortcuts (Lee et al., arXiv:2507.12933).

1. Scaling: x / tau and W tau, with tau learned for each input channel of each layer (`quest.learning.scaling`).
   Timesteps whose error is small count more.
2. Weights: AdaRound of W tau, unit by unit (`baselines.adaround`).
3. Activations: a static range for each sampling step. In shortcuts, whose input channels differ most, channel c at one
   step has the scale 2^-k_c times the tensor's, k from 0 to 3. Codes shifted to the left by 3 - k_c add up as integers.
   Every calibration row votes for the k of a channel with the least error, and the most frequent one is taken if enough
   of them agree, else 0.

x / tau is a prologue of the layer, so a kernel with per-channel multipliers computes it; no kernel here has the shifts.

    dmq without powers of two    shift_agreement: 2
    powers of two alone          scaling_iterations: 0
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch

from baselines.adaround import SplitRecipe, preset_of, round_weights, rounding_work, splits, uniform, uniform_rows
from baselines.granularity import STEP_ROWS
from baselines.method import Bits, Count, Iterations, Method, Paper, Positive, Rule, Step, Valid, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.adam import Descent
from quest.learning.calibrate import calibrate
from quest.learning.scaling import STAGE, STARTS, learn_scaling
from quest.quantization import ranges
from quest.quantization.layers import QuantConv2d, quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups

TRAVEL = 6.0  # learning rate of log tau times iterations, as published: 1e-3 * 6,000
SCALING = {"full": 6000, "short": 300}  # iterations of every layer, by preset
SHIFTS = 3  # most places by which a channel's scale is smaller than the tensor's, as published


@dataclass(frozen=True, kw_only=True)
class Recipe(SplitRecipe):
    """AdaRound's keywords, and those of the scaling."""

    scaling_iterations: Iterations | None = None  # of every layer; default: SCALING of the preset
    start: Annotated[str, one_of(STARTS)] = "ones"  # factors to start from; "smooth": SmoothQuant's with alpha 1/2
    # Share of the calibration rows of a step that must agree on a channel's power of two; above 1: no powers of two.
    shift_agreement: Positive = 0.85
    samples: Count = STEP_ROWS  # rows of each step that set its ranges (released: 256)
    softmax_bits: Bits = 8

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule({}, {"a": Valid(minimum=2, maximum=8)}, "DMQ scales the channels of quantized activations"),
    )


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by DMQ. Returns a new pipeline.

    Departures from the released code:
    - Factors are learned through their logarithm, so that none crosses zero, at a rate that makes rate times iterations
      as published. A layer whose error does not fall has none. Timestep weights: see `scaling.TimestepWeights`.
    - to_q, to_k and to_v of a self-attention share their factors. Attention products are quantized without any.
    - Ranges of a step depend on the rows of this step alone (released: 2 to 29 % of the running average of the step
      before remain), are those of least error, and have whole zero points within the codes.
    - Layers that the released code keeps in float are quantized; the parts of a split shortcut are treated alike.
    """
    drawn = uniform(calibration, recipe.rows, recipe.seed)
    groups, parts = TimeGroups(calibration.timesteps), splits(pipe, drawn, recipe)
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups, splits=parts)
    denoiser = denoiser_of(student)
    if iterations := scaling_iterations(recipe):
        generator = torch.Generator().manual_seed(recipe.seed)
        descent = Descent(iterations, preset_of(recipe).batch, TRAVEL / iterations, generator)
        learn_scaling(denoiser, drawn, pipe.scheduler.config.num_train_timesteps, descent, recipe.start)
    round_weights(student, pipe, drawn, recipe)
    set_tables(denoiser, calibration, recipe)
    return student


def scaling_iterations(recipe) -> int:
    return SCALING[recipe.preset] if recipe.scaling_iterations is None else recipe.scaling_iterations


def set_tables(denoiser, calibration: CalibrationSet, recipe: Recipe) -> None:
    """Set the ranges of every step, and the powers of two of shortcuts. Without one in any step there is no format."""
    shifted = {}
    if recipe.shift_agreement <= 1:
        for name, layer in quant_layers(denoiser):
            whole = name.removesuffix(".hidden").removesuffix(".skip")  # of a split convolution
            shortcut = whole.endswith("conv_shortcut") and isinstance(layer, QuantConv2d)
            if shortcut and layer.input_quantizer.spec.bits < FLOAT:
                shifted[f"{name}.input_quantizer"] = layer.input_quantizer
    for q in shifted.values():
        q.spec = replace(q.spec, axis=1, shifts=SHIFTS)
    choosers = dict.fromkeys(shifted, partial(ranges.mse_shifted, agreement=recipe.shift_agreement))
    samples = dict(samples=recipe.samples, seed=recipe.seed)
    calibrate(denoiser, calibration, ranges.mse_zero_point, choosers=choosers, **samples)
    for q in shifted.values():
        scale, zero_point = q.scale.data.flatten(1), q.zero_point.flatten(1)
        if torch.equal(scale, scale[:, :1].expand_as(scale)):
            q.spec = replace(q.spec, axis=None, shifts=None)
            q.scale.data, q.zero_point = scale[:, 0].clone(), zero_point[:, 0].clone()


def work(recipe, w: int, model, trajectories: int) -> Counter:
    rows = uniform_rows(recipe, model, trajectories)
    counted = rounding_work(recipe, w, rows)
    if iterations := scaling_iterations(recipe):
        counted += Counter({STAGE: iterations, f"{STAGE} row": iterations * preset_of(recipe).batch, "call": rows})
    return counted + Counter({"ranges": model.steps, "ranges row": model.steps * recipe.samples})


def scale_all(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
    """The step of scaling that is measured."""
    learn_scaling(student, calibration, 1000, Descent(iterations, batch, 0.0, torch.Generator().manual_seed(0)))


METHOD = Method(
    "dmq",
    quantize,
    about="DMQ: learned factors of input channels, AdaRound, and powers of two for channels of shortcuts",
    work=work,
    steps={STAGE: Step(scale_all, (STAGE,))},
    paper=Paper(
        "lee2025dmq",
        "2507.12933",
        "{DMQ}: Dissecting Outliers of Diffusion Models for Post-Training Quantization",
        "Lee, Dongyeun and Hur, Jiwan and Yoo, Hyounguk and Kim, Junmo",
        "ICCV",
        2025,
    ),
)
