"""SmoothQuant: input channels share their range with the weight's (Xiao et al., arXiv:2211.10438).

For input channel c of the layers that read one input: a_c is the largest |x_c| over the calibration rows, v_c the
largest |weight| of all these layers, and s_c = a_c^alpha / v_c^(1 - alpha) (equation 4). The layers compute
(x / s) (s W): channels of x come closer to each other, and the weight pays for it. At alpha = 1 all channels of x have
the same range, which is what one activation scale per channel gives, in a form that integers can compute.

x / s is a prologue of the layer (`quest.quantization.prologue`), also where the norm before it could hold the factors:
residual blocks have a SiLU between norm and convolution, which no factor passes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from baselines.granularity import STEP_ROWS, Granularity, ranges_work, set_ranges, swapped
from baselines.method import Method, Paper, one_of, takes
from quest.affine import FLOAT, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of, hooked
from quest.learning.alignment import outputs_of
from quest.learning.clipping import rows_of_each_step
from quest.learning.lowrank import exponent_pairs, weight_reach
from quest.quantization import ranges
from quest.quantization.layers import QuantLayer, attentions, quant_layers
from quest.quantization.quantizer import Quantizer

SEARCH_ROWS = 32  # random calibration rows on which factors are searched
FINALISTS = 3  # factors that are tried with the ranges of least error
TOKENS = 256  # most queries and keys of a row on which those of attention products are
QKV = ("to_q", "to_k", "to_v")
LEAST = 1e-5  # of weight ranges and of factors
# (alpha, beta) of s = a^alpha / v^beta: those that DeepCompressor tries for SVDQuant (arXiv:2411.05007).
SEARCHED = exponent_pairs(20)
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0)}


@dataclass(frozen=True, kw_only=True)
class Recipe(Granularity):
    # "search": of 39 pairs of exponents, those of least output error, for each input (see `best`).
    alpha: Annotated[float | str, one_of((0.25, 0.5, 0.75, 1.0, "search"))] = 0.5
    # a_c of the range of each step: the largest, which one step may decide, or the mean over the steps.
    statistic: Annotated[str, one_of(STATISTICS)] = "max"
    products: bool = True  # also divide queries by s, and multiply keys by it, for each channel of a head


class Observed(NamedTuple):
    """What full precision says of the layers that read one input.

    layers: their names. reach: a_c, [C].
    """

    layers: tuple[str, ...]
    reach: Tensor


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by SmoothQuant. Returns a new pipeline.

    Departures from the paper: convolutions too, with one factor per input channel for all taps; queries and keys, whose
    factors go into the rows of to_q and to_k; weights and static activations have ranges of least error, weights one
    for each output channel. A channel that is always zero keeps the factor 1 (released: 1e-5). Grouped convolutions are
    left alone.
    """
    student = swapped(pipe, calibration, w, a, recipe)
    denoiser, teacher = denoiser_of(student), denoiser_of(pipe)
    found = observe(teacher, calibration, recipe)
    layers = {
        name: layer
        for name, layer in quant_layers(denoiser)
        if layer.input_quantizer.spec.bits < FLOAT and layer.groups == 1
    }
    groups = [Observed(tuple(n for n in o.layers if n in layers), o.reach) for o in found]
    groups = [o for o in groups if o.layers]
    if recipe.alpha == "search":
        search(denoiser, teacher, groups, calibration, recipe.seed)
    else:
        for o in groups:
            own = [layers[name] for name in o.layers]
            scale(own, factors(o.reach, weight_reach(layer.weight for layer in own), recipe.alpha, 1 - recipe.alpha))
    if recipe.products:
        smooth_products(denoiser, teacher, calibration, recipe)
    for _, layer in quant_layers(denoiser):
        layer.choose_weight_range(ranges.mse)
    set_ranges(denoiser, calibration, a, recipe)
    return student


