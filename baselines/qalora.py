"""QuEST with QALoRA: the selected layers learn low-rank updates and not their weights (arXiv:2402.03666)."""

from dataclasses import dataclass

import torch
from torch import nn

from baselines import quest
from baselines.efficient_dm import add_low_rank
from baselines.method import Count, Method, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization.layers import QuantLayer


@dataclass(frozen=True, kw_only=True)
class Recipe(quest.FinetuneRecipe):
    """QuEST's keywords. lr_weight is the rate of both factors of an update."""

    rank: Count = 32


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize and finetune in QuEST's two stages by low-rank updates (QALoRA, arXiv:2310.03270).

    Losses, stages, layers, activation scales and schedules are QuEST's. Biases are learned and weight scales are fixed,
    as in QuEST; EfficientDM, where QALoRA comes from, learns weight scales too. Returns a new pipeline.
    """

    def low_rank(_denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(recipe.seed)
        updates = {n: add_low_rank(layer, recipe.rank, generator) for n, layer in tuned.items()}
        return {n: [*u.parameters(), *([] if tuned[n].bias is None else [tuned[n].bias])] for n, u in updates.items()}

    return quest.quantize_and_finetune(pipe, calibration, w, a, recipe, low_rank)


METHOD = Method(
    "qalora",
    quantize,
    about="QuEST's losses and schedule, learning low-rank updates",
    work=quest.METHOD.work,
    recipe={"init": "adaround"},
    paper=quest.METHOD.paper,
)
