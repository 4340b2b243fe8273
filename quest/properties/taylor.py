"""How accurate Taylor steps are when a denoiser is quantized.

Reconstruction approximates the loss of a quantized network by its second-order Taylor step from full precision, without
the gradient. QuEST (arXiv:2402.03666, proposition 3.1) says that at few bits the perturbation is too large for that;
it uses K small steps instead, each with its gradient (theorem 3.2). Here the perturbation is the rounding error of all
weights and layer inputs together, and the loss is the squared distance to the prediction of full precision.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quest.affine import QParams, QuantSpec, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked
from quest.quantization import ranges
from quest.quantization.layer_names import KEEP, layer_bits

STEP = 1e-3  # width of the central differences, in float64


def expand(f: Callable[[float], Tensor], at: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of f at a number, by central differences."""
    before, here, after = f(at - STEP), f(at), f(at + STEP)
    return here, (after - before) / (2 * STEP), (after - 2 * here + before) / STEP**2


def remainders(f: Callable[[float], Tensor], steps: tuple[int, ...] = (1, 4)) -> dict[str, Tensor]:
    """Errors of Taylor steps from f(0) to f(1), for f(a) of shape [N, ...]; every entry is [N].

    "first", "second": |f(1) - step| / |f(1) - f(0)| of the output after a step of that order. "loss, K steps": relative
    error of the loss |f(1) - f(0)|^2 as a sum of K second-order steps with their gradients; reconstruction minimizes
    that sum for K = 1, where the gradient at f(0) is zero. "loss": the loss over |f(0)|^2.
    """
    start, slope, curvature = expand(f)
    whole = f(1.0) - start

    def size(x):
        return x.flatten(1).square().sum(1)

    loss = size(whole)
    result = {
        "first": (size(whole - slope) / loss).sqrt(),
        "second": (size(whole - slope - curvature / 2) / loss).sqrt(),
        "loss": loss / size(start),
    }
    for count in steps:
        total = torch.zeros_like(loss)
        for i in range(count):
            here, first, second = (start, slope, curvature) if i == 0 else expand(f, i / count)
            gradient = 2 * ((here - start) * first).flatten(1).sum(1)
            hessian = 2 * size(first) + 2 * ((here - start) * second).flatten(1).sum(1)
            total += gradient / count + hessian / (2 * count**2)
        result[f"loss, {count} step{'s' if count > 1 else ''}"] = (total - loss).abs() / loss
    return result


@contextmanager
def perturbed(denoiser: nn.Module, inputs: dict[str, Tensor], bits: int) -> Iterator[Callable[[float], Tensor]]:
    """Yield f: f(a) is the prediction after every weight and layer input moves by `a` times its quantization error.

    The errors belong to the nearest codes at full precision, for ranges of least squared error (on these rows, for
    inputs); the first and last layer have at least 8 bits. f(0) is full precision. f(1) is not the quantized network,
    where errors of earlier layers also change an input. The denoiser itself does not change.
    """
    denoiser = copy.deepcopy(denoiser).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    weights = {n: m.weight.detach().clone() for n, m in layers.items()}
    errors: dict[str, Tensor] = {}
    amount: float | None = None

    def error(x, spec):
        return fake_quantize(x, QParams(*ranges.mse(x, spec), spec)) - x

    def move(name):
        def hook(_module, args):
            if amount is None:
                errors[name] = error(args[0], QuantSpec(layer_bits(name, bits, bits, KEEP)[1]))
                return None
            return (args[0] + amount * errors[name], *args[1:])

        return hook

    rounding = {n: error(w, QuantSpec(layer_bits(n, bits, bits, KEEP)[0], axis=0)) for n, w in weights.items()}

    @torch.no_grad()
    def f(a: float) -> Tensor:
        nonlocal amount
        amount = a
        for name, layer in layers.items():
            layer.weight.data = weights[name] + a * rounding[name]
        return denoiser(**inputs).sample

    with hooked(m.register_forward_pre_hook(move(n)) for n, m in layers.items()):
        with torch.no_grad():
            denoiser(**inputs)
        yield f


def taylor(denoiser: nn.Module, evaluation: CalibrationSet, widths: list[int], calls: int = 2) -> list[dict]:
    """`remainders` for each of `widths` (bits) on held-out trajectories, at `calls` evenly spread sampler calls.

    Returns rows {bits, what, values}: for each trajectory the mean over these calls (and halves).
    """
    trajectories, place = evaluation.trajectory.unique(return_inverse=True)
    last = int(evaluation.call.max())
    chosen = [round((i + 0.5) / calls * last) for i in range(calls)]
    rows = []
    for bits in widths:
        sums: dict[str, Tensor] = {}
        for call in chosen:
            at = evaluation.rows_of_call(call)
            with perturbed(denoiser, evaluation.inputs(at), bits) as f:
                for what, values in remainders(f).items():
                    total = sums.setdefault(what, torch.zeros(len(trajectories), dtype=torch.float64))
                    total.index_add_(0, place[at], values / len(at) * len(trajectories) / calls)
        rows += [{"bits": bits, "what": what, "values": values.tolist()} for what, values in sums.items()]
        print(bits, {what: round(values.mean().item(), 5) for what, values in sums.items()}, flush=True)
    return rows
