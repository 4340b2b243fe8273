"""PTQD: corrects the error of a quantized denoiser while sampling (He et al., arXiv:2305.10657).

1. Feed full-precision trajectories to both denoisers and compare the guided predictions e (full precision) and e~
   (quantized), timestep by timestep.
2. Fit e~ - e = k e + bias + noise: a correlated part, a mean per channel, and noise of standard deviation sigma.
3. Sample with (e~ - bias) / (1 + k), and inject less noise, by the noise that the quantized denoiser adds already
   (`quest.diffusion.samplers`).

DDIM with eta > 0 gets all three corrections. DDIM with eta = 0 and PLMS inject no noise, so they only get those of mean
and correlation. The paper's mixed precision over the steps is left out: a row has one pair of bits.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from baselines.adaround import uniform, uniform_rows
from baselines.method import Guidance, Method, Paper, one_of, takes
from baselines.q_diffusion import ReconstructionRecipe, common_stack, stack_work
from quest.diffusion.calibration_set import CalibrationSet, guide
from quest.diffusion.denoisers import denoiser_of
from quest.diffusion.samplers import Correction, check_correctable, correct
from quest.quantization.layer_names import Keep
from quest.quantization.layers import freeze

BIASES = ("residual", "error")
# Exceptions of the released code: shortcuts, downsampling convolutions and attention products in float; the first
# linear of the time embedding and the first and last convolution at 8 bits.
RELEASED: Keep = {
    "*.conv_shortcut": 32,
    "*.downsamplers.*.conv": 32,
    "*.processor": 32,
    "time_embedding.linear_1": 8,
    "conv_in": 8,
    "conv_out": 8,
}


@dataclass(frozen=True, kw_only=True)
class Recipe(ReconstructionRecipe):
    """`rows` counts the rows of reconstruction; the statistics use the whole calibration set."""

    guidance: Guidance | None = None  # guidance scale of the sampler; None without guidance
    bias_of: Annotated[str, one_of(BIASES)] = "residual"  # see `statistics`


@takes(Recipe)
def quantize(pipe, calibration: CalibrationSet, w: int, a: int, recipe: Recipe):
    """Quantize by Q-Diffusion's stack, then correct the sampler by PTQD. Returns a new pipeline with its own scheduler.

    The statistics hold for the sampler, the number of steps and the guidance scale of the calibration trajectories.
    Departures from the released code: the statistics come from the calibration trajectories, not from 1,024 new
    samples. With eta > 0 only the injected noise shrinks, as in the paper; the released code also recomputes the
    direction to x_t with the smaller sigma. The departures of Q-Diffusion's stack apply too (baselines.q_diffusion).
    Prints R^2 of the fit: a low one means that the correlation explains little of the error.
    Raises ValueError for a sampler that is neither DDIM nor PLMS.
    """
    check_correctable(pipe.scheduler)
    student = common_stack(pipe, calibration, uniform(calibration, recipe.rows, recipe.seed), w, a, recipe)
    freeze(denoiser_of(student))
    correction = statistics(denoiser_of(student), calibration, recipe.guidance, recipe.bias_of)
    r_squared = correction.r_squared
    print(
        f"error explained by the prediction, R^2: median {r_squared.median():.3f}, "
        f"from {r_squared.min():.3f} to {r_squared.max():.3f} over {len(r_squared)} timesteps",
        flush=True,
    )
    student.scheduler = correct(student.scheduler, correction)
    return student


@torch.no_grad()
def statistics(
    denoiser: nn.Module, calibration: CalibrationSet, guidance: float | None, bias_of: str = "residual", batch: int = 64
) -> Correction:
    """Error statistics of a quantized denoiser on full-precision trajectories, for every timestep (arXiv:2305.10657).

    guidance: the scale that combines the two halves of a call; None where a call has no halves.
    bias_of: "residual" is the mean of e~ - e - k e, as in the paper, which removes the whole mean error. "error" is the
    mean of e~ - e, as in the released code, which counts k times the mean of e twice.
    batch: denoiser rows per forward pass. Timesteps that a sampler visits twice (PLMS) share their statistics.
    Raises FloatingPointError where the quantized denoiser predicts NaN or infinite values.
    """
    if bias_of not in BIASES:
        raise ValueError(f"bias_of: {bias_of!r} is not one of {', '.join(BIASES)}")
    calls, channels = calibration.calls(), calibration.sample.shape[1]  # without the variances that some predict
    timestep = calibration.timestep[calls[:, 0]]
    measured = []
    for t in calibration.timesteps:
        rows = calls[timestep == t]  # [n, halves]
        exact, quantized = [], []
        for part in rows.split(max(1, batch // rows.shape[1])):
            prediction = denoiser(**calibration.inputs(part.flatten())).sample
            quantized.append(guide(prediction.unflatten(0, part.shape), guidance)[:, :channels])
            exact.append(guide(calibration.target[part], guidance)[:, :channels])
        measured.append(fit(torch.cat(exact), torch.cat(quantized), bias_of))
        if not all(v.isfinite().all() for v in measured[-1]):
            raise FloatingPointError(f"statistics of timestep {t}: the quantized denoiser's error is not finite")
    return Correction(
        torch.tensor(calibration.timesteps, dtype=torch.long, device="cpu"),
        *(torch.stack(v) for v in zip(*measured, strict=True)),
    )


def fit(exact: Tensor, quantized: Tensor, bias_of: str = "residual") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope k [] (at least 0), bias [C], standard deviation [] and R^2 [] of the error, from [n, C, h, w]."""
    error = quantized - exact
    centred = exact - exact.mean()
    variance = centred.square().mean()
    covariance = (centred * error).mean()
    slope = (covariance / variance).clamp(min=0)
    residual = error - slope * exact
    bias = (residual if bias_of == "residual" else error).mean((0, 2, 3))
    std = residual.flatten(1).std(1).mean()
    spread = (error - error.mean()).square().mean()
    return slope, bias, std, 1 - (residual - residual.mean()).square().mean() / spread.clamp(min=1e-20)


def work(recipe, w: int, model, trajectories: int) -> Counter:
    statistics = Counter({"quantized call": trajectories * model.calls * model.halves})
    return stack_work(recipe, w, uniform_rows(recipe, model, trajectories)) + statistics


METHOD = Method(
    "ptqd",
    quantize,
    about="PTQD: corrects the quantization error while sampling",
    work=work,
    fixed={"time_groups": 1},
    recipe={"init": "adaround"},
    paper=Paper(
        "he2023ptqd",
        "2305.10657",
        "{PTQD}: Accurate Post-Training Quantization for Diffusion Models",
        "He, Yefei and Liu, Luping and Liu, Jing and Wu, Weijia and Zhou, Hong and Zhuang, Bohan",
        "NeurIPS",
        2023,
    ),
    variants={
        "ptqd-as-released": dict(
            about="PTQD as its released code runs it",
            fixed={
                "keep": RELEASED,
                "weight_axis": None,
                "bias_of": "error",
                "split": False,
                "activation_ranges": "mse",
                "time_groups": 1,
            },
            recipe={},
        )
    },
)
