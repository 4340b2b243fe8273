"""PTQ4DM: calibration at normally distributed timesteps of the sampler (Shang et al., arXiv:2211.15736).

There are two rows. `quantize` is what later papers seem to run under this name: Q-Diffusion's quantizers and
reconstruction on PTQ4DM's timesteps, without split shortcuts. `released` is the paper's code.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.adaround import RoundingRecipe, rounding_work, weights_only
from baselines.method import Count, Method, Paper, Seed, takes
from baselines.q_diffusion import ReconstructionRecipe, common_stack, stack_work
from quest.affine import FLOAT, QuantSpec
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import choosing
from quest.quantization import ranges
from quest.quantization.layer_names import Keep, layer_bits
from quest.quantization.layers import input_quantizers, name_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import swap

MEAN = DEVIATION = 0.4  # of the drawn step, as a share of all steps (released script; the paper says at most T / 2)
CANDIDATES = 100  # thresholds of the released search
MOMENTUM = 0.9  # of its running averages of ranges
BATCH = 256  # calibration rows per update of these averages

# Exceptions of the released code. Attention stays in float: its projections are 1-d convolutions, which it does not
# wrap; its products and softmax are plain functions. 8 bits: the weights of the last convolution and of the time
# embedding's first linear, the first in its list of layers. The output of the last convolution is not quantized.
RELEASED: Keep = {
    "*.attentions.?.to_*": 32,
    "*.processor": 32,
    "time_embedding.linear_1": [8, 2],
    "conv_out": [8, 32],
}


def ndtc(calibration: CalibrationSet, rows: int, seed: int, bug: bool = False) -> CalibrationSet:
    """About `rows` rows at normally distributed sampling steps ("normally distributed timestep calibration", NDTC).

    Step s of S (0 is the cleanest) is the floor of a draw from a normal distribution with mean and standard deviation
    0.4 S, clamped to 0..S - 1. A row is the denoiser's input at that step, both halves of a guided call. Rows lie in
    the order of the calls.
    bug: reproduces the released code, which stops the sampler after s steps, at noise level S - 1 - s, and labels that
    sample with the timestep of step s. One departure: here the row is the state before the step, there the state after.
    """
    calls = calibration.calls()
    trajectories = len(calibration.trajectory.unique())
    calls = calls.view(-1, trajectories, calls.shape[1])  # noisiest first
    steps, n = len(calls), max(1, rows // calls.shape[2])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, generator=generator, dtype=torch.float32, device="cpu")
    step = (MEAN * steps + DEVIATION * steps * noise).floor().clamp(0, steps - 1).long()
    call = (steps - 1 - step).sort().values
    # Neighbouring rows have different trajectories; a trajectory repeats only after all others.
    order = torch.randperm(trajectories, generator=generator, device="cpu")
    trajectory = order[torch.arange(n, device="cpu") % trajectories]
    drawn = calibration.subset(calls[call, trajectory].flatten())
    if bug:
        labels = drawn.timestep
        drawn = calibration.subset(calls[steps - 1 - call, trajectory].flatten())
        drawn.timestep = labels
    return drawn


@dataclass(frozen=True, kw_only=True)
class Recipe(ReconstructionRecipe):
    ndtc_bug: bool = False  # label samples as the released code does, see `ndtc`


@dataclass(frozen=True, kw_only=True)
class WeightsRecipe(RoundingRecipe):
    ndtc_bug: bool = False  # label samples as the released code does, see `ndtc`


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by Q-Diffusion's quantizers and reconstruction on PTQ4DM's timesteps.

    Departure from the paper, which rounds to nearest, has no bits below 8 and keeps attention in float: see `released`.
    Returns a new pipeline. Raises ValueError for a time group of which no row was drawn.
    """
    drawn = ndtc(calibration, recipe.rows, recipe.seed, recipe.ndtc_bug)
    return common_stack(pipe, calibration, drawn, w, a, recipe)


@takes(WeightsRecipe)
def round_weights(pipe, calibration: CalibrationSet, w: int, a: int, recipe: WeightsRecipe):
    """AdaRound on PTQ4DM's timesteps, weights only. Returns a new pipeline.

    The timesteps are the method's only change, so its weights are rounded on them too and not shared with methods that
    calibrate uniformly.
    """
    return weights_only(pipe, ndtc(calibration, recipe.rows, recipe.seed, recipe.ndtc_bug), w, a, recipe)


