"""Quantize, save and load diffusers pipelines by QuEST (arXiv:2402.03666) and its rivals. Imports nothing heavy."""

from quest.quantization import registry

registry.register()


def quantize(pipe, method="quest-suite", bits: str = "w4a8", *, calibration=None, **recipe):
    """Quantize the denoiser of a diffusers pipeline. Returns a new pipeline and does not change `pipe`.

    Args:
        pipe: a full-precision pipeline with a `unet` or `transformer`, in float32.
        method: a name in `baselines.METHODS`, or a function quantize(pipe, calibration, w, a, **recipe).
        bits: weight and activation bits, such as "w4a8".
        calibration: a `CalibrationSet` of this pipeline (`quest.diffusion.calibration_set.collect`). None draws one,
            with the steps and guidance that the pipeline's call defaults to; a sequence of prompts draws it for them.
        recipe: the method's hyperparameters, by keyword; see its file in baselines/.

    Raises:
        ValueError: the method is unknown, the bits are malformed, a hyperparameter is out of bounds, the pipeline
            cannot be quantized (`quest.quantization.guards.check`), or the calibration set has another noise schedule.
        FloatingPointError: the method diverged, on its own or in the checkpoint that it starts from.
        TypeError: the method does not have a hyperparameter, or `calibration` is none of these.
    """
    import inspect
    from collections.abc import Sequence

    from baselines import METHODS
    from baselines.method import check
    from quest.config import parse_bits
    from quest.config.old_names import current
    from quest.diffusion.calibration_set import CalibrationSet, draw
    from quest.diffusion.denoisers import denoiser_of
    from quest.quantization import cost, guards, layer_names, swapping
    from quest.quantization.layers import freeze

    method = current(method)
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    function = method if callable(method) else METHODS[method].quantize
    w, a = parse_bits(bits)
    check(function, recipe, w, a)
    if isinstance(method, str) and METHODS[method].weights_only and a != 32:
        raise ValueError(f"{method} quantizes weights only: its bits are w{w}a32, not w{w}a{a}")
    guards.check(pipe)
    if recipe.get("keep"):
        layers, processors = swapping.quantizable(denoiser_of(pipe))
        layer_names.check([*layers, *processors], recipe["keep"])
    several = isinstance(calibration, Sequence) and not isinstance(calibration, str)
    if calibration is None or several and all(isinstance(prompt, str) for prompt in calibration):
        guards.check_text_encoders(pipe)
        calibration, model = draw(pipe, calibration)
        recipe = {k: v for k, v in model.recipe(function, a).items() if k == "guidance"} | recipe
    elif not isinstance(calibration, CalibrationSet):
        raise TypeError(f"calibration: {calibration!r:.80}; valid: a CalibrationSet, a list of prompts, or None")
    guards.check_calibration(pipe, calibration)
    new = function(pipe, calibration, w, a, **recipe)
    if new is not pipe:
        freeze(denoiser_of(new))
        settings = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
        denoiser_of(new).quantization = {
            "method": method if isinstance(method, str) else _named(getattr(method, "func", method)),
            "bits": bits,
            "recipe": {
                k: v if isinstance(v, (int, float, bool, dict, list, type(None))) else str(v)
                for k, v in (settings | recipe).items()
            },
            "timesteps": calibration.timesteps,
            "cost": cost.summary(denoiser_of(new), w, a, calibration),
        }
    return new


def _named(function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def save(pipe, path, floats: bool = False, **extra) -> None:
    """Write a quantized pipeline's denoiser to one .safetensors file; see `quest.quantization.checkpoint.save`.

    floats: keep float weights in place of codes, so that another method can start from them (`init`).
    """
    from quest.quantization import checkpoint

    checkpoint.save(pipe, path, floats, **extra)


def load(pipe, path, kernel: str = "auto"):
    """Make a quantized pipeline of a full-precision one and a saved file; see `quest.quantization.checkpoint.load`."""
    from quest.quantization import checkpoint

    return checkpoint.load(pipe, path, kernel)
