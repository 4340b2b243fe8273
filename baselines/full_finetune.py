"""Finetuning of all weights, with which QuEST compares its selection of layers (arXiv:2402.03666, Table 8)."""

from torch import nn

from baselines import quest
from baselines.method import Method, Step, takes
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import denoiser_of
from quest.quantization.layers import QuantLayer, quant_layers


@takes(quest.FinetuneRecipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: quest.FinetuneRecipe):
    """Quantize and finetune all weights and biases. Returns a new pipeline.

    Losses, stages, activation scales and schedules are QuEST's, but both stages learn the weights of every layer. The
    paper only states that all weights are trained for as many iterations. The learning rates are QuEST's, without a
    search for this method.
    """
    return quest.quantize_and_finetune(pipe, calibration, w, a, recipe, everything)


def everything(denoiser: nn.Module, _tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """Layer name -> weight and bias, of all layers."""
    return quest.weights_and_biases(denoiser, dict(quant_layers(denoiser)))


def finetune_all(student, pipe, calibration: CalibrationSet, model, iterations: int, batch: int) -> None:
    """The step of full finetuning that is measured."""
    no_learning = dict(lr_weight=0.0, lr_scale=0.0, selection=model.selection)
    recipe = quest.FinetuneRecipe(tla_iterations=0, cma_iterations=iterations, batch=batch, **no_learning)
    quest.finetune(student, denoiser_of(pipe), calibration, quest.resolve(recipe, pipe, 8), everything)


METHOD = Method(
    "full-finetune",
    quantize,
    about="QuEST's losses and schedule, learning all weights",
    work=quest.work_of("full finetuning", "full finetuning"),
    steps={"full finetuning": Step(finetune_all, quest.STAGES)},
    recipe={"init": "adaround"},
    paper=quest.METHOD.paper,
)
