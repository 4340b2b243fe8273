"""Hadamard rotations of input channels: outliers are spread over a block (QuaRot, arXiv:2404.00456).

    double   y = Q(x H) Q(W H)^T     the weight is rotated before it is quantized (QuaRot; ConvRot, arXiv:2512.03673)
    single   y = Q(x H) (Q(W) H)^T   the weight is quantized in its own basis (HQ-DM, arXiv:2512.05746)

H consists of blocks along the channels, the same for every pixel and tap, so that zero padding stays zero. Rotating
costs log2(block) additions per channel of a pixel. Rotated codes of a weight are whole numbers over sqrt(block), so
that integers could compute the single form too, in products of wider codes; no kernel here does. The output of a SiLU
is never below -0.28. Rotated, it is nearly symmetric; a symmetric range then wastes no codes.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from baselines.granularity import Granularity, ranges_work, set_ranges, swapped
from baselines.method import Method, Paper, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.quantization import ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import quant_layers
from quest.quantization.prologue import FORMS, block_size

WEIGHTS = ("mse", "absmax")


@dataclass(frozen=True, kw_only=True)
class Recipe(Granularity):
    init: str | None = None  # checkpoint to start from; factors of its channels (smoothquant) come before the rotation
    form: Annotated[str, one_of(FORMS)] = "regular"  # ConvRot's, whose rows have a sum of 1, or Sylvester's
    single: bool = False  # rotate weights after they are quantized
    # Channels that are rotated together, or the next smaller size that divides a layer's; default: the largest size.
    block: Annotated[int, one_of((1, 4, 8, 16, 32, 64))] | None = None
    # Ranges of weights: of least error, or symmetric up to the largest value with codes -7 to 7 at 4 bits (ConvRot).
    weights: Annotated[str, one_of(WEIGHTS)] = "mse"


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Rotate the input channels of every layer, then round to nearest. Returns a new pipeline.

    Departures from the papers, which rotate linear layers of transformers: convolutions too, by pixel; blocks of at
    most 64 channels (ConvRot: 256, with inputs padded by zeros), because 256 divides few widths of U-Nets. A layer
    whose channels no block divides is not rotated (an input of three channels), nor is a grouped convolution. Attention
    products are not rotated. HQ-DM also finetunes, and leaves tokens unrotated.
    """
    student = swapped(pipe, calibration, w, a, recipe)
    denoiser = denoiser_of(student)
    if recipe.init is not None:
        load_weights(denoiser, recipe.init)
    for _, layer in quant_layers(denoiser):
        size = block_size(layer.weight_shape[1], recipe.block, recipe.form)
        if size > 1 and layer.input_quantizer.spec.bits < FLOAT and layer.groups == 1:
            layer.rotate_input(size, recipe.form, recipe.single)
        spec = layer.weight_quantizer.spec
        if recipe.weights == "absmax" and spec.bits < FLOAT:
            layer.weight_quantizer.spec = replace(spec, symmetric=True)
        layer.choose_weight_range(ranges.minmax if recipe.weights == "absmax" else ranges.mse)
    set_ranges(denoiser, calibration, a, recipe)
    return student


METHOD = Method(
    "hadamard",
    quantize,
    about="input channels and weights rotated in blocks of 64, 16 or 4; rounded to nearest",
    work=ranges_work,
    paper=Paper(
        "ashkboos2024quarot",
        "2404.00456",
        "{QuaRot}: Outlier-Free 4-Bit Inference in Rotated {LLMs}",
        "Ashkboos, Saleh and Mohtashami, Amirkeivan and Croci, Maximilian L. and Li, Bo and Cameron, Pashmina and "
        "Jaggi, Martin and Alistarh, Dan and Hoefler, Torsten and Hensman, James",
        "NeurIPS",
        2024,
    ),
    variants={
        "convrot": dict(
            about="ConvRot: rotated by regular Hadamard matrices, whole symmetric ranges, dynamic for each token",
            fixed={"form": "regular", "single": False, "dynamic": "token", "levels": "symmetric", "weights": "absmax"},
            paper=Paper(
                "huang2025convrot",
                "2512.03673",
                "{ConvRot}: Rotation-Based Plug-and-Play 4-bit Quantization for Diffusion Transformers",
                "Huang, Feice and Han, Zuliang and Zhou, Xing and Chen, Yihuang and Zhu, Lifei and Wang, Haoqian",
                "arXiv",
                2025,
            ),
        ),
        "hadamard-single": dict(
            about="HQ-DM without its finetuning: rotated inputs, weights quantized as they are, ranges for each step",
            fixed={"form": "sylvester", "single": True, "block": 32, "levels": "symmetric", "per_step": True},
            paper=Paper(
                "mao2025hqdm",
                "2512.05746",
                "{HQ-DM}: Single {Hadamard} Transformation-Based Quantization-Aware Training for Low-Bit Diffusion "
                "Models",
                "Mao, Shizhuo and Zou, Hongtao and Xie, Qihu and Chen, Song and Kang, Yi",
                "arXiv",
                2025,
            ),
        ),
    },
)
