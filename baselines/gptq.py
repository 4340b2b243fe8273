"""GPTQ: rounds weights one input at a time, and the others make good (Frantar et al., arXiv:2210.17323).

The arithmetic is in `quest.learning.gptq`. The row `gptq` quantizes weights only and is a starting point of other
methods, as `adaround` is; `gptq-mse` adds static activation ranges of least error, so that it differs from `rtn-mse` in
its weights alone.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from baselines.adaround import splits, uniform, uniform_rows
from baselines.method import Bits, Count, Method, Paper, Seed, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate, static_rows
from quest.learning.gptq import gptq
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap

INPUTS = ("fp", "quantized")  # where the inputs of a layer come from


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How GPTQ sees the inputs of the layers."""

    # "quantized": from the network whose earlier layers are rounded already, one layer after the other.
    inputs: Annotated[str, one_of(INPUTS)] = "fp"
    rows: Count = 640  # of the calibration set, evenly from 20 sampler calls: 32 of each
    split: bool = True  # the decoder's shortcuts quantize the two parts of their input apart (arXiv:2302.04304)
    split_conv1: bool = False  # the first convolution of the same residual blocks, too
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    softmax_bits: Bits = 8
    seed: Seed = 0


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Round the weights of all convolutions and linear layers by GPTQ. Returns a new pipeline.

    Weight ranges are those of `rtn-mse`: of least error for each output channel, asymmetric, static. With a = 32
    activations stay in float. Otherwise each has one range for all timesteps, as in `rtn-mse`; with `inputs:
    quantized` they are also quantized while the weights are rounded, and get their final ranges afterwards.

    Departures from the released code, which is for language models: ranges of least error in place of whole ones, the
    order by falling H_kk always, rows from all timesteps, and the search of deepcompressor for a damping that works.
    Raises FloatingPointError, which names the layer, where inputs are not finite or no damping works.
    """
    drawn = uniform(calibration, recipe.rows, recipe.seed)
    parts = splits(pipe, drawn, recipe)
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, splits=parts)
    for _, layer in quant_layers(denoiser_of(student)):
        layer.choose_weight_range(ranges.mse)
    if a < FLOAT and recipe.inputs == "quantized":
        set_activations(student, calibration, a, recipe.seed)
    gptq(denoiser_of(student), drawn, recipe.inputs == "quantized")
    if a < FLOAT:
        set_activations(student, calibration, a, recipe.seed)
    return student


def set_activations(student, calibration: CalibrationSet, a: int, seed: int) -> None:
    """Choose the activation ranges of `rtn-mse`."""
    denoiser = denoiser_of(student)
    calibrate(denoiser, calibration, ranges.mse_zero_point, samples=static_rows(a), seed=seed)


def work(recipe, w: int, model, trajectories: int) -> Counter:
    return Counter({"gptq": 1, "gptq row": uniform_rows(recipe, model, trajectories)})


def work_with_activations(recipe, w: int, model, trajectories: int) -> Counter:
    passes = 2 if recipe.inputs == "quantized" else 1
    rows = static_rows(8)  # at 4 bits fewer
    return work(recipe, w, model, trajectories) + Counter({"ranges": passes, "ranges row": passes * rows})


METHOD = Method(
    "gptq",
    quantize,
    about="GPTQ, activations in float: weights from which other methods can start",
    work=work,
    paper=Paper(
        "frantar2023gptq",
        "2210.17323",
        "{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan",
        "ICLR",
        2023,
    ),
    weights_only=True,
    variants={
        "gptq-mse": dict(
            about="GPTQ's weights with static activation ranges of least error",
            work=work_with_activations,
            weights_only=False,
        ),
    },
)
