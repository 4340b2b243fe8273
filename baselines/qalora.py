"""QALoRA in QuEST's place: the same layers learn low-rank updates, not their weights (arXiv:2402.03666)."""

import torch
from torch import nn

from baselines import quest as finetune
from baselines.efficient_dm import LowRank, add_low_rank, merge
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization.layer_names import Keep
from quest.quantization.layers import QuantLayer


def quantize(
    pipe,
    calibration: CalibrationSet,
    w: int,
    a: int,
    *,
    init: str | None = None,  # checkpoint whose weights to start from; default: nearest codes of the mse range
    preset: str = "short",  # iterations, batch and learning rates: "short", "tenth" or "full", see quest.PRESETS
    time_groups: int | None = None,  # default: one for each timestep of the calibration set
    selection: str | None = None,  # layers tuned in the second stage, of selection.SELECTIONS; default: by the pipeline
    keep: Keep | None = None,  # layer glob -> bits kept at least; default: the first and last layer at 8
    softmax_bits: int = 8,
    samples: int = 32,  # random calibration rows per time group that set the activation ranges
    tla_iterations: int | None = None,  # default: the preset's
    cma_iterations: int | None = None,  # default: the preset's
    batch: int | None = None,  # rows per iteration, all of one time group; default: the preset's
    rank: int = 32,
    lr_weight: float = 1e-5,  # of both factors of an update; the preset multiplies it
    lr_scale: float = 1e-4,  # of the logarithm of the scale; the preset multiplies it
    global_weight: float | None = None,  # of L_G; default: the number of tuned layers
    seed: int = 0,
):
    """Quantize and finetune by QuEST's two stages with updates of rank 32 (QALoRA, arXiv:2310.03270). A new pipeline.

    Losses, stages, layers, activation scales and schedules are QuEST's; only what a stage learns of its layers differs.
    As there, biases learn and weight scales stay; EfficientDM, where QALoRA comes from, learns weight scales too.
    """
    updates: dict[str, tuple[QuantLayer, LowRank]] = {}

    def low_rank(_denoiser: nn.Module, tuned: dict[str, QuantLayer]) -> dict[str, list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(seed)
        updates.update({n: (layer, add_low_rank(layer, rank, generator)) for n, layer in tuned.items()})
        return {
            n: [*updates[n][1].parameters(), *([] if layer.bias is None else [layer.bias])]
            for n, layer in tuned.items()
        }

    student = finetune.learning(
        low_rank,
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
    for layer, _ in updates.values():
        merge(layer)
    return student