def factors(reach: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """Return s_c = a_c^alpha / v_c^beta, [C], at least 1e-5; 1 for a channel that is always zero."""
    found = (reach**alpha / weight.clamp(min=LEAST) ** beta).clamp(min=LEAST)
    return torch.where(reach > 0, found, 1.0)


def scale(layers: list[QuantLayer], found: Tensor) -> None:
    for layer in layers:
        layer.scale_input(found)


@torch.no_grad()
def observe(teacher: nn.Module, calibration: CalibrationSet, recipe: Recipe) -> list[Observed]:
    """Return the inputs of a float denoiser's layers: to_q, to_k and to_v of an attention may read the same one."""
    layers = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    seen: dict[object, list[str]] = {}  # input -> names of the layers that read it
    reaches: dict[str, list[Tensor]] = defaultdict(list)
    first = True

    def look(name, module):
        parent, _, leaf = name.rpartition(".")

        def hook(_module, args):
            x = args[0]
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            reaches[name].append(x.abs().transpose(0, axis).flatten(1).amax(1))
            if first:  # inputs of one attention are alive together, so that those at one address are the same
                seen.setdefault((parent, x.data_ptr()) if leaf in QKV else name, []).append(name)

        return hook

    with hooked(m.register_forward_pre_hook(look(n, m)) for n, m in layers.items()):
        for rows in rows_of_each_step(calibration, STEP_ROWS, recipe.seed):
            teacher(**calibration.inputs(rows))
            first = False
    over = STATISTICS[recipe.statistic]
    return [Observed(tuple(names), over(torch.stack(reaches[names[0]]))) for names in seen.values()]


@torch.no_grad()
def search(denoiser: nn.Module, teacher: nn.Module, groups: list[Observed], calibration: CalibrationSet, seed: int):
    """Scale the inputs of each group by the factors of SEARCHED with the least squared error of its outputs.

    One pass of full precision over SEARCH_ROWS rows gives each layer its input and its output. Layers are tried on
    these, with their weights and inputs quantized (`best`).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(calibration), generator=generator, device="cpu")[:SEARCH_ROWS]
    of = {name: o for o in groups for name in o.layers}
    # Outputs, until all layers of a group were called.
    met: dict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)

    def hook(name):
        def look(_module, args, output):
            o = of[name]
            met[o.layers][name] = output
            if len(met[o.layers]) == len(o.layers):
                outputs = met.pop(o.layers)
                layers = [denoiser.get_submodule(n) for n in outputs]
                scale(layers, best(layers, args[0], list(outputs.values()), o.reach))

        return look

    with hooked(teacher.get_submodule(name).register_forward_hook(hook(name)) for name in of):
        teacher(**calibration.inputs(rows))


def best(layers: list[QuantLayer], x: Tensor, outputs: list[Tensor], reach: Tensor) -> Tensor:
    """Return the factors of SEARCHED with the least squared error on the input x of these layers, [C].

    First all are tried with whole ranges, as DeepCompressor tries them. The search of ranges takes a hundred times as
    long, so only no factors and the best FINALISTS are tried with the ranges that the layers will have; static ones are
    of all steps together.
    """
    of_weights = weight_reach(layer.weight for layer in layers)
    candidates = [factors(reach, of_weights, *exponents) for exponents in SEARCHED]

    def error(found: Tensor, *choose: Callable) -> float:
        tries = (tried(layer, found, x, *choose) - y for layer, y in zip(layers, outputs, strict=True))
        return sum(off.square().sum(dtype=torch.float64).item() for off in tries)

    rough = [error(found, ranges.minmax, ranges.minmax) for found in candidates]
    finalists = [0, *sorted(range(1, len(candidates)), key=rough.__getitem__)[:FINALISTS]]
    return candidates[min(finalists, key=lambda i: error(candidates[i]))]


def tried(
    layer: QuantLayer,
    found: Tensor,
    x: Tensor,
    of_weights: Callable = ranges.mse,
    of_inputs: Callable = ranges.mse_zero_point,
) -> Tensor:
    """Return the output of a layer with these factors, its weight and the input x quantized."""
    trial = deepcopy(layer)
    trial.scale_input(found)
    trial.choose_weight_range(of_weights)
    spec = layer.input_quantizer.spec
    trial.input_quantizer = Quantizer(spec).to(x.device)
    trial.input_quantizer.size = layer.input_quantizer.size
    trial.input_quantizer.may_be_constant = True
    trial.input_quantizer.calibrate(trial.prologue(x, trial.channels), of_inputs)
    return trial(x)


@torch.no_grad()
def smooth_products(denoiser: nn.Module, teacher: nn.Module, calibration: CalibrationSet, recipe: Recipe) -> None:
    """Divide each channel of the queries by s and multiply that of the keys, in the rows of to_q and to_k.

    s_c = max |q_c|^alpha / max |k_c|^(1 - alpha). With alpha "search", it is that of SEARCHED with the least squared
    error of the logits. Attentions that normalize queries or keys are left as they are, and those whose products are
    in float. The denoiser's `coupled` names both layers, because one of them does not fit the other's original weight
    (see `checkpoint.load_weights`).
    """
    chosen = {
        name: module
        for name, module in attentions(denoiser)
        if module.processor.q.spec.bits < FLOAT and module.norm_q is None and module.added_kv_proj_dim is None
    }
    names = [f"{name}.{leaf}" for name, leaf in product(chosen, QKV[:2])]
    denoiser.coupled = [list(pair) for pair in zip(names[::2], names[1::2], strict=True)]
    generator = torch.Generator().manual_seed(recipe.seed)
    mixed = torch.randperm(len(calibration), generator=generator, device="cpu")[:SEARCH_ROWS]
    steps = [
        {name: y.abs().flatten(0, -2).amax(0) for name, y in layer_outputs(teacher, names, calibration, rows).items()}
        for rows in rows_of_each_step(calibration, STEP_ROWS, recipe.seed)
    ]
    reach = {name: STATISTICS[recipe.statistic](torch.stack([step[name] for step in steps])) for name in names}
    outputs = layer_outputs(teacher, names, calibration, mixed) if recipe.alpha == "search" else {}
    for name, module in chosen.items():
        q, k = f"{name}.to_q", f"{name}.to_k"
        if recipe.alpha == "search":
            pairs = [factors(reach[q], reach[k], *exponents) for exponents in SEARCHED]
            s = pairs[int(logit_error(module, outputs[q], outputs[k], pairs).argmin())]
        else:
            s = factors(reach[q], reach[k], recipe.alpha, 1 - recipe.alpha)
        s = torch.where(reach[k] > 0, s, 1.0)
        for layer, factor in ((module.to_q, 1 / s), (module.to_k, s)):
            layer.weight.data.mul_(factor[:, None])
            if layer.bias is not None:
                layer.bias.data.mul_(factor)


def layer_outputs(teacher: nn.Module, names: list[str], calibration: CalibrationSet, rows: Tensor) -> dict[str, Tensor]:
    """Return what these layers of a float denoiser compute for some calibration rows."""
    with outputs_of(teacher, names) as found:
        teacher(**calibration.inputs(rows))
    return found


def logit_error(module: nn.Module, q: Tensor, k: Tensor, candidates: list[Tensor]) -> Tensor:
    """Return the squared error of quantized q k^T for each vector of factors of the channels, [candidates]."""

    def heads(x):
        x = x[:, :: -(-x.shape[1] // TOKENS)]
        return x.unflatten(-1, (module.heads, -1)).transpose(1, 2).flatten(0, 1)

    exact = heads(q) @ heads(k).transpose(1, 2)
    errors = []
    for s in candidates:
        sides = []
        for x, spec in ((q / s, module.processor.q.spec), (k * s, module.processor.k.spec)):
            quantizer = Quantizer(spec).to(x.device)
            quantizer.may_be_constant = True
            quantizer.calibrate(heads(x), ranges.mse_zero_point)
            sides.append(fake_quantize(heads(x), quantizer.qparams))
        errors.append((sides[0] @ sides[1].transpose(1, 2) - exact).square().sum(dtype=torch.float64))
    return torch.stack(errors)


def work(recipe, w: int, model, trajectories: int) -> Counter:
    found = ranges_work(recipe, w, model, trajectories)
    found["call"] = model.steps * STEP_ROWS * (1 + recipe.products)
    if recipe.alpha == "search":
        found["weight ranges"] += 1 + FINALISTS
        found["ranges"] += 1 + FINALISTS
        found["quantized call"] += (len(SEARCHED) + 1 + FINALISTS) * SEARCH_ROWS
    return found


METHOD = Method(
    "smoothquant",
    quantize,
    about="SmoothQuant: input channels divided by factors that the weights take over; rounded to nearest",
    work=work,
    paper=Paper(
        "xiao2023smoothquant",
        "2211.10438",
        "{SmoothQuant}: Accurate and Efficient Post-Training Quantization for Large Language Models",
        "Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and Wu, Hao and Demouth, Julien and Han, Song",
        "ICML",
        2023,
    ),
)
