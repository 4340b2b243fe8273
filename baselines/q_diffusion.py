"""Q-Diffusion: calibration along the sampler, block reconstruction, split shortcuts (Li et al., arXiv:2302.04304)."""

from dataclasses import replace

import torch
from diffusers.models.attention import BasicTransformerBlock

from baselines.adaround import Preset, round_weights, settings, splits, uniform
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.calibrate import calibrate, calibrating, running, static_rows
from quest.learning.reconstruction import reconstruct_activations
from quest.quantization import ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layer_names import Keep
from quest.quantization.layers import input_quantizers
from quest.quantization.splitting import split_layers
from quest.quantization.swapping import scale_axes, swap
from quest.quantization.timegroups import TimeGroups, grouped

RUNNING = ("ema", "ema-symmetric")
RANGES = (*ranges.SEARCHED, *RUNNING)
MOMENTUM = 0.95  # of the running ranges
BATCH = 64  # rows of one update of them


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # AdaRound's checkpoint; default: round the weights here
    preset: str = "short",  # "short" or "full", see adaround.PRESETS
    weight_iterations: int | None = None,  # of every unit, without init; default: the preset's
    activation_iterations: int | None = None,  # of every unit; default: the preset's
    activation_lr: float | None = None,  # of the activation steps; default: the preset's
    batch: int | None = None,  # default: the preset's
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,  # published: 16 for Stable Diffusion
    split: bool = False,  # quantize the two parts of a decoder shortcut's input apart, as published for SD and CIFAR-10
    activation_ranges: str = "mse-zero-point",  # of RANGES; see `activation_ranges_of`
    stored_order: bool = False,  # calibrate noisiest rows first, as the released code does, not shuffled
    granularity: str = "tensor",  # or "released": QuEST's at 4 bits, see `scale_axes`
    time_groups: int = 1,  # QuEST's: stretches of timesteps with activation scales of their own; here one for all
    rows: int = 1024,  # of the calibration set
    samples: int | None = None,  # rows (of each time group) that set the ranges of the first two; default: static_rows
    seed: int = 0,  # of the calibration rows, their order and the mini-batches
):
    """Quantize by Q-Diffusion: AdaRound of the weights, static activation ranges, learned activation steps.

    Departures from the released code: both halves of a split layer are regularised, calibration rows are shuffled
    (`stored_order` undoes that), the first and last layer keep 8 bits as in every row of the common stack, and there
    are 1,024 rows instead of 5,120 (6,400 for Stable Diffusion). Split shortcuts are part of the method, but its
    released commands set them for CIFAR-10 and Stable Diffusion only, and so do the models here (diffusion.models,
    `split`); there is no released command for a class-conditional model.
    Raises ValueError where init and split disagree, and for time groups with ranges that hold at all timesteps.
    """
    return common_stack(
        pipe,
        uniform(calibration, rows, seed),
        w,
        a,
        init=init,
        keep=keep,
        softmax_bits=softmax_bits,
        split=split,
        activation_ranges=activation_ranges,
        stored_order=stored_order,
        granularity=granularity,
        groups=groups_of(calibration, time_groups),
        samples=samples,
        settings=settings(
            preset,
            weight_iterations=weight_iterations,
            activation_iterations=activation_iterations,
            activation_lr=activation_lr,
            batch=batch,
        ),
        seed=seed,
    )


