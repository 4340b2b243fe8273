"""Finetuning of everything: what QuEST's selection of layers is compared with (arXiv:2402.03666, Table 8)."""

from torch import nn

from baselines import quest as finetune
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization.layer_names import Keep
from quest.quantization.layers import QuantLayer, quant_layers


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # checkpoint whose weights to start from; default: nearest codes of the mse range
    preset: str = "short",  # iterations, batch and learning rates: "short", "tenth" or "full", see quest.PRESETS
    time_groups: int | None = None,  # default: one for each timestep of the calibration set
    selection: str | None = None,  # layers aligned in the critical stage, of selection.SELECTIONS; default: by the pipe
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    samples: int = 32,  # random calibration rows per time group that set the activation ranges
    tla_iterations: int | None = None,  # default: the preset's
    cma_iterations: int | None = None,  # default: the preset's
    batch: int | None = None,  # rows per iteration, all of one time group; default: the preset's
    lr_weight: float = 1e-5,  # the preset multiplies it
    lr_scale: float = 1e-4,  # of the logarithm of the scale; the preset multiplies it
    global_weight: float | None = None,  # of L_G; default: the number of aligned layers
    seed: int = 0,
):
    """Quantize and finetune all weights and biases. Returns a new pipeline.

    Losses, stages and schedules are QuEST's: the same layers are aligned in the same order, and a stage learns the same
    activation scales; but both learn the weights of every layer. The paper's table says no more than that all weights
    are trained for as many iterations. The learning rates are QuEST's and have not been searched for this method.
    """
    return finetune.learning(
        everything,
        pipe,
        calibration,
        w,
        a,
        init=init,
        preset=preset,
        time_groups=time_groups,
        selection=selection,
        keep=keep,
        softmax_bits=softmax_bits,
        samples=samples,
        tla_iterations=tla_iterations,
        cma_iterations=cma_iterations,
        batch=batch,
        lr_weight=lr_weight,
        lr_scale=lr_scale,
        global_weight=global_weight,
        seed=seed,
    )


def everything(denoiser: nn.Module, _tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
    """Weights and biases of all layers."""
    return finetune.weights_and_biases(denoiser, dict(quant_layers(denoiser)))
