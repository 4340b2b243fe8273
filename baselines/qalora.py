"""QALoRA in QuEST's place: the same layers learn low-rank updates, not their weights (arXiv:2402.03666)."""

from dataclasses import dataclass

import torch
from torch import nn

from baselines import quest
from baselines.efficient_dm import LowRank, add_low_rank, merge
from baselines.method import Count, Method, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization.layers import QuantLayer


@dataclass(frozen=True, kw_only=True)
class Recipe(quest.FinetuneRecipe):
    """lr_weight is that of both factors of an update."""

    rank: Count = 32


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize and finetune by QuEST's two stages with updates of rank 32 (QALoRA, arXiv:2310.03270). A new pipeline.

    Losses, stages, layers, activation scales and schedules are QuEST's; only what a stage learns of its layers differs.
    As there, biases learn and weight scales stay; EfficientDM, where QALoRA comes from, learns weight scales too.
    """
    updates: dict[str, tuple[QuantLayer, LowRank]] = {}

    def low_rank(_denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(recipe.seed)
        updates.update({n: (layer, add_low_rank(layer, recipe.rank, generator)) for n, layer in tuned.items()})
        return {
            n: [*updates[n][1].parameters(), *([] if layer.bias is None else [layer.bias])]
            for n, layer in tuned.items()
        }

    student = quest.finetuned(pipe, calibration, w, a, recipe, low_rank)
    for layer, _ in updates.values():
        merge(layer)
    return student


METHOD = Method(
    "qalora",
    quantize,
    about="QuEST's losses and schedule, learning low-rank updates",
    work=quest.METHOD.work,
    recipe={"init": "adaround"},
    paper=quest.METHOD.paper,
)
