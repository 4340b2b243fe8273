"""QuEST: efficient selective finetuning of a quantized denoiser (Wang et al., arXiv:2402.03666).

No training data is needed: the inputs are those that the full-precision model met in its own sampling runs, and its
outputs are the targets. Equations are those of the sixth version of the paper.

1. Start from a denoiser with rounded weights, as AdaRound leaves them.
2. TAQuant gives every activation quantizer one scale and one zero point per time group (a stretch of timesteps):
   x~ = s (clamp(round(x / s) + z) - z) (equations 2 and 3), with s and z of the group that the call's timestep is in.
   With `dynamic`, which is ours, s and z come from the tensor itself, and a clip ratio of each quantizer is tuned.
3. Temporal layer alignment minimizes L_TLA + L_G: the squared error of the output of each time-embedding projection
   (equation 4) plus that of the predicted noise (equation 6). It tunes the projections' weights and activation scales.
4. Critical module alignment minimizes L_CMA + L_G: the same for the attention-related layers, each with the quantized
   input that it really meets (equation 5). It tunes their weights and all remaining activation scales.

Everything else is frozen: other weights, the scales of all weights, and every zero point. Each iteration rounds a tuned
weight anew, and its gradient passes the rounding unchanged (straight-through estimator).

The paper's sixth version, its released code and what works best on small models differ in many places. Each of them is
a keyword, a field of `FinetuneRecipe`. PAPER and OFFICIAL are the keywords that follow the first two.

A method is one file that describes itself, so this one holds all three recipes, the stages and what they cost; that is
why it has more than 400 lines.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import nn

from baselines.method import Bits, Count, Iterations, Method, Paper, Positive, Rule, Seed, Step, Valid, one_of, takes
from baselines.selection import (
    SELECTION,
    SELECTIONS,
    default_selection,
    matches,
    selected,
    share_inputs,
    tuned_layers,
    unshare_inputs,
)
from quest.affine import FLOAT, ROWS
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.diffusion.models import CONDITIONED
from quest.learning.alignment import Stage, Visit, align, joint, teacher_outputs
from quest.learning.calibrate import calibrate
from quest.quantization import cost
from quest.quantization import ranges as choosers
from quest.quantization.checkpoint import load_weights
from quest.quantization.header import read as read_header
from quest.quantization.layer_names import KEEP, Keep
from quest.quantization.layers import QuantLayer, freeze, input_quantizers, own_floats, quant_layers, share_floats
from quest.quantization.swapping import GRANULARITIES, make_dynamic, set_granularity, swap
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime.resume import part


class Preset(NamedTuple):
    """Length of the two stages, and their learning rates."""

    iterations: float | tuple[int, int]  # of each stage, or the share of the published iterations
    batch: tuple[int, int]  # rows per iteration
    lr_multiplier: float  # of the published learning rates


PRESETS = {
    "short": Preset((100, 200), (16, 16), 100),  # chosen on held-out trajectories (results/LOG.md)
    "tenth": Preset(0.1, (2, 4), 10),  # the 2,200 iterations of the paper's table 8
    "full": Preset(1.0, (2, 4), 1),
}
# Iterations of the released code. For Stable Diffusion they differ between timesteps; here each has their mean.
PUBLISHED = {"lsun": (16_000, 6_400), "imagenet": (24_000, 6_400), "sd": (3_850, 8_000)}

# What the released commands set for each kind of model. LSUN-Bedrooms and ImageNet take whole symmetric ranges, as
# running averages except for 4-bit activations. (For Stable Diffusion the released running average reaches only one
# timestep, so it is left out.)
RELEASED = {
    "lsun": dict(levels="symmetric", ranges="running", ranges_a4="minmax", local_cma=False),
    "imagenet": dict(levels="symmetric", ranges="running", ranges_a4="minmax", local_cma=False),
    "sd": dict(levels="asymmetric", ranges="percentile", ranges_a4="percentile", local_cma=True),
}


def divides_rows(preset: str) -> Rule:
    """The rule for numbers of time groups that share the rows of a preset's iterations."""
    shared = math.gcd(*PRESETS[preset].batch)
    divisors = tuple(n for n in range(1, shared + 1) if shared % n == 0)
    return Rule({"preset": one_of((preset,)), "batch": one_of((None,))}, {"groups_per_step": one_of(divisors)}, EVENLY)


LEVELS = {"asymmetric": {}, "symmetric": dict(symmetric=True), "wide": dict(symmetric=True, wide=True)}
RANGES = {
    **choosers.SEARCHED,
    "minmax": choosers.minmax,
    "percentile": choosers.percentile,
    "running": choosers.minmax,
}
MOMENTUM = 0.95  # of running averages of ranges

