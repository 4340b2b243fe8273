"""QuEST: efficient selective finetuning of a quantized denoiser (Wang et al., arXiv:2402.03666).

Three steps, data-free, supervised by the full-precision model:
1. TAQuant: every activation quantizer gets one scale and zero point per time group.
2. Temporal layer alignment (L_TLA + L_G, equations 4 and 6): the projections of the time embedding, their weights and
   their activation scales.
3. Critical module alignment (L_CMA + L_G, equations 5 and 6): the attention-related weights and all remaining
   activation scales.
All other parameters stay frozen. Weight scales and every zero point stay fixed.

The sixth version of the paper and the released code differ from each other, and from what works best on small models.
Every such place is a keyword, a field of `FinetuneRecipe`; PAPER and OFFICIAL are the keywords that make the two.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import nn

from baselines.method import Bits, Count, Iterations, Method, Paper, Positive, Valid, one_of, takes
from baselines.selection import (
    SELECTIONS,
    default_selection,
    matches,
    selected,
    share_inputs,
    tuned_layers,
    unshare_inputs,
)
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.alignment import Stage, Visit, align, joint, layer_outputs
from quest.learning.calibrate import calibrate
from quest.quantization import cost
from quest.quantization import ranges as choosers
from quest.quantization.checkpoint import freeze, load_weights
from quest.quantization.header import read as read_header
from quest.quantization.layer_names import KEEP, Keep
from quest.quantization.layers import QuantLayer, input_quantizers, quant_layers
from quest.quantization.swapping import GRANULARITIES, scale_axes, swap
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime.resume import part


class Preset(NamedTuple):
    """Iterations of the two stages, as numbers or as a share of those published; rows of an iteration; and what the
    published learning rates are multiplied with."""

    iterations: float | tuple[int, int]
    batch: tuple[int, int]
    lr_multiplier: float


PRESETS = {
    "short": Preset((100, 200), (16, 16), 100),  # chosen on held-out trajectories (results/LOG.md)
    "tenth": Preset(0.1, (2, 4), 10),  # the 2,200 iterations of the paper's table 8
    "full": Preset(1.0, (2, 4), 1),
}
# Iterations of the released code; those of Stable Diffusion differ from timestep to timestep, here all have their mean.
PUBLISHED = {"lsun": (16_000, 6_400), "imagenet": (24_000, 6_400), "sd": (3_850, 8_000)}

# What the released commands set by model: LSUN-Bedrooms and ImageNet take whole symmetric ranges, as running averages
# but for 4-bit activations. (The running average of its Stable Diffusion reaches one timestep only and is left out.)
RELEASED = {
    "lsun": dict(levels="symmetric", ranges="running", ranges_a4="minmax", local_cma=False),
    "imagenet": dict(levels="symmetric", ranges="running", ranges_a4="minmax", local_cma=False),
    "sd": dict(levels="asymmetric", ranges="percentile", ranges_a4="percentile", local_cma=True),
}

LEVELS = {"asymmetric": {}, "symmetric": dict(symmetric=True), "wide": dict(symmetric=True, wide=True)}
RANGES = {
    **choosers.SEARCHED,
    "minmax": choosers.minmax,
    "percentile": choosers.percentile,
    "running": choosers.minmax,
}
MOMENTUM = 0.95  # of the running ranges

STAGES = ("temporal layer alignment", "critical module alignment")
# Of the two stages. None: one iteration of a time group after another, in random order. With visits, groups follow each
# other from the noisiest to the cleanest, and every visit has a new Adam for the scales.
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
    """QuEST, and what differs from it in one place or another."""

    init: str | None = None  # checkpoint whose weights to start from; default: nearest codes of the mse range
    preset: Annotated[str, one_of(PRESETS), Valid(description="iterations, batch and learning rates")] = "short"
    # The activation quantizers.
    time_groups: Count | None = None  # TAQuant's number of groups, 1 for a single set; default: one for each timestep
    keep: Keep | None = None  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: Bits = 8
    # "released": at 4 bits one scale per channel or token, see `scale_axes`.
    granularity: Annotated[str, one_of(GRANULARITIES)] = "tensor"
    # "wide" has 33 levels at "4 bit"; "released": the model's.
    levels: Annotated[str, one_of((*LEVELS, "released"))] = "asymmetric"
    # "running": averages; "released": the model's.
    ranges: Annotated[str, one_of((*RANGES, "released"))] = "mse-zero-point"
    samples: Count = 32  # random calibration rows per time group that set the activation ranges
    # What is tuned. Of the critical stage these layers; default: by the kind of pipeline.
    selection: Annotated[str, one_of(SELECTIONS)] | None = None
    # The two layers of the time embedding: "scales" in the critical stage, "tuned" with TLA, or "frozen".
    time_embedding: Annotated[str, one_of(("scales", "tuned", "frozen"))] = "scales"
    qkv_as_one: bool = False  # to_q, to_k, to_v of an unconditional attention: one layer with one input, as in CompVis
    control: bool = False  # the first stage on as many weights of other layers: does it matter that they are temporal?
    # The losses.
    local_tla: bool = True
    local_cma: Annotated[bool | str, one_of((True, False, "released"))] = True  # "released": for Stable Diffusion only
    # Of L_G; default: the number of tuned layers, as in the released code.
    global_weight: Annotated[float, Valid(minimum=0)] | None = None
    # The stages. "joint": one stage with both losses and 2 L_G (equation 7).
    order: Annotated[str, one_of(("tla-cma", "cma-tla", "joint"))] = "tla-cma"
    schedule: Annotated[str, one_of(SCHEDULES)] = "interleaved"  # of timesteps
    tla_iterations: Iterations | None = None  # default: the preset's
    cma_iterations: Iterations | None = None  # default: the preset's
    batch: Count | None = None  # rows per iteration, all of one time group; default: the preset's
    # The optimizer.
    lr_weight: Positive = 1e-5  # published; the preset multiplies it
    lr_scale: Positive = 1e-4  # published; the preset multiplies it
    lr_temporal_scale: Positive | None = None  # of the temporal stage; default: lr_scale
    log_scales: bool = True  # tune the logarithm of a scale, so that a step is relative to it
    cosine: bool = True  # learning rates fall to zero over a stage
    seed: int = 0


def settled(recipe: FinetuneRecipe, pipe, a: int) -> FinetuneRecipe:
    """The recipe as it is carried out: values of this model in place of "released" and None, the preset's numbers in
    place of None, learning rates multiplied. `batch` is a pair, of both stages."""
    selection = recipe.selection or default_selection(pipe)
    released, (iterations, batch) = RELEASED[selection], sized(recipe, selection)
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


def sized(recipe, selection: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Iterations and rows of an iteration of both stages: the recipe's own, or else its preset's."""
    preset = PRESETS[recipe.preset]
    share = preset.iterations
    of_preset = share if isinstance(share, tuple) else [round(share * n) for n in PUBLISHED[selection]]
    own = (recipe.tla_iterations, recipe.cma_iterations)
    first, second = (b if a is None else a for a, b in zip(own, of_preset, strict=True))
    return (first, second), (recipe.batch, recipe.batch) if recipe.batch else preset.batch


