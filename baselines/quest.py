"""QuEST: efficient selective finetuning of a quantized denoiser (Wang et al., arXiv:2402.03666).

Three steps, data-free, supervised by the full-precision model:
1. TAQuant: every activation quantizer gets one scale and zero point per time group.
2. Temporal layer alignment (L_TLA + L_G, equations 4 and 6): the projections of the time embedding, their weights and
   their activation scales.
3. Critical module alignment (L_CMA + L_G, equations 5 and 6): the attention-related weights and all remaining
   activation scales.
All other parameters stay frozen. Weight scales and every zero point stay fixed.

The sixth version of the paper and the released code differ from each other, and from what works best on small models.
Every such place is a keyword of `quantize`; PAPER and OFFICIAL are the keywords that make the two.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

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
from quest.quantization.swapping import scale_axes, swap
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime.resume import part


class Preset(NamedTuple):
    """Iterations of the two stages, as numbers or as a share of those published; rows of an iteration; and what the
    published learning rates are multiplied with."""

    iterations: float | tuple[int, int]
    batch: tuple[int, int]
    faster: float


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


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # checkpoint whose weights to start from; default: nearest codes of the mse range
    preset: str = "short",  # iterations, batch and learning rates: "short", "tenth" or "full", see PRESETS
    # The activation quantizers.
    time_groups: int | None = None,  # TAQuant's number of groups, 1 for a single set; default: one for each timestep
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    granularity: str = "tensor",  # or "released": at 4 bits one scale per channel or token, see `scale_axes`
    levels: str = "asymmetric",  # "asymmetric", "symmetric" or "wide" (33 levels at "4 bit"); "released": the model's
    ranges: str = "mse-zero-point",  # of RANGES ("running": averages); "released": the model's
    samples: int = 32,  # random calibration rows per time group that set the activation ranges
    # What is tuned.
    selection: str | None = None,  # layers of the critical stage, of SELECTIONS; default: by the kind of pipeline
    time_embedding: str = "scales",  # its two layers: "scales" in the critical stage, "tuned" with TLA, or "frozen"
    qkv_as_one: bool = False,  # to_q, to_k, to_v of an unconditional attention: one layer with one input, as in CompVis
    control: bool = False,  # the first stage on as many weights of other layers: does it matter that they are temporal?
    # The losses.
    local_tla: bool = True,
    local_cma: bool | str = True,  # or "released": for Stable Diffusion only
    global_weight: float | None = None,  # of L_G; default: the number of tuned layers, as in the released code
    # The stages.
    order: str = "tla-cma",  # or "cma-tla", or "joint": one stage with both losses and 2 L_G (equation 7)
    schedule: str = "interleaved",  # of timesteps: "interleaved", "sequential" or "released", see SCHEDULES
    tla_iterations: int | None = None,  # default: the preset's
    cma_iterations: int | None = None,  # default: the preset's
    batch: int | None = None,  # rows per iteration, all of one time group; default: the preset's
    # The optimizer.
    lr_weight: float = 1e-5,  # published; the preset multiplies it
    lr_scale: float = 1e-4,  # published; the preset multiplies it
    lr_temporal_scale: float | None = None,  # of the temporal stage; default: lr_scale
    log_scales: bool = True,  # tune the logarithm of a scale, so that a step is relative to it
    cosine: bool = True,  # learning rates fall to zero over a stage
    seed: int = 0,
):
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
    if a == FLOAT:
        raise ValueError(f"bits w{w}a32: QuEST tunes the scales of activations; give them 2 to 8 bits")
    selection = _one_of("selection", selection or default_selection(pipe), SELECTIONS)
    released = RELEASED[selection]
    size = sized(preset, selection)
    if _one_of("levels", levels, (*LEVELS, "released")) == "released":
        levels = released["levels"]
    if _one_of("ranges", ranges, (*RANGES, "released")) == "released":
        ranges = released["ranges_a4" if a == 4 else "ranges"]
    _one_of("time_embedding", time_embedding, ("scales", "tuned", "frozen"))
    if _one_of("local_cma", local_cma, (True, False, "released")) == "released":
        local_cma = released["local_cma"]
    _one_of("order", order, ("tla-cma", "cma-tla", "joint"))
    _one_of("schedule", schedule, SCHEDULES)

    timesteps = calibration.timesteps
    groups = TimeGroups(grouped(timesteps, time_groups or len(timesteps)))
    if schedule == "released":
        # All steps of a group share the scale of its noisiest, the only one that is calibrated and tuned on.
        calibration = calibration.subset(torch.isin(calibration.timestep, groups.starts).nonzero().flatten())
    student = swap(pipe, w, a, keep=keep, softmax_bits=softmax_bits, groups=groups)
    denoiser = student.unet
    if init is None:
        for _, layer in quant_layers(denoiser):
            layer.choose_weight_range(choosers.mse)
    else:
        start_from(denoiser, init, KEEP if keep is None else keep)
    freeze(denoiser)
    axes = scale_axes(denoiser, granularity, a)
    for name, q in input_quantizers(denoiser).items():
        # Probabilities are unsigned whatever the other codes are.
        kind = {} if name.endswith("processor.p") else LEVELS[levels]
        q.spec = replace(q.spec, axis=axes.get(name), **kind)
    momentum = MOMENTUM if ranges == "running" else None
    calibrate(denoiser, calibration, RANGES[ranges], samples=samples, seed=seed, momentum=momentum)

    finetune(
        denoiser,
        pipe.unet,
        calibration,
        selection,
        time_embedding=time_embedding,
        qkv_as_one=qkv_as_one,
        control=control,
        local_tla=local_tla,
        local_cma=local_cma,
        global_weight=global_weight,
        order=order,
        schedule=schedule,
        tla_iterations=size.iterations[0] if tla_iterations is None else tla_iterations,
        cma_iterations=size.iterations[1] if cma_iterations is None else cma_iterations,
        batch=batch or size.batch,
        lr_weight=lr_weight * size.faster,
        lr_scale=lr_scale * size.faster,
        lr_temporal_scale=None if lr_temporal_scale is None else lr_temporal_scale * size.faster,
        log_scales=log_scales,
        cosine=cosine,
        seed=seed,
    )
    return student


def sized(preset: str, selection: str) -> Preset:
    """The preset with the numbers of iterations of a kind of model. Raises ValueError for an unknown one."""
    size = PRESETS[_one_of("preset", preset, PRESETS)]
    if isinstance(size.iterations, tuple):
        return size
    first, second = (round(size.iterations * n) for n in PUBLISHED[selection])
    return size._replace(iterations=(first, second))


def weights_and_biases(denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """What a stage learns beside scales: the parameters of its tuned layers, by layer."""
    return {n: [p for p in (layer.weight, layer.bias) if p is not None] for n, layer in tuned.items()}


def finetune(
    denoiser: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    selection: str,
    *,
    tla_iterations: int,
    cma_iterations: int,
    batch: int | tuple[int, int],
    lr_weight: float,
    lr_scale: float,
    global_weight: float | None,
    seed: int,
    learn: Callable = weights_and_biases,
    lr_temporal_scale: float | None = None,
    time_embedding: str = "scales",
    qkv_as_one: bool = False,
    control: bool = False,
    local_tla: bool = True,
    local_cma: bool = True,
    order: str = "tla-cma",
    schedule: str = "interleaved",
    log_scales: bool = True,
    cosine: bool = True,
) -> None:
    """Both stages on a calibrated denoiser. Keywords are those of `quantize`, learning rates as they are used.

    batch: of both stages or of each. learn(denoiser, tuned): the parameters that a stage learns, by layer.
    """
    if qkv_as_one:
        share_inputs(denoiser)
    (temporal, temporal_scales), (critical, critical_scales) = selected(
        denoiser, selection, time_embedding, seed if control else None
    )
    batches = (batch, batch) if isinstance(batch, int) else batch
    tla = Stage(
        "temporal layer alignment",
        temporal,
        temporal_scales,
        local=tuple(temporal) if local_tla else (),
        global_weight=tuned_layers(denoiser, temporal, qkv_as_one) if global_weight is None else global_weight,
        iterations=tla_iterations,
        batch=batches[0],
        visit=SCHEDULES[schedule][0],
        lr_weight=lr_weight,
        lr_scale=lr_scale if lr_temporal_scale is None else lr_temporal_scale,
    )
    cma = Stage(
        "critical module alignment",
        critical,
        critical_scales,
        local=tuple(critical) if local_cma else (),
        global_weight=tuned_layers(denoiser, critical, qkv_as_one) if global_weight is None else global_weight,
        iterations=cma_iterations,
        batch=batches[1],
        visit=SCHEDULES[schedule][1],
        lr_weight=lr_weight,
        lr_scale=lr_scale,
    )
    stages = {"tla-cma": (tla, cma), "cma-tla": (cma, tla), "joint": (joint(tla, cma),)}[order]
    stages = [stage for stage in stages if stage.iterations]
    targets = layer_outputs(teacher, list(dict.fromkeys(n for s in stages for n in s.local)), calibration)
    for stage in stages:
        learned = learn(denoiser, stage.layers)
        tuned = {f"{n}.{i}": p for n, parameters in learned.items() for i, p in enumerate(parameters)}
        tuned |= {f"scales.{i}": q.scale for i, q in enumerate(stage.scales)}
        generator = torch.Generator().manual_seed(seed)
        training = partial(
            align,
            denoiser,
            stage,
            learned,
            targets,
            calibration,
            log_scales=log_scales,
            cosine=cosine,
            generator=generator,
        )
        part(stage.name.replace(" ", "-"), lambda tuned=tuned: tuned, training, generator)
        for name in learned:
            denoiser.get_submodule(name).freeze()
        cost.record(denoiser, stage.name, tuned.values(), stage.iterations, stage.batch)
    if qkv_as_one:
        unshare_inputs(denoiser)


def learning(
    learn: Callable,
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    preset: str,
    selection: str | None,
    tla_iterations: int | None,
    cma_iterations: int | None,
    batch: int | None,
    lr_weight: float,
    lr_scale: float,
    global_weight: float | None,
    seed: int,
    **quantizers,
):
    """QuEST's default quantizers and stages, in which `learn` says what is learned; keywords are those of `quantize`.

    `finetune` says what `learn` is.
    """
    selection = selection or default_selection(pipe)
    untuned = dict(selection=selection, tla_iterations=0, cma_iterations=0, seed=seed)
    student = quantize(pipe, calibration, w, a, **quantizers, **untuned)
    size = sized(preset, selection)
    finetune(
        student.unet,
        pipe.unet,
        calibration,
        selection,
        tla_iterations=size.iterations[0] if tla_iterations is None else tla_iterations,
        cma_iterations=size.iterations[1] if cma_iterations is None else cma_iterations,
        batch=batch or size.batch,
        lr_weight=lr_weight * size.faster,
        lr_scale=lr_scale * size.faster,
        global_weight=global_weight,
        seed=seed,
        learn=learn,
    )
    return student


def _one_of(keyword: str, value, valid: Iterable):
    """The value, if it is valid; else ValueError with what is."""
    valid = list(valid)
    if value not in valid:
        raise ValueError(f"{keyword}: {value!r} is not one of {', '.join(map(str, valid))}")
    return value


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
