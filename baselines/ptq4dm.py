"""PTQ4DM: calibration at normally distributed timesteps of the sampler (Shang et al., arXiv:2211.15736).

Two rows. `quantize` is what later papers rerun under this name, as far as their tables tell: Q-Diffusion's quantizers
and reconstruction on PTQ4DM's timesteps, without its split shortcuts. `released` is the paper's own code.
"""

import torch
from torch import Tensor

from baselines.adaround import round_weights_only, settings
from baselines.q_diffusion import common_stack, groups_of
from quest.affine import FLOAT, QuantSpec
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization import ranges
from quest.quantization.layer_names import Keep, layer_bits
from quest.quantization.layers import input_quantizers, name_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import swap

MEAN = DEVIATION = 0.4  # of the sampling step over their number (the released script; the paper says at most T / 2)
CANDIDATES = 100  # thresholds of the released search
MOMENTUM = 0.9  # of its ranges, over
BATCH = 256  # calibration rows

# What the released code keeps. Attention: its projections are 1-d convolutions, which are not wrapped, its products and
# softmax plain functions. 8 bits: the weights of the time embedding's first linear, which comes first in its list of
# layers, and of the last convolution. The output of the last convolution is not quantized.
RELEASED: Keep = {
    "*.attentions.?.to_*": 32,
    "*.processor": 32,
    "time_embedding.linear_1": [8, 2],
    "conv_out": [8, 32],
}


