"""Q-Diffusion: reconstruction of blocks on sampler inputs, and split shortcuts (Li et al., arXiv:2302.04304).

1. Calibration: activations drift along the trajectory, so rows are drawn evenly from the sampling steps of the
   full-precision model (`adaround.uniform`).
2. Shortcut split: a decoder shortcut gets the concatenation [h, skip], whose two parts have different ranges. Each part
   has quantizers of its own for inputs and weights (`split`).
3. Weights: AdaRound, unit by unit (`baselines.adaround`).
4. Activations: one range per tensor, the same at all timesteps (`activation_ranges_of`). Then the scales ("steps") are
   learned unit by unit with Adam: the loss is |error|^2.4 of the unit's output, on full-precision inputs.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from diffusers.models.attention import BasicTransformerBlock

from baselines.adaround import SplitRecipe, preset_of, round_weights, rounding_work, splits, uniform, uniform_rows
from baselines.method import Bits, Count, Iterations, Method, Paper, Positive, Rule, Valid, one_of, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.adam import Descent
from quest.learning.calibrate import calibrate, calibrating, choosing, observe, running, static_rows
from quest.learning.reconstruction import CHECK, reconstruct_activations
from quest.learning.units import chunk_rows
from quest.quantization import ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import input_quantizers
from quest.quantization.splitting import split_layers
from quest.quantization.swapping import GRANULARITIES, set_granularity, swap
from quest.quantization.timegroups import TimeGroups, grouped

RUNNING = ("ema", "ema-symmetric")
RANGES = (*ranges.SEARCHED, *RUNNING)
MOMENTUM = 0.95  # of running averages of ranges
BATCH = 64  # rows per update of a running average


@dataclass(frozen=True, kw_only=True)
class ReconstructionRecipe(SplitRecipe):
    """Keywords of Q-Diffusion's stack, on which later papers rerun their rivals."""

    init: str | None = None  # AdaRound's checkpoint; default: round the weights here
    activation_iterations: Iterations | None = None  # of every unit; default: the preset's
    activation_lr: Positive | None = None  # of the activation steps; default: the preset's
    softmax_bits: Bits = 8  # published: 16 for Stable Diffusion
    weight_axis: Annotated[
        int | None, one_of((0, None)), Valid(description="0: a weight scale per output channel; null: one per tensor")
    ] = 0  # None: PTQD's released code
    activation_ranges: Annotated[str, one_of(RANGES)] = "mse-zero-point"  # see `activation_ranges_of`
    stored_order: bool = False  # calibrate with the noisiest rows first, as the released code does; default: shuffled
    granularity: Annotated[str, one_of(GRANULARITIES)] = "tensor"  # "released": as QuEST's code at 4 bits
    time_groups: Count = 1  # QuEST's time groups; 1: one set of activation scales for all timesteps
    samples: Count | None = None  # rows (of each time group) that set the searched ranges; default: static_rows

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            {"time_groups": Valid(minimum=2)},
            {"activation_ranges": one_of(ranges.SEARCHED), "stored_order": one_of((False,))},
            "running ranges and the stored order hold at all timesteps",
        ),
        Rule({"init": Valid()}, {"weight_axis": one_of((0,))}, "weights of a checkpoint come with their scales"),
    )


@takes(ReconstructionRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: ReconstructionRecipe):
    """Quantize by Q-Diffusion: AdaRound of the weights, static activation ranges, learned activation steps.

    Departures from the released code:
    - Both parts of a split layer are regularised. Calibration rows are shuffled (`stored_order` undoes that).
    - The first and last layer keep 8 bits, as in every row of the common stack.
    - There are 1,024 rows by default. The paper's models set the published 5,120 (6,400 for Stable Diffusion).
    - The preset `short` runs 1,000 + 250 iterations of 16 rows for each unit at higher rates (released: 20,000 + 5,000
      of 32), and rounds weights of 8 bits to nearest (`nearest_from`; released: AdaRound).
    - Ranges are those of `activation_ranges="mse-zero-point"`, which no released command uses, unless a model sets a
      released kind, as it does from 8-bit activations on.
    - Below 8-bit activations 8 rows set a searched range, else 64 (`static_rows`; released: 64 or 16).

    Split shortcuts are part of the method and the default. Its released commands for LSUN leave them out, and so do the
    LSUN models here (`split` in quest.diffusion.models).
    Returns a new pipeline. Raises ValueError where init and split disagree.
    """
    return common_stack(pipe, calibration, uniform(calibration, recipe.rows, recipe.seed), w, a, recipe)


