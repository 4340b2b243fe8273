"""Finetuning of everything: what QuEST's selection of layers is compared with (arXiv:2402.03666, Table 8)."""

from torch import nn

from baselines import quest
from baselines.method import Method, Step, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization.layers import QuantLayer, quant_layers


@takes(quest.FinetuneRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: quest.FinetuneRecipe):
    """Quantize and finetune all weights and biases. Returns a new pipeline.

    Losses, stages and schedules are QuEST's: the same layers are aligned in the same order, and a stage learns the same
    activation scales; but both learn the weights of every layer. The paper's table says no more than that all weights
    are trained for as many iterations. The learning rates are QuEST's and have not been searched for this method.
    """
    return quest.finetuned(pipe, calibration, w, a, recipe, everything)


def everything(denoiser: nn.Module, _tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """Weights and biases of all layers."""
    return quest.weights_and_biases(denoiser, dict(quant_layers(denoiser)))


def finetune_all(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
    """Full finetuning, to be measured."""
    still = dict(lr_weight=0.0, lr_scale=0.0, selection=model.selection)
    own = quest.FinetuneRecipe(tla_iterations=0, cma_iterations=iterations, batch=batch, **still)
    quest.finetune(student, pipe.unet, calibration, quest.settled(own, pipe, 8), everything)


METHOD = Method(
    "full-finetune",
    quantize,
    about="QuEST's losses and schedule, learning all weights",
    work=quest.work_of("full finetuning row", "full finetuning"),
    steps={"full finetuning": Step(finetune_all, quest.STAGES)},
    recipe={"init": "adaround"},
    paper=quest.METHOD.paper,
)