def ndtc(calibration: CalibrationSet, rows: int, seed: int, bug: bool = False) -> CalibrationSet:
    """About `rows` rows at normally distributed sampling steps ("normally distributed timestep calibration", NDTC).

    Step s of S (0 is the cleanest) is the floor of a draw from N(0.4 S, 0.4 S), clamped to 0..S - 1; a row is what the
    sampler fed the denoiser at that step, both halves of a guided call. Rows lie in the order of the calls.
    bug: as in the released code, which stops the sampler after s steps, at noise level S - 1 - s, and labels that
    sample with the timestep of step s. Departure from it: the row is the state before the step, there the one after it.
    """
    calls = calibration.calls()
    trajectories = len(calibration.trajectory.unique())
    calls = calls.view(-1, trajectories, calls.shape[1])  # noisiest first
    steps, n = len(calls), max(1, rows // calls.shape[2])
    generator = torch.Generator().manual_seed(seed)
    step = (MEAN * steps + DEVIATION * steps * torch.randn(n, generator=generator)).floor().clamp(0, steps - 1).long()
    call = (steps - 1 - step).sort().values
    # Neighbours are of different trajectories, so a call repeats one only after all.
    trajectory = torch.randperm(trajectories, generator=generator)[torch.arange(n) % trajectories]
    drawn = calibration.subset(calls[call, trajectory].flatten())
    if bug:
        labels = drawn.timestep
        drawn = calibration.subset(calls[steps - 1 - call, trajectory].flatten())
        drawn.timestep = labels
    return drawn


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # checkpoint of `round_weights`; default: round the weights here
    preset: str = "short",  # "short" or "full", see adaround.PRESETS
    weight_iterations: int | None = None,  # of every unit, without init; default: the preset's
    activation_iterations: int | None = None,  # of every unit; default: the preset's
    activation_lr: float | None = None,  # of the activation steps; default: the preset's
    batch: int | None = None,  # default: the preset's
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    activation_ranges: str = "mse-zero-point",  # see q_diffusion.activation_ranges_of
    ndtc_bug: bool = False,  # label samples as the released code does, see `ndtc`
    granularity: str = "tensor",  # or "released": QuEST's at 4 bits, see `scale_axes`
    time_groups: int = 1,  # QuEST's: stretches of timesteps with activation scales of their own; here one for all
    rows: int = 1024,  # of the calibration set
    samples: int | None = None,  # rows (of each time group) that set the ranges; default: static_rows
    seed: int = 0,  # of the calibration rows, their order and the mini-batches
):
    """Quantize by Q-Diffusion's quantizers and reconstruction on PTQ4DM's timesteps, without split shortcuts.

    Departure from the paper, which rounds to nearest and quantizes neither attention nor below 8 bits: see `released`.
    Raises ValueError for a time group of which no row was drawn.
    """
    return common_stack(
        pipe,
        ndtc(calibration, rows, seed, ndtc_bug),
        w,
        a,
        init=init,
        keep=keep,
        softmax_bits=softmax_bits,
        split=False,
        activation_ranges=activation_ranges,
        stored_order=False,
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


def round_weights(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int = FLOAT,
    *,
    init: str | None = None,  # nothing to start from: must stay None
    preset: str = "short",  # "short" or "full", see adaround.PRESETS
    weight_iterations: int | None = None,  # of every unit; default: the preset's
    batch: int | None = None,  # default: the preset's
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    ndtc_bug: bool = False,  # label samples as the released code does, see `ndtc`
    rows: int = 1024,  # of the calibration set
    seed: int = 0,  # of the calibration rows and the mini-batches
):
    """AdaRound on PTQ4DM's timesteps, weights only: the timesteps are all that the method changes, so its weights see
    them too, and cannot be shared with methods that calibrate uniformly."""
    return round_weights_only(
        pipe,
        ndtc(calibration, rows, seed, ndtc_bug),
        w,
        a,
        init=init,
        keep=keep,
        split=False,
        settings=settings(preset, weight_iterations=weight_iterations, batch=batch),
        seed=seed,
    )


@torch.no_grad()
def released(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # nothing to start from: must stay None
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: RELEASED
    ndtc_bug: bool = True,  # label samples as the released code does, see `ndtc`
    rows: int = 1024,  # of the calibration set
    seed: int = 0,  # of the calibration rows and their order
):
    """Quantize as the released command does, which the paper reports at 8 bits.

    Weights to the nearest code; activations where a layer has computed them, in front of normalisation and SiLU, so
    that the next layer multiplies floats; attention in float (RELEASED). Ranges by `thresholds`, those of activations
    averaged over batches with everything else quantized.
    """
    if init is not None:
        raise ValueError("init: the released PTQ4DM rounds the full-precision weights to nearest")
    keep = RELEASED if keep is None else keep
    student = swap(pipe, w, FLOAT, keep=keep)
    denoiser = student.unet
    for name, layer in quant_layers(denoiser):
        bits, output = layer_bits(name, w, a, keep)
        if bits < FLOAT:
            layer.choose_weight_range(lambda x, spec: ranges.from_range(*thresholds(x, spec), x, spec))
        if output < FLOAT:
            layer.output_quantizer = Quantizer(QuantSpec(output))
    name_quantizers(denoiser)

    drawn = ndtc(calibration, rows, seed, ndtc_bug)
    quantizers = [q for q in input_quantizers(denoiser).values() if q.spec.bits < FLOAT]
    try:
        for q in quantizers:
            q.choose = ranges.Running(MOMENTUM, thresholds)
        for batch in torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).split(BATCH):
            denoiser(**drawn.inputs(batch))
    finally:
        for q in quantizers:
            q.choose = None
    return student


def thresholds(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range of least mean |x - x~|^2.4 among thresholds t = i / 100 max |x|, [channels] each end.

    It is [-t, t], or [0, t] and [-t, 0] for a channel of one sign: asymmetric codes on a symmetric range.
    """
    rows = x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)
    t = torch.arange(1, CANDIDATES + 1, device=x.device)[:, None] / CANDIDATES * rows.abs().amax(1)
    low, high = -t * (rows.amin(1) < 0), t * (rows.amax(1) > 0)
    scale, zero_point = ranges.affine(low, high, spec)
    best = ranges.least_error(rows, scale, zero_point.round(), spec)
    return low.gather(0, best)[0], high.gather(0, best)[0]
