"""Which parts of a denoiser suffer from few bits: quantize one part and keep everything else in float.

The paper lowers one class of layers at a time and keeps the rest at 8 bits (QuEST, arXiv:2402.03666, figure 3). Here
the rest is in float, so that the error comes from that part alone.
"""

from collections.abc import Iterable

import torch
from torch import nn

from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate
from quest.metrics.noise_prediction import eps_error
from quest.quantization import ranges
from quest.quantization.cost import macs
from quest.quantization.layer_names import LAYER_CLASSES, layer_class
from quest.quantization.layers import attentions, freeze, quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups, grouped

PRODUCTS = "attention products"
ENDS = "boundary"  # the class of the first and last layer, which every method keeps at 8 bits
LOWERED = ("weights and activations", "activations")
SAMPLES = 64  # rows, of all timesteps together, that determine a static range
GROUP_SAMPLES = 8  # rows that determine the range of a time group


def parts(denoiser: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of a float denoiser by class; the class PRODUCTS has the attention processors, each of which
    computes two products."""
    by_class: dict[str, list[str]] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            by_class.setdefault(layer_class(name), []).append(name)
    by_class[PRODUCTS] = [f"{name}.processor" for name, _ in attentions(denoiser)]
    order = [*(name for name, _ in LAYER_CLASSES), "other", PRODUCTS]
    return {name: by_class[name] for name in order if by_class.get(name)}


def lowered(
    pipe, calibration: CalibrationSet, names: Iterable[str], w: int, a: int, *, time_groups: int = 1, seed: int = 0
):
    """A copy of the pipeline in which only the named layers and attention products are quantized, to w and a bits.

    Weights take the nearest code, ranges minimize the squared error, and activations have a static range or one for
    each time group. Probabilities have 8 bits or more. Raises ValueError for a name that the denoiser does not have.
    """
    every = [name for of_class in parts(denoiser_of(pipe)).values() for name in of_class]
    names = set(names)
    if unknown := names.difference(every):
        raise ValueError(f"names: {sorted(unknown)[0]!r} is no layer or attention processor of the denoiser")
    groups = TimeGroups(grouped(calibration.timesteps, time_groups)) if time_groups > 1 else None
    student = swap(pipe, w, a, keep={name: FLOAT for name in every if name not in names}, groups=groups)
    for _, layer in quant_layers(denoiser_of(student)):
        layer.choose_weight_range(ranges.mse)
    freeze(denoiser_of(student))
    samples = SAMPLES if groups is None else GROUP_SAMPLES
    calibrate(denoiser_of(student), calibration, ranges.mse_zero_point, samples=samples, seed=seed)
    return student


def sensitivities(pipe, calibration: CalibrationSet, evaluation: CalibrationSet, w: int, a: int) -> list[dict]:
    """Noise-prediction error with one class of layers at w and a bits, static ranges, and the rest in float.

    Returns rows {layer_class, lowered, layers, parameters, macs, errors}: `lowered` is one of LOWERED, `parameters` and
    `macs` are shares of the whole denoiser, `errors` has the relative squared error of each held-out trajectory, the
    mean over calls. The last class, "all", is every class together except the first and last layer.
    """
    by_class = parts(denoiser_of(pipe))
    by_class["all"] = [name for layer_class, names in by_class.items() if layer_class != ENDS for name in names]
    work = macs(denoiser_of(pipe), calibration.inputs(torch.tensor([0])))
    size = {
        n: sum(p.numel() for p in m.parameters()) for n, m in denoiser_of(pipe).named_modules() if hasattr(m, "weight")
    }
    whole = sum(p.numel() for p in denoiser_of(pipe).parameters())
    rows = []
    for name, names in by_class.items():
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
