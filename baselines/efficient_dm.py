"""EfficientDM: low-rank updates merged into quantized weights, one activation scale per step (arXiv:2310.03270).

1. Round the full-precision weights to nearest codes. W0 are these codes, dequantized and fixed.
2. QALoRA: each layer's weight becomes Q(W0 + B A), with B [C_out, 32] and A [32, inputs] learned from B = 0. The scale
   of the quantizer Q is learned too. The learning rate of B and A is proportional to the layer's mean weight scale,
   since an update matters only where it reaches another code.
3. TALSQ: every activation quantizer learns one scale per sampling step.
4. Distil: follow full-precision trajectories step by step, from noise to image, and minimize the squared error of the
   (guided) predicted noise. No other target and no training image is used.
5. Merge: Q(W0 + B A) becomes the weight, so the checkpoint is a plain quantized denoiser.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from baselines.method import (
    Bits,
    Count,
    Guidance,
    Iterations,
    Method,
    Paper,
    Positive,
    Seed,
    Step,
    Valid,
    one_of,
    takes,
)
from quest.affine import FLOAT, round_ste
from quest.diffusion.calibration_set import CalibrationSet, guide
from quest.diffusion.denoisers import denoiser_of
from quest.learning.alignment import ScaleAdam
from quest.learning.calibrate import calibrate
from quest.learning.recomputing import recomputing
from quest.quantization import cost, ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layer_names import KEEP, Keep
from quest.quantization.layers import QuantLayer, input_quantizers, quant_layers
from quest.quantization.swapping import GRANULARITIES, set_granularity, swap
from quest.quantization.timegroups import TimeGroups


@dataclass(frozen=True)
class Preset:
    """Length of the training, and its learning rates."""

    iterations: int
    batch: int  # trajectories per iteration
    lr_multiplier: float  # of the recipe's learning rates


# The paper's 160 epochs of 100 steps, or a sixteenth of them at sixteen times the learning rates.
PRESETS = {"full": Preset(16_000, 2, 1), "short": Preset(1000, 8, 16)}

# Exceptions of the released code: shortcuts, downsampling convolutions and attention products in float; the first three
# layers in its order and the last one at 8 bits.
RELEASED: Keep = {
    "*.conv_shortcut": 32,
    "*.downsamplers.*.conv": 32,
    "*.processor": 32,
    "time_embedding.*": 8,
    "conv_in": 8,
    "conv_out": 8,
}


class LowRank(nn.Module):
    """Parametrization of a weight W as W + B A. B starts at zero, so training starts from W."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.flatten(1).shape  # of a convolution: [C_out, C_in * kh * kw]
        rank = min(rank, rows, columns)
        draw = torch.rand(rank, columns, generator=generator, dtype=torch.float32, device="cpu")
        start = (2 * draw - 1) / columns**0.5  # as LoRA (arXiv:2106.09685)
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).reshape(weight.shape)


