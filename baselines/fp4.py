"""Four-bit floats: E2M1 per tensor with a zero point, and in blocks as NVFP4 and MXFP4. Simulated: no kernel has them.

    blocks    weights                             activations                          scales
    none      E2M1, per output channel            E2M1 or unsigned E2M2, per tensor    of least error
    nvfp4     E2M1, 16 in-channels of one tap     E2M1, 16 channels of a position      E4M3, times one float
    mxfp4     E2M1, 32 in-channels of one tap     E2M1, 32 channels of a position      powers of two
    int4      -7 to 7, otherwise as nvfp4         -7 to 7, otherwise as nvfp4          as nvfp4: the control

After a SiLU nearly all of a tensor is positive. Without blocks each activation has the signed format, or the unsigned
one with a zero point, whichever has less error. This is the idea of MSFP (arXiv:2505.21591) without its finetuning; its
code is not released and its grids are not stated, so candidates are those of the searches in
`quest.quantization.ranges`.
NVFP4's activation factor is of each sample, so that results do not depend on the batch. MXFP4 is OCP's
(arXiv:2310.10537).
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from torch import Tensor, nn

from baselines.method import Bits, Count, Method, Seed, one_of, takes
from quest.affine import QParams, QuantSpec, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate, static_rows
from quest.quantization import ranges
from quest.quantization.layer_names import Keep
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import summed_axes, swap

WIDTH = 4  # bits of what becomes a small float
TABLES = {"e2m1": "e2m2", "e1m2": "e1m3", "e3m0": "e3m1"}  # signed table -> unsigned one; e1m2 and e1m3 are INT4
ZERO_POINTS = {  # of unsigned codes; None: only signed ones
    "free": ranges.mse_free,
    "rounded": ranges.mse_zero_point,
    "none": None,
}
BLOCKS = {"nvfp4": ("e2m1", 16, "e4m3"), "mxfp4": ("e2m1", 32, "e8m0"), "int4": (None, 16, "e4m3")}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which format 4-bit tensors have."""

    blocks: Annotated[str, one_of(BLOCKS)] | None = None  # default: one scale per output channel, and per activation
    # Without blocks: the table, or for each activation the one of least error ("any", weights then have e2m1).
    table: Annotated[str, one_of((*TABLES, "any"))] = "e2m1"
    zero_point: Annotated[str, one_of(ZERO_POINTS)] = "free"  # of activations without blocks
    saturate: bool = True  # of mxfp4: OCP's rule; False: the next power of two, which reaches the largest value
    keep: Keep | None = None  # layer glob -> minimum bits; default: the first and last layer at 8
    softmax_bits: Bits = 8
    samples: Count | None = None  # rows that set static ranges; default: static_rows
    seed: Seed = 0


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize 4-bit weights and activations to small floats; tensors of other bits are those of `rtn-mse`.

    Probabilities stay unsigned whole numbers of `softmax_bits`. Returns a new pipeline.
    """
    student = swap(pipe, w, a, keep=recipe.keep, softmax_bits=recipe.softmax_bits)
    denoiser = denoiser_of(student)
    for _, layer in quant_layers(denoiser):
        if layer.weight_quantizer.spec.bits == WIDTH:
            layer.weight_quantizer.spec = weight_format(recipe)
        layer.choose_weight_range(ranges.mse)
    set_activations(denoiser, calibration, recipe.samples or static_rows(a), recipe)
    return student


def weight_format(recipe: Recipe) -> QuantSpec:
    """The format of a 4-bit weight."""
    if recipe.blocks is None:
        return QuantSpec(WIDTH, symmetric=True, axis=0, table="e2m1" if recipe.table == "any" else recipe.table)
    return QuantSpec(WIDTH, symmetric=True, axis=0, **block_format(recipe))


def block_format(recipe: Recipe) -> dict:
    """What the formats of weights and of activations in blocks have in common."""
    table, group, scale = BLOCKS[recipe.blocks]
    scale = scale if recipe.saturate or scale == "e4m3" else "e8m0-up"
    return {"group": group, "table": table, "block_scale": scale}


def set_activations(denoiser: nn.Module, calibration: CalibrationSet, samples: int, recipe: Recipe) -> None:
    """Give 4-bit activations their format, and set all static ranges from one forward pass on random rows."""
    axes = summed_axes(denoiser)
    floats = {
        name: q
        for name, q in input_quantizers(denoiser).items()
        if q.spec.bits == WIDTH and not name.endswith("processor.p")
    }
    if recipe.blocks is not None:
        for name, q in floats.items():
            q.make_dynamic(QuantSpec(WIDTH, True, axes[name], rows="token", **block_format(recipe)))
    own = {name: partial(least_error, q, recipe) for name, q in floats.items()}
    calibrate(denoiser, calibration, ranges.mse_zero_point, samples=samples, seed=recipe.seed, choosers=own)


def least_error(quantizer: Quantizer, recipe: Recipe, x: Tensor, _spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Give a quantizer the table, the sign and the range with the least mean squared error on x."""
    signed = list(TABLES) if recipe.table == "any" else [recipe.table]
    candidates = [(QuantSpec(WIDTH, symmetric=True, table=table), ranges.mse) for table in signed]
    if search := ZERO_POINTS[recipe.zero_point]:
        candidates += [(QuantSpec(WIDTH, table=TABLES[table]), search) for table in signed]
    found = []
    for spec, choose in candidates:
        qparams = QParams(*choose(x, spec, power=2.0), spec)
        found.append(((fake_quantize(x, qparams) - x).square().mean().item(), qparams))
    scale, zero_point, quantizer.spec = min(found, key=lambda one: one[0])[1]
    return scale, zero_point


def work(recipe, w: int, model, trajectories: int) -> Counter:
    rows = recipe.samples or static_rows(8)  # at 4 bits fewer
    return Counter({"weight ranges": 1, "ranges": 1, "ranges row": rows})


METHOD = Method(
    "fp4",
    quantize,
    about="4-bit floats: per tensor, unsigned with a zero point where that is better, or as NVFP4 or MXFP4 (`blocks`)",
    work=work,
    bits=("w4a8", "w4a4"),
)