EVENLY = "time groups share the rows of an iteration evenly"
STAGES = ("temporal layer alignment", "critical module alignment")
# How each of the two stages goes through the time groups. None: every iteration takes another group, in random order.
# Visit: groups follow each other from the noisiest to the cleanest, and every visit has a new Adam for the scales.
SCHEDULES = {
    "interleaved": (None, None),
    "sequential": (Visit(), Visit()),
    "released": (Visit(rows=8), Visit(16, rows=64)),  # 200 epochs of 8 rows, group by group; 20 rounds of 64 new rows
}

PAPER = dict(
    preset="tenth",
    time_groups=1,
    samples=256,
    time_embedding="tuned",
    global_weight=1.0,
    log_scales=False,
    cosine=False,
)
OFFICIAL = dict(
    preset="tenth",
    keep={"conv_in": [2, 8], "conv_out": [2, 8]},  # the ends: activations at 8 bits, weights like all others
    granularity="released",
    levels="released",
    ranges="released",
    samples=64,
    time_embedding="frozen",
    qkv_as_one=True,
    local_cma="released",
    schedule="released",
    lr_temporal_scale=1e-5,
    log_scales=False,
    cosine=False,
)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """All choices of QuEST and of the methods that replace one part of it."""

    init: str | None = None  # checkpoint whose weights to start from; default: nearest codes of the mse range
    preset: Annotated[str, one_of(PRESETS), Valid(description="iterations, batch and learning rates")] = "short"
    # The activation quantizers.
    time_groups: Count | None = None  # TAQuant's number of groups, 1 for a single set; default: one for each timestep
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    softmax_bits: Bits = 8
    # "released": at 4 bits one scale per channel or token, see `set_granularity`.
    granularity: Annotated[str, one_of(GRANULARITIES)] = "tensor"
    # "wide" has 33 levels at "4 bit"; "released": the model's.
    levels: Annotated[str, one_of((*LEVELS, "released"))] = "asymmetric"
    # "running": averages; "released": the model's.
    ranges: Annotated[str, one_of((*RANGES, "released"))] = "mse-zero-point"
    samples: Count = 32  # random calibration rows per time group that set the activation ranges
    # Scales of each sample or token from the tensor itself, whose clip ratios are tuned; default: static ranges.
    dynamic: Annotated[str, one_of(ROWS)] | None = None
    # What is tuned. The layers of the critical stage; default: those of the kind of pipeline.
    selection: Annotated[str, SELECTION] | None = None
    # The time embedding: "scales" tuned in the critical stage, all "tuned" in the temporal stage, or "frozen".
    time_embedding: Annotated[str, one_of(("scales", "tuned", "frozen"))] = "scales"
    qkv_as_one: bool = False  # to_q, to_k and to_v of unconditional attention share one input quantizer, as in CompVis
    control: bool = False  # the temporal stage tunes as many weights of random other layers: a control experiment
    # The losses.
    local_tla: bool = True
    local_cma: Annotated[bool | str, one_of((True, False, "released"))] = True  # "released": for Stable Diffusion only
    # Weight of L_G; default: the number of tuned layers, as in the released code.
    global_weight: Annotated[float, Valid(minimum=0)] | None = None
    # The stages. "joint": one stage with both losses and 2 L_G (equation 7).
    order: Annotated[str, one_of(("tla-cma", "cma-tla", "joint"))] = "tla-cma"
    schedule: Annotated[str, one_of(SCHEDULES)] = "interleaved"  # of timesteps
    tla_iterations: Iterations | None = None  # default: the preset's
    cma_iterations: Iterations | None = None  # default: the preset's
    batch: Count | None = None  # rows per iteration; default: the preset's
    groups_per_step: Count = 1  # time groups that share the rows of an iteration (published: 1)
    # The optimizer.
    lr_weight: Positive = 1e-5  # published; the preset multiplies it
    lr_scale: Positive = 1e-4  # published; the preset multiplies it
    lr_temporal_scale: Positive | None = None  # of the temporal stage; default: lr_scale
    log_scales: bool = True  # tune the logarithm of a scale, so that a step is relative to it
    cosine: bool = True  # learning rates fall to zero over a stage
    seed: Seed = 0

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule({}, {"a": Valid(minimum=2, maximum=8)}, "QuEST tunes the scales of activations"),
        Rule(
            {"groups_per_step": Valid(minimum=2)},
            {"schedule": one_of(("interleaved",))},
            "the other schedules visit one time group after the other",
        ),
        Rule({"groups_per_step": Valid(minimum=2)}, {"batch": Valid(multipleOf="groups_per_step")}, EVENLY),
        *map(divides_rows, PRESETS),
        Rule(
            {"dynamic": one_of(ROWS)},
            {
                "granularity": one_of((granularity,)),
                "levels": one_of((levels,)),
                "ranges": one_of((ranges,)),
                "samples": one_of((samples,)),
            },
            "only static ranges have other values than the default",
        ),
    )