@takes(FinetuneRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: FinetuneRecipe):
    """Quantize by QuEST. Returns a new pipeline.

    Departures of the defaults from the paper, which names no batch or schedule: TAQuant (of the first version; the
    sixth has a single set of scales); both learning rates fall to zero as a cosine; scales are tuned through their
    logarithm, by an Adam with a state of its own for every time group, so that they stay positive and idle groups do
    not move; timesteps are interleaved, one group per iteration; L_G is weighted as in the released code; the search
    for activation ranges, which the text leaves open, takes zero points in (ranges.mse_zero_point); the preset `short`
    runs 300 of 22,400 iterations at 100 times the published learning rates.

    PAPER departs from the paper in its preset `tenth`: a tenth of the iterations at ten times the learning rates.
    OFFICIAL has the same preset and departs from the released code in these places. Stable Diffusion: 64 rows of each
    timestep set its ranges (released: 8 rows of mixed timesteps, copied to all), and 8 rows train a timestep in the
    first stage (released: 2). Symmetric levels: the ends have 8 bits (released: 256 levels on each side of 0, which is
    9 bits), and attention probabilities are unsigned (released for ImageNet: signed). 4-bit weights of the ends are
    rounded to nearest (released: AdaRound).

    Raises ValueError that names a keyword and what would be valid, FloatingPointError where a loss is not finite.
    """
    return finetuned(pipe, calibration, w, a, recipe, weights_and_biases)


def weights_and_biases(denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """What a stage learns beside scales: the parameters of its tuned layers, by layer."""
    return {n: [p for p in (layer.weight, layer.bias) if p is not None] for n, layer in tuned.items()}


def finetuned(pipe, calibration: CalibrationSet, w: int, a: int, recipe: FinetuneRecipe, learn: Callable):
    """QuEST, in which `learn(denoiser, tuned)` says what a stage learns: parameters by layer."""
    if a == FLOAT:
        raise ValueError(f"bits w{w}a32: QuEST tunes the scales of activations; give them 2 to 8 bits")
    recipe, timesteps = settled(recipe, pipe, a), calibration.timesteps
    groups = TimeGroups(grouped(timesteps, recipe.time_groups or len(timesteps)))
    if recipe.schedule == "released":
        # All steps of a group share the scale of its noisiest, the only one that is calibrated and tuned on.
        calibration = calibration.subset(torch.isin(calibration.timestep, groups.starts).nonzero().flatten())
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups)
    denoiser = student.unet
    if recipe.init is None:
        for _, layer in quant_layers(denoiser):
            layer.choose_weight_range(choosers.mse)
    else:
        start_from(denoiser, recipe.init, KEEP if recipe.keep is None else recipe.keep)
    freeze(denoiser)
    axes = scale_axes(denoiser, recipe.granularity, a)
    for name, q in input_quantizers(denoiser).items():
        # Probabilities are unsigned whatever the other codes are.
        kind = {} if name.endswith("processor.p") else LEVELS[recipe.levels]
        q.spec = replace(q.spec, axis=axes.get(name), **kind)
    momentum = MOMENTUM if recipe.ranges == "running" else None
    choose = RANGES[recipe.ranges]
    calibrate(denoiser, calibration, choose, samples=recipe.samples, seed=recipe.seed, momentum=momentum)

    finetune(denoiser, pipe.unet, calibration, recipe, learn)
    return student


