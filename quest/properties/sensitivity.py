"""Which parts of a denoiser suffer from few bits: one of them quantized, all else in float.

The paper lowers one class of layers at a time and leaves the rest at 8 bits (QuEST, arXiv:2402.03666, figure 3). Here
the rest is in float, so that nothing but the part itself is seen.
"""

from collections.abc import Iterable

import torch
from torch import nn

from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.calibrate import calibrate
from quest.metrics.noise_prediction import eps_error
from quest.quantization import ranges
from quest.quantization.checkpoint import freeze
from quest.quantization.cost import macs
from quest.quantization.layer_names import LAYER_CLASSES, layer_class
from quest.quantization.layers import attentions, quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups, grouped

PRODUCTS = "attention products"
ENDS = "boundary"  # the class of the first and last layer, which every method keeps at 8 bits
LOWERED = ("weights and activations", "activations")
SAMPLES = 64  # rows of all timesteps that set a static range
GROUP_SAMPLES = 8  # rows that set the range of a time group


def parts(denoiser: nn.Module) -> dict[str, list[str]]:
    """Layers of a float denoiser by class, the two products of each attention, by its processor's name, in one of
    their own."""
    found: dict[str, list[str]] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found.setdefault(layer_class(name), []).append(name)
    found[PRODUCTS] = [f"{name}.processor" for name, _ in attentions(denoiser)]
    order = [*(name for name, _ in LAYER_CLASSES), "other", PRODUCTS]
    return {name: found[name] for name in order if found.get(name)}


def lowered(
    pipe, calibration: CalibrationSet, names: Iterable[str], w: int, a: int, *, time_groups: int = 1, seed: int = 0
):
    """A pipeline whose named layers and attention products have w and a bits and nothing else is quantized.

    Weights take the nearest code; ranges are those of least error, of the activations static or one for each time
    group. Probabilities have 8 bits at least. Raises ValueError for a name that the denoiser does not have.
    """
    every = [name for of_class in parts(pipe.unet).values() for name in of_class]
    names = set(names)
    if unknown := names.difference(every):
        raise ValueError(f"names: {sorted(unknown)[0]!r} is no layer or attention processor of the denoiser")
    groups = TimeGroups(grouped(calibration.timesteps, time_groups)) if time_groups > 1 else None
    student = swap(pipe, w, a, keep={name: FLOAT for name in every if name not in names}, groups=groups)
    for _, layer in quant_layers(student.unet):
        layer.choose_weight_range(ranges.mse)
    freeze(student.unet)
    samples = SAMPLES if groups is None else GROUP_SAMPLES
    calibrate(student.unet, calibration, ranges.mse_zero_point, samples=samples, seed=seed)
    return student


def sensitivities(pipe, calibration: CalibrationSet, evaluation: CalibrationSet, w: int, a: int) -> list[dict]:
    """Noise-prediction error with one class of layers at a time at w and a bits, the rest in float; static ranges.

    Returns rows {layer_class, lowered, layers, parameters, macs, errors}: `lowered` is one of LOWERED, `parameters` and
    `macs` the class's shares of the denoiser's, `errors` the relative squared error on each held-out trajectory, mean
    over calls. The last class, "all", is every one but the first and last layer at once.
    """
    found = parts(pipe.unet)
    found["all"] = [name for layer_class, names in found.items() if layer_class != ENDS for name in names]
    work = macs(pipe.unet, calibration.inputs(torch.tensor([0])))
    size = {n: sum(p.numel() for p in m.parameters()) for n, m in pipe.unet.named_modules() if hasattr(m, "weight")}
    whole = sum(p.numel() for p in pipe.unet.parameters())
    rows = []
    for name, names in found.items():
        share = {
            "layers": len(names),
            "parameters": sum(size.get(n, 0) for n in names) / whole,
            "macs": sum(work[n] for n in names) / sum(work.values()),
        }
        for what, bits in zip(LOWERED, ((w, a), (FLOAT, a)), strict=True):
            if name == PRODUCTS and what != "activations":
                continue  # products have no weights
            errors, _ = eps_error(lowered(pipe, calibration, names, *bits), evaluation)
            rows.append({"layer_class": name, "lowered": what} | share | {"errors": errors.mean(1).tolist()})
            print(f"{name}, {what}: {errors.mean().item():.4g}", flush=True)
    return rows