def resolve(recipe: FinetuneRecipe, pipe, a: int) -> FinetuneRecipe:
    """The recipe with every value decided for one pipeline and `a` activation bits.

    "released" and None become the values of this kind of model and of the preset, `batch` becomes a pair (both stages),
    and the learning rates are multiplied.
    """
    selection = recipe.selection or default_selection(pipe)
    kind = selection if selection in SELECTIONS else default_selection(pipe)
    released, (iterations, batch) = RELEASED[kind], sizes(recipe, kind)
    multiplier, temporal = PRESETS[recipe.preset].lr_multiplier, recipe.lr_temporal_scale
    return replace(
        recipe,
        selection=selection,
        levels=released["levels"] if recipe.levels == "released" else recipe.levels,
        ranges=released["ranges_a4" if a == 4 else "ranges"] if recipe.ranges == "released" else recipe.ranges,
        local_cma=released["local_cma"] if recipe.local_cma == "released" else recipe.local_cma,
        tla_iterations=iterations[0],
        cma_iterations=iterations[1],
        batch=batch,
        lr_weight=recipe.lr_weight * multiplier,
        lr_scale=recipe.lr_scale * multiplier,
        lr_temporal_scale=(recipe.lr_scale if temporal is None else temporal) * multiplier,
    )


def sizes(recipe, kind: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(iterations, rows per iteration) of both stages. The recipe's numbers override those of its preset."""
    preset = PRESETS[recipe.preset]
    share = preset.iterations
    of_preset = share if isinstance(share, tuple) else [round(share * n) for n in PUBLISHED[kind]]
    of_recipe = (recipe.tla_iterations, recipe.cma_iterations)
    first, second = (b if a is None else a for a, b in zip(of_recipe, of_preset, strict=True))
    return (first, second), (recipe.batch, recipe.batch) if recipe.batch else preset.batch


@takes(FinetuneRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: FinetuneRecipe):
    """Quantize by QuEST. Returns a new pipeline.

    The defaults depart from the paper, which names no batch or schedule, in these places:
    - TAQuant's scales per time group, as in the first version; the sixth has a single set.
    - Both learning rates fall to zero as a cosine.
    - The logarithm of a scale is tuned, so that it stays positive. Adam has a state for every time group, so that the
      scales of other groups do not move.
    - Every iteration takes another time group. L_G is weighted as in the released code.
    - The search for activation ranges, which the text leaves open, includes zero points (ranges.mse_zero_point).
    - The preset `short` runs 300 of 22,400 iterations at 100 times the published learning rates.

    PAPER departs from the paper in its preset `tenth`: a tenth of the iterations at ten times the learning rates. Like
    the defaults it has 8 bits in the first and last layer and in the softmax, the ranges `mse-zero-point` and the
    schedule `interleaved`.

    OFFICIAL has the same preset and departs from the released code in these places:
    - Stable Diffusion: 64 rows of each timestep set its ranges (released: 8 rows of mixed timesteps, copied to all),
      and 8 rows train a timestep in the first stage (released: 2).
    - Symmetric levels: the first and last layer have 8 bits (released: 256 levels on each side of 0, which is 9 bits),
      and attention probabilities are unsigned (released for ImageNet: signed).
    - 4-bit weights of the first and last layer are rounded to nearest (released: AdaRound).
    - Shortcuts are split as in the checkpoint that it starts from: `adaround` splits them on every model but the two of
      LSUN (released: for Stable Diffusion only).

    calibration: rows of the pipeline's own sampling runs, `quest.diffusion.calibration_set.collect`. w, a: bits.
    Raises ValueError that names a keyword and the valid values, and FloatingPointError where a loss is not finite.
    """
    return quantize_and_finetune(pipe, calibration, w, a, recipe, weights_and_biases)


def weights_and_biases(denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """Layer name -> weight and bias, which a stage learns beside the scales. Thaws the weights of these layers."""
    for layer in tuned.values():
        layer.thaw()
    return {n: [p for p in (layer.weight, layer.bias) if p is not None] for n, layer in tuned.items()}


def quantize_and_finetune(pipe, calibration: CalibrationSet, w: int, a: int, recipe: FinetuneRecipe, learn: Callable):
    """QuEST with `learn(denoiser, tuned)` in place of `weights_and_biases`: it returns the parameters to learn."""
    recipe, timesteps = resolve(recipe, pipe, a), calibration.timesteps
    groups = TimeGroups(grouped(timesteps, recipe.time_groups or len(timesteps)))
    if recipe.schedule == "released":
        # All steps of a group share the scale of its noisiest step, which alone is calibrated and trained.
        calibration = calibration.subset(torch.isin(calibration.timestep, groups.starts).nonzero().flatten())
    # Dynamic scales have no time groups, but the iterations go through those of timesteps all the same.
    of_scales = groups if recipe.dynamic is None else None
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=of_scales)
    denoiser = denoiser_of(student)
    if all(q.spec.bits == FLOAT for q in input_quantizers(denoiser).values()):
        raise ValueError("keep: all activations stay in float, and QuEST tunes their scales; valid: fewer bits for one")
    floats = {}
    if recipe.init is None:
        for _, layer in quant_layers(denoiser):
            layer.choose_weight_range(choosers.mse)
    else:
        floats = start_from(denoiser, recipe.init, KEEP if recipe.keep is None else recipe.keep)
    freeze(denoiser)
    share_floats(denoiser, floats)
    if recipe.dynamic is None:
        set_static_ranges(denoiser, calibration, a, recipe)
    else:
        make_dynamic(denoiser, recipe.dynamic)
    finetune(denoiser, denoiser_of(pipe), calibration, recipe, learn, groups)
    own_floats(denoiser)  # the caller may change the weights of `pipe`, or the file
    return student


def set_static_ranges(denoiser: nn.Module, calibration: CalibrationSet, a: int, recipe: FinetuneRecipe) -> None:
    """Choose formats and ranges of all activations. recipe: what `resolve` returns."""
    set_granularity(denoiser, recipe.granularity, a)
    for name, q in input_quantizers(denoiser).items():
        if not name.endswith("processor.p"):  # probabilities are never negative, so their codes are always unsigned
            q.spec = replace(q.spec, **LEVELS[recipe.levels])
    momentum = MOMENTUM if recipe.ranges == "running" else None
    choose = RANGES[recipe.ranges]
    calibrate(denoiser, calibration, choose, samples=recipe.samples, seed=recipe.seed, momentum=momentum)


def finetune(
    denoiser: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    recipe: FinetuneRecipe,
    learn: Callable,
    groups: TimeGroups | None = None,
) -> None:
    """Run both stages on a calibrated denoiser. recipe: what `resolve` returns. groups: by default the denoiser's."""
    groups = denoiser.time_groups if groups is None else groups
    share_floats(denoiser, dict(teacher.named_parameters()))
    if recipe.qkv_as_one:
        share_inputs(denoiser)
    control = recipe.seed if recipe.control else None
    temporal, critical = selected(denoiser, recipe.selection, recipe.time_embedding, control)

    def stage_of(number, chosen, local, iterations, lr_scale):
        tuned, scales = chosen
        count = tuned_layers(denoiser, tuned, recipe.qkv_as_one)
        return Stage(
            STAGES[number],
            tuned,
            scales,
            local=tuple(tuned) if local else (),
            global_weight=count if recipe.global_weight is None else recipe.global_weight,
            iterations=iterations,
            batch=recipe.batch[number],
            visit=SCHEDULES[recipe.schedule][number],
            lr_weight=recipe.lr_weight,
            lr_scale=lr_scale,
            groups_per_step=recipe.groups_per_step,
        )

    tla = stage_of(0, temporal, recipe.local_tla, recipe.tla_iterations, recipe.lr_temporal_scale)
    cma = stage_of(1, critical, recipe.local_cma, recipe.cma_iterations, recipe.lr_scale)
    stages = {"tla-cma": (tla, cma), "cma-tla": (cma, tla), "joint": (joint(tla, cma),)}[recipe.order]
    stages = [stage for stage in stages if stage.iterations]
    targets = teacher_outputs(teacher, list(dict.fromkeys(n for s in stages for n in s.local)), calibration)
    for stage in stages:
        learned = learn(denoiser, stage.layers)
        tuned = {f"{n}.{i}": p for n, parameters in learned.items() for i, p in enumerate(parameters)}
        tuned |= {f"scales.{i}": q.scale for i, q in enumerate(stage.scales)}
        generator = torch.Generator().manual_seed(recipe.seed)
        settings = dict(groups=groups, log_scales=recipe.log_scales, cosine=recipe.cosine, generator=generator)
        training = partial(align, denoiser, stage, learned, targets, calibration, **settings)
        part(stage.name.replace(" ", "-"), lambda tuned=tuned: tuned, training, generator)
        freeze(denoiser)
        cost.record(denoiser, stage.name, tuned.values(), stage.iterations, stage.batch)
    if recipe.qkv_as_one:
        unshare_inputs(denoiser)


def start_from(denoiser: nn.Module, init: str, keep: Keep) -> dict[str, torch.Tensor]:
    """Load the weights of a checkpoint, and return its tensors.

    The released QuEST has fewer weight bits in the first and last layer than AdaRound's checkpoint has there. So layers
    of `keep` and of KEEP whose checkpoint has more bits are loaded with those and then rounded to nearest.
    """
    bits = {n: specs[0]["bits"] for n, specs in read_header(init)["layers"].items()}
    layers = dict(quant_layers(denoiser))
    specs = {n: layer.weight_quantizer.spec for n, layer in layers.items() if matches(n, (*KEEP, *keep))}
    coarser = {n: spec for n, spec in specs.items() if spec.bits < bits.get(n, 0)}
    for name, spec in coarser.items():
        layers[name].weight_quantizer.spec = replace(spec, bits=bits[name])
    tensors = load_weights(denoiser, init)
    for name, spec in coarser.items():
        layers[name].weight_quantizer.spec = spec
        layers[name].choose_weight_range(choosers.mse)
    return tensors


def work_of(*steps: str) -> Callable:
    """The `work` of QuEST; steps: what an iteration of each of the two stages is called in `quest.planning.costs`."""

    def work(recipe, w: int, model, trajectories: int) -> Counter:
        kind = recipe.selection if recipe.selection in SELECTIONS else CONDITIONED[model.conditioning]
        iterations, batch = sizes(recipe, kind)
        rows = [n * rows for n, rows in zip(iterations, batch, strict=True)]
        cma = RELEASED[kind]["local_cma"] if recipe.local_cma == "released" else recipe.local_cma
        # Targets: full precision on all rows once; on each mini-batch of a large model, whose outputs are not kept.
        once, anew = trajectories * model.calls * model.halves, rows[0] * recipe.local_tla + rows[1] * cma
        counted = Counter({"call": anew if model.origin else once})
        if recipe.dynamic is None:
            counted["ranges"] = recipe.time_groups or model.steps
            counted["ranges row"] = counted["ranges"] * recipe.samples
        if not recipe.init:
            counted["weight ranges"] = 1
        for step, n, of_stage in zip(steps, iterations, rows, strict=True):
            counted += Counter({step: n * recipe.groups_per_step, f"{step} row": of_stage})  # a pass for each group
        return counted

    return work


def _stage_alone(stage: int) -> Callable:
    """The measured step of one stage: iterations of it, and none of the other."""

    def learn(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
        recipe = FinetuneRecipe(
            tla_iterations=iterations if stage == 0 else 0,
            cma_iterations=iterations if stage == 1 else 0,
            batch=batch,
            lr_weight=0.0,
            lr_scale=0.0,
            selection=model.selection,
            time_embedding="tuned",
        )
        finetune(student, denoiser_of(pipe), calibration, resolve(recipe, pipe, 8), weights_and_biases)

    return learn


METHOD = Method(
    "quest-suite",
    quantize,
    about="this project's recipe for QuEST with TAQuant (one set of activation scales for each time group)",
    work=work_of("temporal alignment", "critical alignment"),
    steps={
        "temporal alignment": Step(_stage_alone(0), STAGES[:1]),
        "critical alignment": Step(_stage_alone(1), STAGES[1:]),
    },
    recipe={"init": "adaround"},
    paper=Paper(
        "wang2025quest",
        "2402.03666",
        "{QuEST}: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning",
        "Wang, Haoxuan and Shang, Yuzhang and Yuan, Zhihang and Wu, Junyi and Yan, Junchi and Yan, Yan",
        "ICCV",
        2025,
    ),
    variants={
        "quest-paper": dict(about="QuEST as in the sixth version of its text", fixed=PAPER),
        "quest-official": dict(
            about="QuEST as in its released code; the docstring of `baselines.quest` says where they differ",
            fixed=OFFICIAL,
        ),
    },
)