def common_stack(
    pipe,
    drawn: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None,
    keep: Keep | None,
    softmax_bits: int,
    split: bool,
    activation_ranges: str,
    stored_order: bool,
    samples: int | None,
    settings: Preset,
    seed: int,
    weight_axis: int | None = 0,  # None for one weight scale per tensor (PTQD's released code)
    granularity: str = "tensor",
    groups: TimeGroups | None = None,
):
    """Q-Diffusion on calibration rows already drawn: what later papers rerun their rivals with."""
    if activation_ranges not in RANGES:
        raise ValueError(f"activation_ranges: {activation_ranges!r} is not one of {', '.join(RANGES)}")
    if groups is not None and (activation_ranges in RUNNING or stored_order):
        valid = f"{' or '.join(ranges.SEARCHED)}, shuffled"
        raise ValueError(f"time_groups: running ranges and the stored order hold at all timesteps; valid: {valid}")
    parts = splits(pipe, drawn) if split else {}
    if init is None:
        axis = dict(weight_axis=weight_axis)
        student = swap(pipe, w, a, keep=keep, softmax_bits=softmax_bits, groups=groups, splits=parts, **axis)
        round_weights(student, pipe, drawn, settings, seed)
    else:
        student = swap(pipe, w, a, keep=keep, softmax_bits=softmax_bits, groups=groups)
        load_weights(student.unet, init)
        if split_layers(student.unet) != parts:
            raise ValueError(f"split: {split}, but {init} has {len(split_layers(student.unet))} split layers")
    axes = scale_axes(student.unet, granularity, a)
    for name, q in input_quantizers(student.unet).items():
        q.spec = replace(q.spec, axis=axes.get(name))
    samples = samples or static_rows(a)
    activation_ranges_of(student.unet, drawn, activation_ranges, samples=samples, stored_order=stored_order, seed=seed)
    if settings.activation_iterations:
        reconstruct_activations(
            student.unet,
            pipe.unet,
            drawn,
            torch.arange(len(drawn)),
            iterations=settings.activation_iterations,
            batch=settings.batch,
            lr=settings.activation_lr,
            generator=torch.Generator().manual_seed(seed),
        )
    return student


def groups_of(calibration: CalibrationSet, time_groups: int) -> TimeGroups | None:
    """Equal stretches of the sampler's timesteps; None for a single one, which needs no bookkeeping.

    Raises ValueError where their number does not divide that of the timesteps.
    """
    starts = grouped(calibration.timesteps, time_groups)
    return None if time_groups == 1 else TimeGroups(starts)


@torch.no_grad()
def activation_ranges_of(
    denoiser, drawn: CalibrationSet, kind: str, *, samples: int, stored_order: bool, seed: int
) -> None:
    """Set the activation ranges, but for "mse-zero-point" as the released commands do for one of the models.

    "mse" (Churches): the asymmetric range of least |x - x~|^2.4 on `samples` rows. "mse-zero-point": the same with the
    zero point searched too, as QuEST's ranges are here (ranges.mse_zero_point). "ema-symmetric" (Bedrooms, CIFAR-10)
    and "ema" (Stable Diffusion): running averages of minimum and maximum over batches of 64 rows, momentum 0.95, from
    which the absolute maximum or the asymmetric range is taken; they overwrite what the MSE search found first. The
    products of attention outside a transformer block keep the range of their first batch.
    """
    quantizers = input_quantizers(denoiser)
    if kind == "ema-symmetric":
        for name, q in quantizers.items():
            if not name.endswith("processor.p"):  # probabilities are unsigned
                q.spec = replace(q.spec, symmetric=True)
    order = drawn.call.argsort(stable=True) if stored_order else None
    if kind in ranges.SEARCHED:
        first = drawn if order is None else drawn.subset(order[:samples])
        calibrate(denoiser, first, ranges.SEARCHED[kind], samples=samples, seed=seed)
        return
    if order is None:
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    blocks = tuple(f"{n}." for n, m in denoiser.named_modules() if isinstance(m, BasicTransformerBlock))
    batches = order.split(BATCH)
    with calibrating(denoiser, ranges.minmax if kind == "ema-symmetric" else ranges.mse):
        denoiser(**drawn.inputs(batches[0]))
    choosers = {
        name: running(name, MOMENTUM) for name in quantizers if ".processor." not in name or name.startswith(blocks)
    }
    try:
        for name, chooser in choosers.items():
            quantizers[name].choose = chooser
        for rows in batches:
            denoiser(**drawn.inputs(rows))
    finally:
        for q in quantizers.values():
            q.choose = None
