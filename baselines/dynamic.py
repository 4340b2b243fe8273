"""Dynamic activations: scales from each tensor itself, for each sample or token and in groups of channels.

Kernels for language models do this, and the naive rows of SVDQuant (arXiv:2411.05007); here it is done for convolutions
and attention products too. A token of a convolution is a pixel of its input, over all channels, and a group is some
channels of one pixel. The integer kernel for CPUs computes layers by sample, token or group of a token, and attention
products by token. `quest.quantization.overhead` counts what a kernel pays beside products.
"""

from dataclasses import dataclass
from typing import Annotated

from baselines.granularity import Dynamic, ranges_work, set_ranges, swapped
from baselines.method import Method, one_of, takes
from quest.affine import ROWS
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.quantization import ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import quant_layers


@dataclass(frozen=True, kw_only=True)
class Recipe(Dynamic):
    """Weights are those of `rtn-mse`, so that the two methods differ in their activations alone, or those of `init`."""

    init: str | None = None  # checkpoint whose weights to take, such as that of adaround
    dynamic: Annotated[str, one_of(ROWS)] = "token"


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Round weights to nearest with ranges of least error, and take activation scales from each tensor.

    Calibration rows are used by clip="searched" alone. Returns a new pipeline.
    """
    student = swapped(pipe, calibration, w, a, recipe)
    if recipe.init is not None:
        load_weights(denoiser_of(student), recipe.init)
    else:
        for _, layer in quant_layers(denoiser_of(student)):
            layer.choose_weight_range(ranges.mse)
    set_ranges(denoiser_of(student), calibration, a, recipe)
    return student


METHOD = Method(
    "dynamic",
    quantize,
    about="round to nearest; activations take their scales from each token (or sample, or group of channels)",
    work=ranges_work,
)
