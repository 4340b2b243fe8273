"""Round to nearest: no reconstruction, no finetuning, no time groups."""

from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.calibrate import calibrate, static_rows
from quest.quantization import ranges as choosers
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap

WHOLE = 256  # rows that stand for the whole calibration set
RANGES = {  # of weights (per output channel) and of activations (per tensor)
    "minmax": (choosers.minmax, choosers.minmax),
    **{name: (choosers.mse, search) for name, search in choosers.SEARCHED.items()},
}


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init=None,  # nothing to start from: must stay None
    ranges: str = "minmax",  # of RANGES
    keep: dict[str, int] | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    samples: int
    | None = None,  # random rows of all timesteps that set the ranges; default: WHOLE, searched: static_rows
    seed: int = 0,
):
    """Quantize weights and activations to the nearest code of static ranges.

    "minmax" takes whole ranges; "mse" the shrunk range of least |x - x~|^2.4 (Q-Diffusion, arXiv:2302.04304), and
    "mse-zero-point" searches the zero points of activations too. Static: one activation range per tensor for all
    timesteps.
    """
    if init is not None:
        raise ValueError("init: round to nearest starts from the full-precision weights")
    if ranges not in RANGES:
        raise ValueError(f"ranges: {ranges!r} is not one of {', '.join(RANGES)}")
    of_weights, of_activations = RANGES[ranges]
    pipe = swap(pipe, w, a, keep=keep, softmax_bits=softmax_bits)
    for _, layer in quant_layers(pipe.unet):
        layer.choose_weight_range(of_weights)
    samples = samples or (WHOLE if ranges == "minmax" else static_rows(a))
    calibrate(pipe.unet, calibration, of_activations, samples=samples, seed=seed)
    return pipe
