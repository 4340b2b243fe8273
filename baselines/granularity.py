"""What shares the scales of activations: keywords of methods that can be combined with any of it.

tensor    static scales, one for each activation tensor (and each step with `per_step`), from calibration rows;
          with `group` one for so many channels of a layer's input
dynamic   scales that are computed from the tensor itself, for each sample or each token, in groups of channels
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from baselines.method import Bits, Count, Rule, Seed, one_of
from quest.affine import FLOAT, ROWS
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate, static_rows
from quest.learning.clipping import RATIOS, search_clips
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import input_quantizers
from quest.quantization.swapping import make_dynamic, make_grouped, swap
from quest.quantization.timegroups import TimeGroups

STEP_ROWS = 32  # calibration rows of each step that set its ranges, or that search clip ratios


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Keywords of dynamic scales."""

    dynamic: Annotated[str, one_of(ROWS)] | None = None  # scales of each sample or token; default: static ranges
    # Channels with one scale, dynamic or of the static inputs of layers (not of attention products); default: all.
    group: Annotated[int, one_of((64, 32, 16))] | None = None
    levels: Annotated[str, one_of(("asymmetric", "symmetric"))] = "asymmetric"  # of 4 bits 16 codes, or 15: -7 to 7
    # Of dynamic ranges: whole, or shrunk by the ratio for each layer that has the least error of its output.
    clip: Annotated[str, one_of(("whole", "searched"))] = "whole"
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    softmax_bits: Bits = 8
    seed: Seed = 0

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule({"clip": one_of(("searched",))}, {"dynamic": one_of(ROWS)}, "clip ratios are of dynamic scales"),
    )


@dataclass(frozen=True, kw_only=True)
class Granularity(Dynamic):
    """Keywords of static ranges beside them."""

    per_step: bool = False  # static ranges for each sampling step, not one for all
    samples: Count | None = None  # rows that set static ranges; default: STEP_ROWS of each step, or static_rows

    rules: ClassVar[tuple[Rule, ...]] = (
        *Dynamic.rules,
        Rule({"dynamic": one_of(ROWS)}, {"per_step": one_of((False,))}, "dynamic scales come from each tensor"),
    )


def swapped(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Dynamic):
    """A quantized pipeline whose activations have this granularity; weights, and static ranges, are not chosen yet."""
    groups = TimeGroups(calibration.timesteps) if getattr(recipe, "per_step", False) else None
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups)
    denoiser, symmetric = denoiser_of(student), recipe.levels == "symmetric"
    if recipe.dynamic is not None:
        make_dynamic(denoiser, recipe.dynamic, recipe.group, symmetric)
        return student
    for name, q in input_quantizers(denoiser).items():
        if q.spec.bits < FLOAT and not name.endswith("processor.p"):  # probabilities are never negative
            q.spec = replace(q.spec, symmetric=symmetric, narrow=symmetric or None)
    if recipe.group is not None:
        make_grouped(denoiser, recipe.group)
    return student


def set_ranges(denoiser, calibration: CalibrationSet, a: int, recipe: Dynamic) -> None:
    """Set static ranges of least error, or the clip ratios of dynamic ones. Weights must have their ranges."""
    if recipe.dynamic is None:
        samples = recipe.samples or (STEP_ROWS if recipe.per_step else static_rows(a))
        calibrate(denoiser, calibration, ranges.mse_zero_point, samples=samples, seed=recipe.seed)
    elif recipe.clip == "searched":
        search_clips(denoiser, calibration, rows=STEP_ROWS, seed=recipe.seed)


def ranges_work(recipe: Dynamic, w: int, model, trajectories: int) -> Counter:
    """The `work` of weight ranges of least error and of `set_ranges`."""
    work = Counter({"weight ranges": 1})
    if recipe.dynamic is None:
        steps = model.steps if recipe.per_step else 1
        rows = recipe.samples or (STEP_ROWS if recipe.per_step else static_rows(8))  # at 4 bits fewer
        return work + Counter({"ranges": steps, "ranges row": steps * rows})
    if recipe.clip == "searched":
        work["quantized call"] = model.steps * STEP_ROWS * (1 + len(RATIOS))
    return work
