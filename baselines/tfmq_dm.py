"""TFMQ-DM: the time embedding as one unit, with activation ranges for every step (Huang et al., arXiv:2311.16503).

The temporal information block is everything that depends on the timestep alone: the embedding's MLP and each residual
block's projection of it. Its only inputs are the timesteps of the sampler, a finite set. So AdaRound reconstructs it as
one unit on that set, apart from the images, and each of its activations has one range per timestep.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from baselines.adaround import Preset, RoundingRecipe, preset_of, rounding_work, uniform, uniform_rows
from baselines.method import Bits, Count, Method, Paper, Step, one_of, takes
from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.learning.calibrate import calibrate, calibrating, static_rows
from quest.learning.reconstruction import float_activations, learn_rounding, reconstruct_weights
from quest.quantization import cost, ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layer_names import Keep
from quest.quantization.layers import QuantLayer, freeze, input_quantizers, name_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups

SCOPES = ("tib", "all")
# Exceptions of the released code. Entirely in float: shortcuts, downsampling convolutions, the time embedding's first
# linear, the first and last convolution. Inputs in float: its second linear and the first block's first convolution.
RELEASED: Keep = {
    "*.conv_shortcut": 32,
    "*.downsamplers.*.conv": 32,
    "time_embedding.linear_1": 32,
    "conv_in": 32,
    "conv_out": 32,
    "time_embedding.linear_2": [2, 32],
    "down_blocks.0.resnets.0.conv1": [2, 32],
}


class TemporalInformationBlock(nn.Module):
    """The modules of a denoiser, float or quantized, that depend on the timestep alone. They are not copies.

    Raises ValueError for a transformer, and for a U-Net with another condition in its time embedding.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        config = getattr(denoiser, "config", {})
        if not hasattr(denoiser, "time_proj") or config.get("addition_embed_type") or config.get("time_cond_proj_dim"):
            kind = type(denoiser).__name__
            raise ValueError(f"a {kind}: tfmq-dm takes U-Nets whose time embedding depends on the timestep alone")
        self.positions, self.embedding = denoiser.time_proj, denoiser.time_embedding
        blocks = [(n, m) for n, m in denoiser.named_modules() if getattr(m, "time_emb_proj", None) is not None]
        self.activations = nn.ModuleList(m.nonlinearity for _, m in blocks)
        self.projections = nn.ModuleList(m.time_emb_proj for _, m in blocks)
        names = ["time_embedding.linear_1", "time_embedding.linear_2", *(f"{n}.time_emb_proj" for n, _ in blocks)]
        self.layers: dict[str, QuantLayer] = {
            n: m for n in names if isinstance(m := denoiser.get_submodule(n), QuantLayer)
        }

    def forward(self, timestep: Tensor) -> Tensor:
        """Map timestep [B] to the concatenated embeddings of all residual blocks, [B, sum of their channels]."""
        embedding = self.embedding(self.positions(timestep))
        pairs = zip(self.activations, self.projections, strict=True)
        return torch.cat([projection(activation(embedding)) for activation, projection in pairs], 1)