@torch.no_grad()
def released(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    keep: Keep | None = None,  # layer glob -> minimum bits; default: RELEASED
    ndtc_bug: bool = True,  # label samples as the released code does, see `ndtc`
    rows: Count = 1024,  # of the calibration set
    seed: Seed = 0,  # of the calibration rows and their order
):
    """Quantize as the released command does; the paper reports it at 8 bits. Returns a new pipeline.

    Weights are rounded to nearest. Activations are quantized at the output of a layer, before normalisation and SiLU,
    so the next layer multiplies floats. Attention stays in float (RELEASED). Ranges come from `thresholds`; those of
    activations are averaged over batches while everything else is quantized.
    """
    keep = RELEASED if keep is None else keep
    student = swap(pipe, w, FLOAT, keep=keep)
    denoiser = denoiser_of(student)
    for name, layer in quant_layers(denoiser):
        bits, output = layer_bits(name, w, a, keep)
        if bits < FLOAT:
            layer.choose_weight_range(lambda x, spec: ranges.from_range(*thresholds(x, spec), x, spec))
        if output < FLOAT:
            layer.output_quantizer = Quantizer(QuantSpec(output))
    name_quantizers(denoiser)

    drawn = ndtc(calibration, rows, seed, ndtc_bug)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed), device="cpu")
    quantizers = [q for q in input_quantizers(denoiser).values() if q.spec.bits < FLOAT]
    with choosing({q: ranges.Running(MOMENTUM, thresholds) for q in quantizers}):
        for batch in order.split(BATCH):
            denoiser(**drawn.inputs(batch))
    return student


def thresholds(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(low, high) of the range with the least mean |x - x~|^2.4, each [channels].

    Candidates have t = i / 100 max |x|, i from 1 to 100. The range is [-t, t]; for a channel of one sign it is [0, t]
    or [-t, 0]. Codes are asymmetric.
    """
    rows = ranges.in_rows(x, spec)
    t = torch.arange(1, CANDIDATES + 1, dtype=x.dtype, device=x.device)[:, None] / CANDIDATES * rows.abs().amax(1)
    low, high = -t * (rows.amin(1) < 0), t * (rows.amax(1) > 0)
    scale, zero_point = ranges.affine(low, high, spec)
    best = ranges.least_error(rows, scale, zero_point.round(), spec)
    return low.gather(0, best)[0], high.gather(0, best)[0]


def normal_rows(recipe, model) -> int:
    """How many rows `ndtc` draws."""
    return model.halves * max(1, recipe.rows // model.halves)


METHOD = Method(
    "ptq4dm",
    quantize,
    about="PTQ4DM: its calibration timesteps on Q-Diffusion's stack, as later papers run it",
    work=lambda recipe, w, model, trajectories: stack_work(recipe, w, normal_rows(recipe, model)),
    fixed={"time_groups": 1, "split": False},
    recipe={"init": "adaround-ndtc"},
    paper=Paper(
        "shang2023ptq4dm",
        "2211.15736",
        "Post-training Quantization on Diffusion Models",
        "Shang, Yuzhang and Yuan, Zhihang and Xie, Bin and Wu, Bingzhe and Yan, Yan",
        "CVPR",
        2023,
    ),
    variants={
        "adaround-ndtc": dict(
            function=round_weights,
            about="learned rounding of the weights on PTQ4DM's calibration timesteps, where `ptq4dm` starts",
            work=lambda recipe, w, model, trajectories: rounding_work(recipe, w, normal_rows(recipe, model)),
            fixed={},
            weights_only=True,
            recipe={},
        ),
        "ptq4dm-as-released": dict(
            function=released,
            about="PTQ4DM as its released code runs it: nearest weights, attention in float",
            work=lambda recipe, w, model, trajectories: Counter(
                {"threshold search": 1, "threshold search row": normal_rows(recipe, model)}
            ),
            fixed={"keep": RELEASED},
            recipe={},
            bits=("w8a8",),  # all that the paper reports
        ),
    },
)
