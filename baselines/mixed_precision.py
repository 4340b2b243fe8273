"""Mixed precision: bits of each output channel, or of each layer, by sensitivity under a budget of mean bits.

A channel or layer i at b bits changes its weights by d_i(b), and the noise prediction e by about J_i d_i(b), where J is
the derivative of e. Its sensitivity at b bits is the expectation of |J_i d_i(b)|^2, estimated without J: for random
signs v, the expectation of (v^T J_i d)^2 is |J_i d|^2 (Hutchinson's estimator, as in HAWQ-V2, arXiv:1911.03852), and
v^T J is one backward pass. Effects of different channels are added up as if they were independent.

Bits are then spent where a bit lowers the sum most (`allocate`), until the mean over all weights meets the budget.
Channels have exact products of integers as before: a scale for each output channel never was in the sum. Files hold
each channel in its own bits, so that effective bits show what was spent.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from baselines.adaround import uniform, uniform_rows
from baselines.granularity import Granularity, ranges_work, set_ranges, swapped
from baselines.method import Count, Method, Rule, Valid, one_of, takes
from quest.affine import QParams, QuantSpec, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import changed, denoiser_of
from quest.quantization import ranges
from quest.quantization.layers import QuantLayer, quant_layers

LEAST, MOST = 2, 8  # bits of a weight


@dataclass(frozen=True, kw_only=True)
class Recipe(Granularity):
    by: Annotated[str, one_of(("channel", "layer"))] = "channel"  # what has bits of its own
    budget: Annotated[float, Valid(minimum=LEAST, maximum=MOST)] | None = None  # mean bits of a weight; default: w
    spread: Annotated[int, Valid(minimum=1, maximum=MOST - LEAST)] = 1  # bits by which one may differ from the budget
    rows: Count = 64  # of the calibration set, evenly from 20 sampler calls: a backward pass for each

    rules: ClassVar[tuple[Rule, ...]] = (
        *Granularity.rules,
        Rule(
            {"w": Valid(minimum=LEAST)},
            {"budget": Valid(minimum=LEAST, maximum="w")},
            "the name of the cell would hide that its weights have more bits on average",
        ),
    )


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Spend the budget on output channels (or layers), then round to nearest. Returns a new pipeline.

    Layers that `keep` gives more than w bits are not in the budget. Ranges are those of `rtn-mse`, for each channel at
    its own bits. If the estimate does not promise less error than w bits everywhere (or the budget leaves no choice),
    all weights have w bits, or as many as fit.

    MPQ-DM (arXiv:2412.11549) instead gives the 10 % of a layer's channels with the largest kurtosis one bit more, the
    10 % with the least one bit less, and finetunes; MixDQ (arXiv:2405.17873) solves an integer program over layers.
    """
    budget = w if recipe.budget is None else recipe.budget
    student = swapped(pipe, calibration, w, a, recipe)
    denoiser = denoiser_of(student)
    layers = {name: layer for name, layer in quant_layers(denoiser) if layer.weight_quantizer.spec.bits == w}
    choices = list(range(max(LEAST, int(budget) - recipe.spread), min(MOST, -int(-budget // 1) + recipe.spread) + 1))
    drawn = uniform(calibration, recipe.rows, recipe.seed)
    errors = sensitivities(denoiser_of(pipe), layers, choices, drawn, recipe.by == "layer", recipe.seed)
    sizes = [layer.weight[0].numel() for layer in layers.values()]
    if recipe.by == "layer":
        sizes = [size * len(layer.weight) for size, layer in zip(sizes, layers.values(), strict=True)]
    counts = [len(each) for each in errors.values()]
    of_each = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    of_each = torch.tensor(of_each, dtype=torch.long, device="cpu")
    bits = allocate(torch.cat(list(errors.values())), of_each, choices, budget)
    for layer, own in zip(layers.values(), bits.split(counts), strict=True):
        own = own.expand(len(layer.weight)).tolist()
        spec = layer.weight_quantizer.spec
        layer.weight_quantizer.spec = replace(spec, bits=max(own), widths="".join(map(str, own)))
    for _, layer in quant_layers(denoiser):
        layer.choose_weight_range(ranges.mse)
    set_ranges(denoiser, calibration, a, recipe)
    return student


def sensitivities(
    teacher: nn.Module,
    layers: dict[str, QuantLayer],
    choices: list[int],
    calibration: CalibrationSet,
    whole: bool,
    seed: int,
) -> dict[str, Tensor]:
    """Return for each layer the estimated squared change of the noise prediction, [channels, choices], a row's mean.

    teacher: the float denoiser. whole: of a layer with all channels together, [1, choices]. Every row of the
    calibration set has random signs and a backward pass of its own.
    """
    formats = [QuantSpec(bits, axis=0) for bits in choices]
    weights = {name: teacher.get_submodule(name).weight for name in layers}
    found: dict[str, list[QParams]] = {
        name: [QParams(*ranges.mse(weight.detach(), spec), spec) for spec in formats]
        for name, weight in weights.items()
    }
    errors = {
        name: torch.zeros(1 if whole else len(weight), len(choices), dtype=torch.float64, device="cpu")
        for name, weight in weights.items()
    }
    generator = torch.Generator().manual_seed(seed)
    with changed(weights.values(), "requires_grad", True), torch.enable_grad():
        for row in range(len(calibration)):
            prediction = teacher(**calibration.inputs(torch.tensor([row], dtype=torch.long, device="cpu"))).sample
            draw = torch.randint(0, 2, prediction.shape, generator=generator, dtype=torch.float32, device="cpu")
            signs = (2 * draw - 1).to(prediction.device)
            gradients = torch.autograd.grad((prediction * signs).sum(), list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                weight = weight.detach()
                for j, qparams in enumerate(found[name]):
                    moved = (fake_quantize(weight, qparams) - weight) * gradient
                    effect = moved.flatten(1).sum(1, dtype=torch.float64)
                    effect = effect.sum(0, keepdim=True) if whole else effect
                    errors[name][:, j] += effect.square().cpu() / len(calibration)
    return errors


def allocate(errors: Tensor, sizes: Tensor, choices: list[int], budget: float) -> Tensor:
    """Return the bits of each item, [items], whose mean over weights is at most the budget, with little error.

    errors [items, choices]: at so many bits, which rise by one. sizes [items]: weights of an item. All items start with
    the least bits. Bits are added in the order of how much error one takes away per weight; what a second bit takes
    away counts as no more than what the first does, so it comes later. Where the bits of all items can be the same
    within the budget and have no more error, they are.
    """
    gains = (errors[:, :-1] - errors[:, 1:]) / sizes[:, None]
    gains = gains.cummin(1).values
    order = gains.flatten().argsort(descending=True, stable=True)
    spent = sizes[:, None].expand_as(gains).flatten()[order].cumsum(0)
    room = (budget - choices[0]) * sizes.sum()
    added = torch.zeros(gains.numel(), dtype=torch.long, device="cpu")
    added[order[spent <= room + 1e-6 * sizes.sum()]] = 1
    place = added.view_as(gains).sum(1)
    same = [j for j, bits in enumerate(choices) if bits <= budget][-1]
    chosen = errors.gather(1, place[:, None]).sum()
    if not chosen < errors[:, same].sum():
        place = torch.full_like(place, same)
    return torch.tensor(choices, dtype=torch.long, device="cpu")[place]


def work(recipe, w: int, model, trajectories: int) -> Counter:
    rows = uniform_rows(recipe, model, trajectories)
    counted = ranges_work(recipe, w, model, trajectories)
    # A backward pass takes about as long as two calls.
    return counted + Counter({"weight ranges": 1 + 2 * recipe.spread, "call": 3 * rows})


METHOD = Method(
    "mixed-precision",
    quantize,
    about="round to nearest; bits of each output channel by sensitivity, w on average",
    work=work,
)