@dataclass(frozen=True, kw_only=True)
class Recipe(RoundingRecipe):
    init: str | None = None  # AdaRound's checkpoint, for layers outside the block; default: round the weights here
    # Activation ranges for each timestep: "tib", in the block only, or "all" (as released).
    fsc_scope: Annotated[str, one_of(SCOPES)] = "tib"
    softmax_bits: Bits = 8
    samples: Count | None = None  # random rows that set the ranges; default: static_rows, or 64 per step with "all"


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by TFMQ-DM. Returns a new pipeline.

    Activation steps are not learned. Departures from the released code: ranges outside the block come from one MSE
    search that includes zero points, not from a running average, and by default reconstruction has 1,024 rows. With
    `init`, the other layers of a residual block were reconstructed with AdaRound's projection, which the block then
    replaces.
    """
    preset = preset_of(recipe)
    groups = TimeGroups(calibration.timesteps)
    everywhere = recipe.fsc_scope == "all"
    quantizers = dict(keep=recipe.keep, softmax_bits=recipe.softmax_bits, groups=groups if everywhere else None)
    student = swap(pipe, w, a, **quantizers)
    denoiser = denoiser_of(student)
    if recipe.init is not None:
        load_weights(denoiser, recipe.init)
    block, exact = TemporalInformationBlock(denoiser), TemporalInformationBlock(denoiser_of(pipe))
    for name, layer in block.layers.items():
        layer.prologue = layer.branch = None  # those of `init` belong to its weight
        layer.weight.data.copy_(denoiser_of(pipe).get_submodule(name).weight)
    for name, layer in quant_layers(denoiser):
        if recipe.init is None or name in block.layers:
            layer.choose_weight_range(ranges.mse)
    generator = torch.Generator().manual_seed(recipe.seed)
    learned_layers = [n for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.bits < preset.nearest_from]
    timesteps = calibration.timestep.unique().flip(0)  # noisiest first, fractions too
    reconstruct(denoiser, block, exact, timesteps, learned_layers, preset, generator)
    others = [n for n in learned_layers if n not in block.layers]
    if recipe.init is None and others and preset.weight_iterations:
        drawn = uniform(calibration, recipe.rows, recipe.seed)
        reconstruct_weights(denoiser, denoiser_of(pipe), drawn, preset.rounding(generator), others)
    freeze(denoiser)
    samples = recipe.samples or (64 if everywhere else static_rows(a))
    calibrate(denoiser, calibration, ranges.mse_zero_point, samples=samples, seed=recipe.seed)
    finite_set(denoiser, block, groups, timesteps)
    return student


@torch.no_grad()
def reconstruct(
    denoiser: nn.Module,
    block: TemporalInformationBlock,
    exact: TemporalInformationBlock,
    t: Tensor,
    learned_layers: list[str],
    preset: Preset,
    generator: torch.Generator,
) -> None:
    """AdaRound of the block as one unit (arXiv:2311.16503: temporal information aware reconstruction).

    The error is that of all residual blocks' embeddings, summed over them. t: the timesteps, [N], on the block's
    device. learned_layers: names of the layers to round; the others keep their nearest codes.
    """
    layers = {n: m for n, m in block.layers.items() if n in learned_layers and m.weight_quantizer.spec.bits < FLOAT}
    if not layers or not preset.weight_iterations:
        return
    target = exact(t)
    with float_activations(input_quantizers(denoiser).values()):
        learn_rounding(
            "temporal information block",
            layers,
            lambda rows: block(t[rows]),
            lambda rows: target[rows],
            len(t),
            preset.rounding(generator),
        )
    learned = [layer.weight for layer in layers.values()]
    cost.record(denoiser, "temporal information block", learned, preset.weight_iterations, preset.batch)


@torch.no_grad()
def finite_set(denoiser: nn.Module, block: TemporalInformationBlock, groups: TimeGroups, timesteps: Tensor) -> None:
    """Set the whole range of each activation of the block at each timestep (arXiv:2311.16503: finite set calibration).

    The block's quantizers get the time groups, and the denoiser follows them from here on. timesteps: [N], one of each
    group, on the block's device.
    """
    for layer in block.layers.values():
        layer.input_quantizer = Quantizer(layer.input_quantizer.spec, groups=groups).to(layer.weight.device)
    if getattr(denoiser, "time_groups", None) is None:
        groups.attach(denoiser)
    name_quantizers(denoiser)
    with calibrating(block, ranges.minmax):
        for t in timesteps.split(1):
            with groups.inside(t):
                block(t)


def work(recipe, w: int, model, trajectories: int) -> Counter:
    preset, everywhere = preset_of(recipe), recipe.fsc_scope == "all"
    steps = rounding_work(recipe, w, uniform_rows(recipe, model, trajectories))
    steps["ranges"] += model.steps if everywhere else 1
    steps["ranges row"] += steps["ranges"] * (recipe.samples or static_rows(8))  # at 4 bits fewer
    if w < preset.nearest_from:
        steps["temporal rounding"] += preset.weight_iterations
    return steps


def round_block(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
    """The step of the block's AdaRound that is measured."""
    block, exact = (TemporalInformationBlock(unet) for unet in (student, denoiser_of(pipe)))
    for layer in block.layers.values():
        layer.thaw()
    t, generator = torch.arange(1, 1 + batch, device=student.device), torch.Generator().manual_seed(0)
    reconstruct(student, block, exact, t, list(block.layers), Preset(iterations, 0, batch), generator)


METHOD = Method(
    "tfmq-dm",
    quantize,
    about="TFMQ-DM: the time embedding reconstructed as one unit",
    work=work,
    steps={"temporal rounding": Step(round_block, ("temporal information block",), rows=16)},
    recipe={"init": "adaround"},
    paper=Paper(
        "huang2024tfmqdm",
        "2311.16503",
        "{TFMQ-DM}: Temporal Feature Maintenance Quantization for Diffusion Models",
        "Huang, Yushi and Gong, Ruihao and Liu, Jing and Chen, Tianlong and Liu, Xianglong",
        "CVPR",
        2024,
    ),
    variants={
        "tfmq-dm-as-released": dict(
            about="TFMQ-DM as its released code runs it", fixed={"keep": RELEASED, "fsc_scope": "all"}, recipe={}
        )
    },
)