def common_stack(
    pipe, calibration: CalibrationSet, drawn: CalibrationSet, w: int, a: int, recipe: ReconstructionRecipe
):
    """Q-Diffusion on `drawn`, the rows that a method chose from its calibration set."""
    starts = grouped(calibration.timesteps, recipe.time_groups)
    groups = None if recipe.time_groups == 1 else TimeGroups(starts)
    parts = splits(pipe, drawn, recipe)
    quantizers = dict(keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups)
    if recipe.init is None:
        student = swap(pipe, w, a, **quantizers, splits=parts, weight_axis=recipe.weight_axis)
        round_weights(student, pipe, drawn, recipe)
    else:
        student = swap(pipe, w, a, **quantizers)
        load_weights(denoiser_of(student), recipe.init)
        if split_layers(denoiser_of(student)) != parts:
            count = len(split_layers(denoiser_of(student)))
            raise ValueError(f"split: {recipe.split}, but {recipe.init} has {count} split layers")
    set_granularity(denoiser_of(student), recipe.granularity, a)
    activation_ranges_of(
        denoiser_of(student),
        drawn,
        recipe.activation_ranges,
        samples=recipe.samples or static_rows(a),
        stored_order=recipe.stored_order,
        seed=recipe.seed,
    )
    preset = preset_of(recipe)
    if preset.activation_iterations:
        generator = torch.Generator().manual_seed(recipe.seed)
        descent = Descent(preset.activation_iterations, preset.batch, preset.activation_lr, generator)
        reconstruct_activations(denoiser_of(student), denoiser_of(pipe), drawn, descent)
    return student


@torch.no_grad()
def activation_ranges_of(
    denoiser, drawn: CalibrationSet, kind: str, *, samples: int, stored_order: bool, seed: int
) -> None:
    """Set the activation ranges on the rows `drawn`.

    kind, with the models for which the released commands use it:
    - "mse" (Churches): the asymmetric range of least |x - x~|^2.4 on `samples` rows.
    - "mse-zero-point" (none): the same, with a search of the zero point (ranges.mse_zero_point).
    - "ema-symmetric" (Bedrooms, CIFAR-10): the absolute maximum from running averages of minimum and maximum, over
      batches of 64 rows with momentum 0.95.
    - "ema" (Stable Diffusion): the asymmetric range from the same averages.

    Running averages replace the range of the first batch, except for the products of attention outside a transformer
    block, which keep it.
    """
    quantizers = input_quantizers(denoiser)
    if kind == "ema-symmetric":
        for name, q in quantizers.items():
            if not name.endswith("processor.p"):  # attention probabilities are unsigned
                q.spec = replace(q.spec, symmetric=True)
    order = drawn.call.argsort(stable=True) if stored_order else None
    if kind in ranges.SEARCHED:
        first = drawn if order is None else drawn.subset(order[:samples])
        calibrate(denoiser, first, ranges.SEARCHED[kind], samples=samples, seed=seed)
        return
    if order is None:
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed), device="cpu")
    blocks = tuple(f"{n}." for n, m in denoiser.named_modules() if isinstance(m, BasicTransformerBlock))
    batches = order.split(BATCH)
    chunk = chunk_rows(denoiser, drawn.inputs(order[:1]), BATCH)
    with calibrating(denoiser, ranges.minmax if kind == "ema-symmetric" else ranges.mse):
        observe(denoiser, drawn.inputs(batches[0]), chunk)
    averaged = {n: q for n, q in quantizers.items() if ".processor." not in n or n.startswith(blocks)}
    with choosing({q: running(name, MOMENTUM) for name, q in averaged.items()}):
        for rows in batches:
            observe(denoiser, drawn.inputs(rows), chunk)


def stack_work(recipe, w: int, rows: int) -> Counter:
    """The `work` of `common_stack` on `rows` rows."""
    preset = preset_of(recipe)
    ranged = recipe.time_groups * (recipe.samples or static_rows(8))  # at 4 bits fewer
    work = rounding_work(recipe, w, rows) + Counter({"ranges": recipe.time_groups, "ranges row": ranged})
    if recipe.activation_ranges in RUNNING:  # over all rows
        work["quantized call"] += rows
    if preset.activation_iterations:
        work += Counter({"call": rows, "quantized call": 2 * min(CHECK, rows)})
        work["step learning"] = preset.activation_iterations
        work["step learning row"] = preset.activation_iterations * preset.batch
    return work


METHOD = Method(
    "q-diffusion",
    quantize,
    about="Q-Diffusion: block reconstruction, split shortcuts, learned activation steps",
    work=lambda recipe, w, model, trajectories: stack_work(recipe, w, uniform_rows(recipe, model, trajectories)),
    fixed={"time_groups": 1},  # one set of ranges for all timesteps
    recipe={"init": "adaround"},
    paper=Paper(
        "li2023qdiffusion",
        "2302.04304",
        "{Q-Diffusion}: Quantizing Diffusion Models",
        "Li, Xiuyu and Liu, Yijiang and Lian, Long and Yang, Huanrui and Dong, Zhen and Kang, Daniel"
        " and Zhang, Shanghang and Keutzer, Kurt",
        "ICCV",
        2023,
    ),
)
