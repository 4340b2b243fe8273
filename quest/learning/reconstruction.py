"""AdaRound and block reconstruction, shared by several methods (arXiv:2004.10568, arXiv:2102.05426, arXiv:2302.04304).

A denoiser is quantized unit by unit in the order of its forward pass: first the rounding of the weights, with float
activations; then, weights fixed, the steps of the activation quantizers. Both supervise a unit's output by that of full
precision. One forward pass of the denoiser over all calibration rows is a whole stage: it stops inside every unit to
learn, and goes on with the unit's new output. So nothing is computed twice, no graph outside the unit is built, and
only the tensors that the pass itself keeps alive (its skip connections) are in memory.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.affine import FLOAT, QuantSpec
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import changed, overridden
from quest.learning.adam import Adam, Descent
from quest.learning.rounding import Rounding, beta
from quest.learning.units import CHUNK, Unit, call_modules, chunked, fill, side_by_side, walk
from quest.quantization import cost
from quest.quantization.layers import QuantLayer, freeze, input_quantizers, quant_layers
from quest.quantization.quantizer import Quantizer
from quest.quantization.ranges import EPS
from quest.runtime import memory
from quest.runtime.resume import part

ACTIVATION_POWER = 2.4  # of the error when activation steps are learned
FINE = 16  # bits from which an activation quantizer is not learned
CHECK = 256  # rows on which a unit is judged before and after


def reconstruct_weights(
    student: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    descent: Descent,
    only: Collection[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Learn the rounding of all weights by AdaRound, unit by unit; they end as plain QuantLayers' (`rounding.fold`).

    student: a quantized denoiser whose weight ranges are chosen. teacher: the float denoiser. only: names of the
    layers that learn, default all; others keep the codes they have.
    A unit's input comes from the weight-quantized network, its target from full precision; activations are float
    (Q-Diffusion's order). Time groups play no part, so rows of different groups may be mixed.
    What waits: the tensors alive in one forward pass over twice the calibration set.
    Returns each unit's reconstruction error before and after. Departure from the papers: a unit whose error did not
    fall keeps its nearest codes.
    Raises FloatingPointError naming unit and iteration where the loss is not finite.
    """
    n, device, waiting = len(calibration), student.device, memory.waiting(student.device.type)
    first, second = torch.arange(2 * n, device="cpu").split(n)
    errors: dict[str, tuple[float, float]] = {}
    learned: list[Tensor] = []

    def visit(unit: Unit, forwards: dict[str, Callable], name: str, *args, **kwargs) -> Tensor:
        call = partial(call_modules, args=args, kwargs=kwargs, n=2 * n, device=device)
        if not unit.layers:
            return fill(partial(call, [forwards[name]]), torch.arange(2 * n, device="cpu"), 2 * n, waiting)
        layers = {
            name: layer
            for name, layer in unit.layers.items()
            if layer.weight_quantizer.spec.bits < FLOAT and (only is None or name in only)
        }
        learning = bool(layers) and unit.name not in errors
        full = [teacher.get_submodule(m) for m in (unit.modules if learning else [name])]
        # Of the module that is called, with room for the quantized half.
        output = fill(partial(call, full[:1]), first, 2 * n, waiting)
        exact = [output[: len(output) // 2], *(fill(partial(call, [f]), first, n, waiting) for f in full[1:])]
        if learning:
            for layer in layers.values():
                layer.thaw()
            errors[unit.name] = part(
                f"AdaRound-{unit.name}",
                lambda: {name: layer.weight for name, layer in layers.items()},
                lambda: learn_rounding(
                    unit.name,
                    layers,
                    lambda r: unit.arrange(call(list(forwards.values()), r + n), len(r)),
                    lambda r: unit.arrange(side_by_side(exact, r, n, device), len(r)),
                    n,
                    descent,
                    waiting.chunk,
                ),
                descent.generator,
            )
            learned.extend(layer.weight for layer in layers.values())
            for layer in layers.values():
                layer.freeze()
        # The first of a unit's modules to be called is the one that learns.
        return fill(partial(call, [forwards[name]]), second, 2 * n, waiting, output)

    # The first half of the rows runs through the units of full precision, the second through the quantized ones.
    doubled = torch.arange(n, device="cpu").repeat(2)
    with float_activations(input_quantizers(student).values()), frozen(student):
        walk(student, calibration, doubled, visit, "AdaRound", waiting)
    cost.record(student, "AdaRound", learned, descent.iterations, descent.batch)
    return errors


def reconstruct_activations(
    student: nn.Module, teacher: nn.Module, calibration: CalibrationSet, descent: Descent
) -> dict[str, tuple[float, float]]:
    """Learn the steps of the activation quantizers, unit by unit; weights and zero points stay (arXiv:2302.04304).

    Arguments and errors as for `reconstruct_weights`; the ranges must be calibrated. A unit's input and target both
    come from full precision. Quantizers of 16 bits and more are left alone. Departures from the released code: a step
    stays positive, and a unit whose error did not fall keeps the steps it had.
    With time groups, which it has not, each group learns its own steps on its own rows, in an equal share of the
    iterations: as inputs are those of full precision, groups do not depend on each other.
    Raises ValueError for a time group without a row.
    """
    n, device, waiting = len(calibration), student.device, memory.waiting(student.device.type)
    everything = torch.arange(n, device="cpu")
    groups = getattr(student, "time_groups", None)
    parts = [everything] if groups is None else groups.rows(calibration.timestep)
    ends = [descent.iterations * g // len(parts) for g in range(len(parts) + 1)]
    shares = [end - start for start, end in pairwise(ends)]
    errors: dict[str, tuple[float, float]] = {}
    learned: list[Tensor] = []

    def visit(unit: Unit, forwards: dict[str, Callable], name: str, *args, **kwargs) -> Tensor:
        call = partial(call_modules, args=args, kwargs=kwargs, n=n, device=device)
        quantizers = {name: q for name, q in unit.quantizers.items() if q.spec.bits < FINE}
        learning = bool(quantizers) and unit.name not in errors
        with float_activations(() if unit.layers else unit.quantizers.values()):
            full = [
                teacher.get_submodule(m) if unit.layers else forwards[m] for m in (unit.modules if learning else [name])
            ]
            outputs = [fill(partial(call, [forward]), everything, n, waiting) for forward in full]
        if learning:
            found = []
            for g, (own, share) in enumerate(zip(parts, shares, strict=True)):
                learning_steps = partial(
                    learn_steps,
                    unit.name,
                    quantizers,
                    lambda r, own=own: unit.arrange(call(list(forwards.values()), own[r]), len(r)),
                    lambda r, own=own: unit.arrange(side_by_side(outputs, own[r], n, device), len(r)),
                    len(own),
                    replace(descent, iterations=share),
                    waiting.chunk,
                )
                scales = {name: q.scale for name, q in quantizers.items()}
                kept = f"activation-steps-{unit.name}" + (f"-{g}" if groups is not None else "")
                with nullcontext() if groups is None else groups.inside(groups.starts[g]):
                    found.append(part(kept, lambda scales=scales: scales, learning_steps, descent.generator))
            errors[unit.name] = tuple(sum(values) / len(found) for values in zip(*found, strict=True))
            learned.extend(q.scale for q in quantizers.values())
        return outputs[0]

    with frozen(student):
        walk(student, calibration, everything, visit, "activation steps", waiting)
    cost.record(student, "activation steps", learned, descent.iterations, descent.batch)
    return errors


def learn_rounding(
    name: str,
    layers: dict[str, QuantLayer],
    run: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    n: int,
    descent: Descent,
    chunk: int = CHUNK,
) -> tuple[float, float]:
    """AdaRound of one unit (arXiv:2004.10568, equations 21 to 25): Adam on alpha, mini-batches drawn anew each time.

    run(rows) gives the unit's output on some of n rows, target(rows) the output to reach. Loss: `error` with power 2
    plus LAMBDA times the regulariser, a sum over all weights of the unit. The layers are not frozen, before and after.
    chunk: rows at once where nothing is learned. Returns the error before and after.
    """
    check = check_rows(n)
    before = _judge(run, target, check, 2, chunk)
    rounding = Rounding(list(layers.values()))
    with torch.enable_grad(), multiplying(layers.values(), rounding.soft):
        for i in range(descent.iterations):
            rows = descent.rows(n)
            loss = error(run(rows), target(rows), 2)
            finite(loss, f"AdaRound, unit {name}", i)
            rounding.step(gradients(loss, rounding.soft), beta(i, descent.iterations), descent.lr)
    weights = [layer.weight.data for layer in layers.values()]
    for layer, weight in zip(layers.values(), rounding.folded(), strict=True):
        layer.weight.data = weight
    after = _judge(run, target, check, 2, chunk)
    if not after < before:
        for layer, weight in zip(layers.values(), weights, strict=True):
            layer.weight.data = weight
    return before, min(before, after)


def learn_steps(
    name: str,
    quantizers: dict[str, Quantizer],
    run: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    n: int,
    descent: Descent,
    chunk: int = CHUNK,
) -> tuple[float, float]:
    """Adam on the scales of one unit's activation quantizers, its rate falling to zero as a cosine.

    With time groups those of the current one: the others have no gradient, and a new Adam does not move them.
    run, target, n and result as for `learn_rounding`; loss: `error` with power 2.4.
    """
    scales = [q.scale for q in quantizers.values()]
    first = [s.detach().clone() for s in scales]
    check = check_rows(n)
    before = _judge(run, target, check, ACTIVATION_POWER, chunk)
    adam = Adam([s.requires_grad_() for s in scales])
    with torch.enable_grad():
        for i in range(descent.iterations):
            rows = descent.rows(n)
            loss = error(run(rows), target(rows), ACTIVATION_POWER)
            finite(loss, f"activation steps, unit {name}", i)
            adam.step(gradients(loss, scales), descent.falling(i))
            with torch.no_grad():
                torch._foreach_clamp_min_(scales, EPS)
    for s in scales:
        s.requires_grad_(False)
    after = _judge(run, target, check, ACTIVATION_POWER, chunk)
    if not after < before:
        for s, value in zip(scales, first, strict=True):
            s.copy_(value)
    return before, min(before, after)


def error(output: Tensor, target: Tensor, power: float) -> Tensor:
    """|output - target|^power summed over dimension 1 and averaged over the others, as in BRECQ (arXiv:2102.05426).

    Dimension 1 holds channels in images and tokens in sequences; the balance with the regulariser depends on it.
    """
    if power == 2:
        total = F.mse_loss(output, target, reduction="sum")
    else:
        total = _Power.apply(output - target, power).sum()
    return total * (output.shape[1] / output.numel())


class _Power(torch.autograd.Function):
    """|x|^power as exp(power log |x|), half the time of pow; its gradient power |x|^power / x takes no other one."""

    @staticmethod
    def forward(ctx, x, power):
        powered = x.abs().log_().mul_(power).exp_()
        ctx.power = power
        ctx.save_for_backward(x, powered)
        return powered

    @staticmethod
    def backward(ctx, grad):
        x, powered = ctx.saved_tensors
        return powered.div(x).nan_to_num_(0).mul_(grad * ctx.power), None  # 0 / 0 where x is 0


def float_activations(quantizers: Iterable[Quantizer]) -> AbstractContextManager[None]:
    """While inside, these quantizers leave their tensors in float."""
    return changed(quantizers, "spec", QuantSpec(FLOAT))


@contextmanager
def frozen(denoiser: nn.Module) -> Iterator[None]:
    """While inside, weights are codes: a forward pass does not round them again."""
    freeze(denoiser)
    try:
        yield
    finally:
        for _, layer in quant_layers(denoiser):
            layer.thaw()


def multiplying(layers: Iterable[QuantLayer], weights: Iterable[Tensor]) -> AbstractContextManager[None]:
    """While inside, each layer multiplies its input by one of these float weights, not by the codes of its own."""
    pairs = zip(layers, weights, strict=True)
    return overridden("multiplied", {layer: lambda weight=weight: weight for layer, weight in pairs})


def check_rows(n: int) -> Tensor:
    """Return the rows of n on which a unit is judged: all of few, else CHECK to twice as many at equal distances."""
    return torch.arange(0, n, max(1, n // CHECK), device="cpu")


@torch.no_grad()
def _judge(run: Callable, target: Callable, rows: Tensor, power: float, chunk: int) -> float:
    return error(chunked(run, rows, chunk), target(rows), power).item()


def gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Those of `tensors`; zeros for one on which the loss does not depend."""
    return torch.autograd.grad(loss, tensors, materialize_grads=True)


def finite(loss: Tensor, where: str, iteration: int) -> None:
    """Raise FloatingPointError, which names the place, for a loss that is not finite."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{where}, iteration {iteration}: the loss is {loss.item()}")
