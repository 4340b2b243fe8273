"""SVDQuant: smoothing, and a low-rank branch in 16 bits that takes the outliers of each weight (Li et al., 2411.05007).

The search of factors and branches is in `quest.learning.lowrank`. Branches take memory and work, so a row is compared
with others of equal size:

    rank: 0, weight_group: 16    the bits are spent on finer scales of weights
    branch: channels             whole input channels stay in 16 bits, as many as take the memory of the branches
    bits: w5a4, rank: 0          one more bit for every weight
"""

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Annotated

from baselines.adaround import uniform, uniform_rows
from baselines.granularity import Granularity, ranges_work, set_ranges, swapped
from baselines.method import Count, Method, Paper, Valid, one_of, takes
from quest.affine import FLOAT, ROWS
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.lowrank import BRANCHLESS, decompose
from quest.quantization import ranges
from quest.quantization.layers import quant_layers


@dataclass(frozen=True, kw_only=True)
class Recipe(Granularity):
    """How each weight is taken apart."""

    dynamic: Annotated[str, one_of((*ROWS, "static"))] = "token"  # what has dynamic scales; "static": calibrated ranges
    rank: Annotated[int, Valid(minimum=0, description="0: no branch")] | None = None  # default: `lowrank.rank_of`
    branch: Annotated[str, one_of(("low-rank", "channels"))] = "low-rank"
    # Input channels of one tap that share a weight scale, signed codes as released; default: see `quantize`.
    weight_group: Annotated[int, one_of((64, 32, 16))] | None = None
    iterations: Count = 100  # most alternations of branch and codes; they end when the error rises
    grid: Count = 20  # exponents of the smoothing are i / grid; 1: no smoothing
    rounding: Annotated[str, one_of(("nearest", "gptq"))] = "nearest"  # of what the branch leaves
    rows: Count = 64  # of the calibration set, on which all this is searched, evenly from 20 sampler calls


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by SVDQuant, convolutions too. Returns a new pipeline.

    Departures from the released code, which leaves residual blocks, resampling and time embeddings as they are:
    - Every layer below 8 bits has factors and a branch. A convolution's weight is taken apart as [O, C kh kw], and its
      branch is a k x k convolution to r channels and a 1 x 1 convolution.
    - Ranks fit the layers (`lowrank.rank_of`), where the released one is 32 for all. Each of q, k and v has factors and
      a branch of its own.
    - Weights have one scale per output channel and a zero point, of least error, unless `weight_group` is set
      (released: absmax, groups of 64).
    - Dynamic activations have a scale for each token unless `group` is set (released: 64 channels), and zero points
      (released: signed, or unsigned after a shift). Products are quantized.
    Raises FloatingPointError for inputs that are not finite.
    """
    recipe = replace(recipe, dynamic=None) if recipe.dynamic == "static" else recipe
    student = swapped(pipe, calibration, w, a, recipe)
    denoiser = denoiser_of(student)
    layers = {n: m for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.bits < FLOAT}
    for layer in layers.values():
        spec = layer.weight_quantizer.spec
        if recipe.weight_group is not None and spec.bits < BRANCHLESS:
            layer.weight_quantizer.spec = replace(spec, symmetric=True, group=recipe.weight_group)
            layer.choose_weight_range()
    decompose(
        denoiser,
        layers,
        uniform(calibration, recipe.rows, recipe.seed),
        iterations=recipe.iterations,
        grid=recipe.grid,
        rank=recipe.rank,
        channels=recipe.branch == "channels",
        gptq=recipe.rounding == "gptq",
        choose=ranges.mse_zero_point,
    )
    set_ranges(denoiser, calibration, a, recipe)
    return student


def work(recipe, w: int, model, trajectories: int) -> Counter:
    drawn = uniform_rows(recipe, model, trajectories)
    candidates = 2 * recipe.grid - 1
    # In the words of `Granularity`.
    own = SimpleNamespace(**vars(recipe) | {"dynamic": None if recipe.dynamic == "static" else recipe.dynamic})
    counted = ranges_work(own, w, model, trajectories)
    del counted["weight ranges"]
    return counted + Counter({"svdquant": candidates, "svdquant row": candidates * drawn})


METHOD = Method(
    "svdquant",
    quantize,
    about="SVDQuant: smoothing and low-rank branches in 16 bits; dynamic activations",
    work=work,
    paper=Paper(
        "li2025svdquant",
        "2411.05007",
        "{SVDQuant}: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models",
        "Li, Muyang and Lin, Yujun and Zhang, Zhekai and Cai, Tianle and Li, Xiuyu and Guo,"
        " Junxian and Xie, Enze and"
        " Meng, Chenlin and Zhu, Jun-Yan and Han, Song",
        "ICLR",
        2025,
    ),
)
