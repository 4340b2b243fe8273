"""Round to nearest: no reconstruction, no finetuning, and no time groups unless each step has its own ranges."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, ClassVar

from baselines.after_silu import BITS, FORMATS, set_formats
from baselines.method import Bits, Count, Method, Rule, Seed, Valid, one_of, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate, static_rows
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups

WHOLE = 256  # rows that represent the whole calibration set
RANGES = {  # of weights (per output channel) and of activations (per tensor)
    "minmax": (ranges.minmax, ranges.minmax),
    **{name: (ranges.mse, search) for name, search in ranges.SEARCHED.items()},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How ranges are chosen."""

    ranges: Annotated[str, one_of(RANGES)] = "minmax"
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    softmax_bits: Bits = 8
    # Random rows of all timesteps that set the ranges; default: WHOLE for "minmax", static_rows for searched ranges.
    samples: Count | None = None
    per_step: bool = False  # ranges for each sampling step, from as many rows of that step
    # Of 4-bit inputs that follow a SiLU, see `baselines.after_silu`; default: that of the other activations.
    after_silu: Annotated[str, one_of(FORMATS)] | None = None
    seed: Seed = 0

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            {"after_silu": one_of(name for name, (_, choose) in FORMATS.items() if choose is None)},
            {"per_step": one_of((False,))},
            "scales of blocks come from each tensor",
        ),
        Rule(
            {"after_silu": one_of(FORMATS)},
            {"a": Valid(minimum=2, maximum=BITS)},
            f"after_silu is of {BITS}-bit inputs after a SiLU",
        ),
    )


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize weights and activations to the nearest code of static ranges.

    ranges: "minmax" is the whole range; "mse" shrinks it to the least |x - x~|^2.4 (Q-Diffusion, arXiv:2302.04304);
    "mse-zero-point" also searches the zero points of activations. Each activation tensor has one range for all
    timesteps, or with `per_step` one for each. Returns a new pipeline.
    Raises ValueError for `after_silu` where no such input has 4 bits.
    """
    choose_weights, choose_activations = RANGES[recipe.ranges]
    groups = TimeGroups(calibration.timesteps) if recipe.per_step else None
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups)
    denoiser = denoiser_of(student)
    for _, layer in quant_layers(denoiser):
        layer.choose_weight_range(choose_weights)
    samples = recipe.samples or (WHOLE if recipe.ranges == "minmax" else static_rows(a))
    choosers = set_formats(denoiser, recipe.after_silu) if recipe.after_silu else {}
    calibrate(denoiser, calibration, choose_activations, samples=samples, seed=recipe.seed, choosers=choosers)
    return student


def work(recipe, w: int, model, trajectories: int) -> Counter:
    searched = recipe.ranges != "minmax"
    steps = model.steps if recipe.per_step else 1
    rows = steps * (recipe.samples or (static_rows(8) if searched else WHOLE))  # at 4 bits fewer
    return Counter({"weight ranges": 1, "ranges": steps, "ranges row": rows} if searched else {"quantized call": rows})


METHOD = Method(
    "rtn",
    quantize,
    about="round to nearest with whole ranges",
    work=work,
    variants={
        "rtn-mse": dict(about="round to nearest with ranges of least error", fixed={"ranges": "mse-zero-point"}),
    },
)
