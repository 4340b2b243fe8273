"""The models that ship, with their own weights: quantized, exported, and how far off a contender's predictions are.

What several contenders need is a file in one folder, because each rival runs in a process of its own.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

import quest
from baselines import METHODS
from quest import export
from quest.config import parse_bits
from quest.diffusion.calibration_set import CalibrationSet, collect
from quest.diffusion.models import MODELS
from quest.metrics.noise_prediction import eps_error

METHOD = "rtn-mse"  # no learning, one scale per tensor, any bits: it can be exported and takes seconds


@lru_cache(1)
def pipeline(name: str):
    """The full-precision pipeline of a model that ships."""
    return MODELS[name].load()


def trajectories(name: str, split: str, folder: Path) -> CalibrationSet:
    """Full-precision trajectories of one sampling batch of a split."""
    path = folder / f"{name}-{split}.safetensors"
    if not path.exists():
        collect(pipeline(name), MODELS[name], split, MODELS[name].batch_size).save(path)
    return CalibrationSet.load(path)


def quantized(name: str, bits: str, kernel: str, folder: Path):
    """The pipeline quantized by METHOD, on a kernel."""
    path = folder / f"{name}-{bits}.safetensors"
    if not path.exists():
        recipe = MODELS[name].recipe(METHODS[METHOD].quantize, parse_bits(bits)[1])
        calibration = trajectories(name, "calibration", folder)
        quest.save(quest.quantize(pipeline(name), METHOD, bits, calibration=calibration, **recipe), path)
    return quest.load(pipeline(name), path, kernel)


def exported(name: str, bits: str, folder: Path) -> Path:
    """The ONNX file of the quantized denoiser."""
    path = folder / f"{name}-{bits}.onnx"
    if not path.exists():
        export.export(quantized(name, bits, "reference", folder), path)
    return path


def inputs(name: str, batch: int, folder: Path) -> dict[str, Tensor]:
    """Arguments of a denoiser call halfway through held-out trajectories."""
    held_out = trajectories(name, "evaluation", folder)
    return held_out.inputs(held_out.rows_of_call(held_out.call.max() // 2)[:batch])


def error(name: str, step: Callable, folder: Path) -> float:
    """The relative squared error of a step's noise prediction against full precision, over held-out trajectories.

    step(**arguments) takes a sampling batch and returns an object with `sample`.
    """
    errors, _ = eps_error(SimpleNamespace(unet=step), trajectories(name, "evaluation", folder))
    return errors.mean().item()