def finetune(
    denoiser: nn.Module, teacher: nn.Module, calibration: CalibrationSet, recipe: FinetuneRecipe, learn: Callable
) -> None:
    """Both stages on a calibrated denoiser, by a recipe that is `settled`."""
    if recipe.qkv_as_one:
        share_inputs(denoiser)
    control = recipe.seed if recipe.control else None
    (temporal, temporal_scales), (critical, critical_scales) = selected(
        denoiser, recipe.selection, recipe.time_embedding, control
    )

    def global_weight(tuned):
        return (
            tuned_layers(denoiser, tuned, recipe.qkv_as_one) if recipe.global_weight is None else recipe.global_weight
        )

    tla = Stage(
        STAGES[0],
        temporal,
        temporal_scales,
        local=tuple(temporal) if recipe.local_tla else (),
        global_weight=global_weight(temporal),
        iterations=recipe.tla_iterations,
        batch=recipe.batch[0],
        visit=SCHEDULES[recipe.schedule][0],
        lr_weight=recipe.lr_weight,
        lr_scale=recipe.lr_temporal_scale,
    )
    cma = Stage(
        STAGES[1],
        critical,
        critical_scales,
        local=tuple(critical) if recipe.local_cma else (),
        global_weight=global_weight(critical),
        iterations=recipe.cma_iterations,
        batch=recipe.batch[1],
        visit=SCHEDULES[recipe.schedule][1],
        lr_weight=recipe.lr_weight,
        lr_scale=recipe.lr_scale,
    )
    stages = {"tla-cma": (tla, cma), "cma-tla": (cma, tla), "joint": (joint(tla, cma),)}[recipe.order]
    stages = [stage for stage in stages if stage.iterations]
    targets = layer_outputs(teacher, list(dict.fromkeys(n for s in stages for n in s.local)), calibration)
    for stage in stages:
        learned = learn(denoiser, stage.layers)
        tuned = {f"{n}.{i}": p for n, parameters in learned.items() for i, p in enumerate(parameters)}
        tuned |= {f"scales.{i}": q.scale for i, q in enumerate(stage.scales)}
        generator = torch.Generator().manual_seed(recipe.seed)
        training = partial(
            align,
            denoiser,
            stage,
            learned,
            targets,
            calibration,
            log_scales=recipe.log_scales,
            cosine=recipe.cosine,
            generator=generator,
        )
        part(stage.name.replace(" ", "-"), lambda tuned=tuned: tuned, training, generator)
        for name in learned:
            denoiser.get_submodule(name).freeze()
        cost.record(denoiser, stage.name, tuned.values(), stage.iterations, stage.batch)
    if recipe.qkv_as_one:
        unshare_inputs(denoiser)


def start_from(denoiser: nn.Module, init: str, keep: Keep) -> None:
    """Take the weights of a checkpoint. A layer of `keep`, or one at the ends, that has more bits there than asked for
    here is rounded to the nearest codes of its own bits: the ends of the released QuEST, whose weights have fewer."""
    found = {n: specs[0]["bits"] for n, specs in read_header(init)["layers"].items()}
    layers = dict(quant_layers(denoiser))
    specs = {n: layer.weight_quantizer.spec for n, layer in layers.items() if matches(n, (*KEEP, *keep))}
    coarser = {n: spec for n, spec in specs.items() if spec.bits < found.get(n, 0)}
    for name, spec in coarser.items():
        layers[name].weight_quantizer.spec = replace(spec, bits=found[name])
    load_weights(denoiser, init)
    for name, spec in coarser.items():
        layers[name].weight_quantizer.spec = spec
        layers[name].choose_weight_range(choosers.mse)


def work_of(row: str, step: str | None = None) -> Callable:
    """What QuEST takes: `row` for each row of an iteration, and `step` for each iteration."""

    def work(recipe, w: int, model, trajectories: int) -> Counter:
        iterations, batch = sized(recipe, recipe.selection)
        # Full precision sees the whole calibration set first, for the targets of both stages.
        counted = Counter({"call": trajectories * model.calls * model.halves})
        counted["ranges"] = recipe.time_groups or model.steps
        if not recipe.init:
            counted["weight ranges"] = 1
        counted[row] = sum(n * rows for n, rows in zip(iterations, batch, strict=True))
        return counted if step is None else counted + Counter({step: sum(iterations)})

    return work


METHOD = Method(
    "quest",
    quantize,
    about="this project's recipe for QuEST with TAQuant (one set of activation scales for each time group)",
    work=work_of("training step"),
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
            about="QuEST as in its released code; the docstring of `quest` says where they differ",
            fixed=OFFICIAL,
        ),
    },
)
