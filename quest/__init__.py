"""QuEST (arXiv:2402.03666) and its rivals: quantize, save and load diffusers pipelines. Imports nothing heavy."""


def quantize(pipe, method="quest", bits: str = "w4a8", *, calibration, **recipe):
    """Quantize the denoiser of a diffusers pipeline; returns a new pipeline and leaves the given one as it was.

    Args:
        pipe: a full-precision pipeline with a `unet`, in float32.
        method: a name in `baselines.METHODS`, or a callable of the same form.
        bits: weight and activation bits, such as "w4a8".
        calibration: a `CalibrationSet` of this pipeline (`quest.diffusion.calibration_set.collect`).
        recipe: the method's hyperparameters, by keyword; see its `quantize`.

    Raises:
        ValueError: unknown method, malformed bits, a hyperparameter out of its bounds, a pipeline that is quantized
            already or in half precision.
        TypeError: a hyperparameter the method does not have.
    """
    import inspect

    from baselines import METHODS
    from baselines.method import check
    from quest.config import parse_bits
    from quest.quantization import cost
    from quest.quantization.checkpoint import freeze

    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    function = method if callable(method) else METHODS[method].quantize
    w, a = parse_bits(bits)
    check(function, recipe)
    new = function(pipe, calibration, w, a, **recipe)
    if new is not pipe:
        freeze(new.unet)
        settings = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
        new.unet.quantization = {
            "method": method if isinstance(method, str) else _named(getattr(method, "func", method)),
            "bits": bits,
            "recipe": {
                k: v if isinstance(v, (int, float, bool, dict, list, type(None))) else str(v)
                for k, v in (settings | recipe).items()
            },
            "timesteps": calibration.timesteps,
            "cost": cost.summary(new.unet, w, a, calibration),
        }
    return new


def _named(function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def save(pipe, path, floats: bool = False, **extra) -> None:
    """Write a quantized pipeline's denoiser to one .safetensors file; see `quest.quantization.checkpoint.save`.

    floats: keep float weights, not codes: what another method is to start from (`init`).
    """
    from quest.quantization import checkpoint

    checkpoint.save(pipe, path, floats, **extra)


def load(pipe, path, kernel: str = "auto"):
    """A quantized pipeline from the full-precision one and a saved file; see `quest.quantization.checkpoint.load`."""
    from quest.quantization import checkpoint

    return checkpoint.load(pipe, path, kernel)