def add_low_rank(layer: QuantLayer, rank: int, generator: torch.Generator) -> LowRank:
    """Add a low-rank update to the layer's weight, which `freeze` merges; until then the weight itself stays fixed."""
    layer.thaw()
    update = LowRank(layer.weight, rank, generator)
    parametrize.register_parametrization(layer, "weight", update)
    return update


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The learning rates are those of the preset `full`; `short` multiplies them. All fall linearly to zero."""

    init: str | None = None  # checkpoint whose weights to start from; default: nearest codes of the whole range
    preset: Annotated[str, one_of(PRESETS)] = "short"  # iterations and batch: "full" is the paper's
    guidance: Guidance | None = None  # guidance scale of the sampler; None without guidance
    keep: Keep | None = None  # layer glob -> bits; these layers get no update; default: first and last layer at 8
    softmax_bits: Bits = 8
    granularity: Annotated[str, one_of(GRANULARITIES)] = "tensor"  # "released": as QuEST's code at 4 bits
    samples: Count = 32  # random calibration rows per step that set the activation ranges
    rank: Count = 32
    iterations: Iterations | None = None  # default: the preset's
    batch: Count | None = None  # trajectories per iteration; default: the preset's
    lr_update: Positive = 1 / 2500  # of B and A, in units of the layer's mean weight scale
    lr_weight_scale: Positive = 5e-5  # of the logarithm of the weight scales
    lr_scale: Positive = 5e-4  # of the logarithm of the activation scales
    # Of the activation zero points, in codes; 0: they are fixed. Released: 5e-4.
    lr_zero_point: Annotated[float, Valid(minimum=0)] = 0.0
    seed: Seed = 0


def sizes(recipe) -> tuple[int, int]:
    """(iterations, batch). The recipe's numbers override those of its preset."""
    preset = PRESETS[recipe.preset]
    return preset.iterations if recipe.iterations is None else recipe.iterations, recipe.batch or preset.batch


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by EfficientDM. Returns a new pipeline.

    Departures from the paper:
    - The time steps are those of the sampler, not 100 of which a sampler uses some.
    - Trajectories come from the calibration set and are not sampled anew.
    - The search for activation ranges includes zero points, as in all methods here (ranges.mse_zero_point).
    - The logarithms of scales are learned, so that scales stay positive, with Adam's moments for every step. (The
      published rate of weight scales, 1e-6, is 5e-5 relative to a scale of 0.02.)

    Departures from the released code: it also learns a zero point for each step, here only with `lr_zero_point`, and
    rounded in each iteration. Its AdamW keeps moments across the steps, so that one visit moves a scale further. As
    there, training starts from nearest codes of the whole range (QuEST: from AdaRound, here `init`).
    Raises ValueError where `keep` names every layer, and FloatingPointError where the loss is not finite.
    """
    keep = KEEP if recipe.keep is None else recipe.keep
    groups = TimeGroups(calibration.timesteps)
    student = swap(pipe, w, a, keep=keep, softmax_bits=recipe.softmax_bits, groups=groups)
    denoiser = denoiser_of(student)
    if recipe.init is None:
        for _, layer in quant_layers(denoiser):
            layer.choose_weight_range(ranges.minmax)
    else:
        load_weights(denoiser, recipe.init)
    layers = dict(quant_layers(denoiser))  # loading may split some
    tuned = {n: layer for n, layer in layers.items() if not any(fnmatch(n, glob) for glob in keep)}
    if not tuned:
        raise ValueError("keep: it names every layer, so that none gets an update; valid: globs that leave some out")
    for layer in layers.values():
        layer.freeze()
        layer.origin = None  # W0 is what the codes mean
    set_granularity(denoiser, recipe.granularity, a)
    calibrate(denoiser, calibration, ranges.mse_zero_point, samples=recipe.samples, seed=recipe.seed)
    iterations, batch = sizes(recipe)
    multiplier = PRESETS[recipe.preset].lr_multiplier
    rates = {
        name: multiplier * getattr(recipe, name)
        for name in ("lr_update", "lr_weight_scale", "lr_scale", "lr_zero_point")
    }
    distil(denoiser, calibration, tuned, replace(recipe, iterations=iterations, batch=batch, **rates))
    return student


def distil(denoiser: nn.Module, calibration: CalibrationSet, tuned: dict[str, QuantLayer], recipe: Recipe) -> None:
    """Train the updates and weight scales of the tuned layers and every activation scale, then merge the updates.

    The loss is the mean squared error of the guided prediction. One iteration is one sampler call of `recipe.batch`
    trajectories. Calls follow each other as in sampling, and the first call draws new trajectories. The learning rates
    of the recipe are not multiplied here.
    """
    generator, iterations = torch.Generator().manual_seed(recipe.seed), recipe.iterations
    calls = calibration.calls().unflatten(0, (int(calibration.call.max()) + 1, -1))  # [calls, trajectories, halves]
    updates = {n: add_low_rank(layer, recipe.rank, generator) for n, layer in tuned.items()}
    quantizers = list(input_quantizers(denoiser).values())
    scales = ScaleAdam([q.scale for q in quantizers])
    weight_scales = ScaleAdam([layer.weight_quantizer.scale for layer in tuned.values()])
    shifted = [q for q in quantizers if recipe.lr_zero_point and not (q.spec.symmetric or q.spec.bits == FLOAT)]
    exact = [q.zero_point.clone() for q in shifted]  # the zero points before they are rounded
    zero_points = ScaleAdam(exact, log=False, least=-math.inf) if shifted else None
    for parameter in (*scales.scales, *weight_scales.scales, *exact):
        parameter.requires_grad_()
    steps = {n: layer.weight_quantizer.scale.detach().mean().item() for n, layer in tuned.items()}
    learned = [p for u in updates.values() for p in u.parameters()]
    learned += scales.scales + weight_scales.scales + exact
    cost.record(denoiser, "distillation", learned, iterations, recipe.batch)
    adam = torch.optim.AdamW(
        [{"params": list(updates[n].parameters()), "lr": recipe.lr_update * step} for n, step in steps.items()],
        fused=True,
    )
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 1 - i / max(iterations, 1))
    try:
        with (
            recomputing(denoiser, calibration.inputs(calls[0, 0, :1]), recipe.batch * calls.shape[2]) as at_once,
            tqdm(range(iterations), desc="distillation", mininterval=5) as bar,
        ):
            for i in bar:
                if i % len(calls) == 0:
                    chosen = torch.randperm(calls.shape[1], generator=generator, device="cpu")[: recipe.batch]
                rows = calls[i % len(calls), chosen]  # [batch, halves]
                for optimizer in filter(None, (adam, scales, weight_scales, zero_points)):
                    optimizer.zero_grad()
                for part in rows.split(max(1, at_once // calls.shape[2])):
                    for q, z in zip(shifted, exact, strict=True):
                        q.zero_point = round_ste(z)
                    prediction = denoiser(**calibration.inputs(part.flatten())).sample.unflatten(0, part.shape)
                    target = guide(calibration.target[part], recipe.guidance)
                    loss = F.mse_loss(guide(prediction, recipe.guidance), target)
                    if not loss.isfinite():
                        raise FloatingPointError(
                            f"distillation, iteration {i}: the loss is {loss.item()}; lower lr_scale"
                        )
                    (loss * (len(part) / len(rows))).backward()
                adam.step()
                group = denoiser.time_groups.index(calibration.timestep[rows[0, :1]]).item()
                scales.step(group, recipe.lr_scale * (1 - i / iterations))
                weight_scales.step(0, recipe.lr_weight_scale * (1 - i / iterations))
                if zero_points:
                    zero_points.step(group, recipe.lr_zero_point * (1 - i / iterations))
                decay.step()
                bar.set_postfix(loss=f"{loss.item():.2e}", refresh=False)
    finally:
        denoiser.requires_grad_(False)
        for q, z in zip(shifted, exact, strict=True):
            q.zero_point = z.detach().round()
    for layer in tuned.values():
        layer.freeze()


def work(recipe, w: int, model, trajectories: int) -> Counter:
    iterations, batch = sizes(recipe)
    rows = iterations * batch * model.halves
    ranged = {"ranges": model.steps, "ranges row": model.steps * recipe.samples}
    return Counter(ranged | {"distillation": iterations, "distillation row": rows})


def distil_all(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
    """The step of distillation that is measured."""
    no_learning = dict(lr_update=0.0, lr_weight_scale=0.0, lr_scale=0.0)
    distil(student, calibration, dict(quant_layers(student)), Recipe(iterations=iterations, batch=batch, **no_learning))


METHOD = Method(
    "efficient-dm",
    quantize,
    about="EfficientDM: low-rank updates and a scale for each step, distilled; zero points are learned on request",
    work=work,
    steps={"distillation": Step(distil_all, ("distillation",))},
    paper=Paper(
        "he2024efficientdm",
        "2310.03270",
        "{EfficientDM}: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models",
        "He, Yefei and Liu, Jing and Wu, Weijia and Zhou, Hong and Zhuang, Bohan",
        "ICLR",
        2024,
    ),
    variants={
        "efficient-dm-as-released": dict(
            about="EfficientDM with the layers that its released code keeps at other bits",
            fixed={"keep": RELEASED},
        )
    },
)
