"""AdaRound and block reconstruction, shared by several methods (arXiv:2004.10568, arXiv:2102.05426, arXiv:2302.04304).

A denoiser is quantized unit by unit in the order of its forward pass: first the rounding of the weights, with float
activations; then, weights fixed, the steps of the activation quantizers. Both supervise a unit's output by that of full
precision. One forward pass of the denoiser over all calibration rows is a whole stage: it stops inside every unit to
learn, and goes on with the unit's new output. So nothing is computed twice, no graph outside the unit is built, and
only the tensors that the pass itself keeps alive (its skip connections) are in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from tqdm import tqdm

from quest import cost
from quest.affine import FLOAT, QParams, QuantSpec, quantize
from quest.attention import QuantAttention
from quest.calibration import CalibrationSet
from quest.layers import QuantLayer, attentions, input_quantizers, quant_layers
from quest.quantizer import Quantizer
from quest.ranges import EPS
from quest.resume import part

GAMMA, ZETA = -0.1, 1.1  # of the rectified sigmoid (arXiv:2004.10568, equation 23)
LAMBDA = 0.01  # weight of the rounding regulariser
WARMUP = 0.2  # share of the iterations without it
BETA = (20.0, 2.0)  # its exponent, from the end of the warm-up to the last iteration
ACTIVATION_POWER = 2.4  # of the error when activation steps are learned
FINE = 16  # bits from which an activation quantizer is not learned
CHUNK = 64  # rows of one forward pass of a unit where nothing is learned
CHECK = 256  # rows on which a unit is judged before and after


@dataclass(frozen=True)
class Unit:
    """What is reconstructed together, with its quantized layers and activation quantizers by name.

    modules: one, or several that read the same input; their outputs are concatenated. lay: turns the output for a
    number of rows into the layout in which the papers' networks have it, dimension 1 of images being channels.
    """

    name: str
    modules: dict[str, nn.Module]
    layers: dict[str, QuantLayer]
    quantizers: dict[str, Quantizer]
    lay: Callable[[Tensor, int], Tensor]


def _as_it_is(y: Tensor, _rows: int) -> Tensor:
    return y


def _channels_first(y: Tensor, _rows: int) -> Tensor:
    """[B, n, C] -> [B, C, n]: a linear layer here is a 1-d convolution there."""
    return y.transpose(1, 2)


def _heads_as_channels(y: Tensor, rows: int) -> Tensor:
    """[B * heads, n, d] -> [B, heads * d, n]."""
    return y.unflatten(0, (rows, -1)).transpose(2, 3).flatten(1, 2)


@torch.no_grad()
def units(denoiser: nn.Module, inputs: dict[str, Tensor]) -> list[Unit]:
    """The units of a quantized denoiser in the order in which a forward pass on `inputs` meets them.

    As in Q-Diffusion (arXiv:2302.04304) with quantized activations: every ResnetBlock2D with its time embedding
    projection, every BasicTransformerBlock, every other quantized layer alone. Attention outside a transformer block is
    no unit: to_q, to_k and to_v together are (CompVis has them as one layer), to_out is, and the two products are a
    unit without weights.
    """
    found: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        whole = isinstance(module, ResnetBlock2D | BasicTransformerBlock | QuantLayer | QuantAttention)
        if whole and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    order: list[str] = []
    handles = [m.register_forward_pre_hook(lambda *_, n=n: order.append(n)) for n, m in found.items()]
    try:
        denoiser.forward(**inputs)
    finally:
        for h in handles:
            h.remove()
    attention = {n: m for n, m in attentions(denoiser) if f"{n}.processor" in found}
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(order):
        parent, _, child = name.rpartition(".")
        self_attention = parent in attention and not attention[parent].is_cross_attention
        together = self_attention and child in ("to_q", "to_k", "to_v")
        members.setdefault(f"{parent}.qkv" if together else name, []).append(name)
    result = []
    for unit, names in members.items():
        modules = {n: found[n] for n in names}
        layers = {f"{n}.{sub}".rstrip("."): m for n in names for sub, m in quant_layers(found[n])}
        quantizers = {f"{n}.{sub}": q for n in names for sub, q in input_quantizers(found[n]).items()}
        lay = _as_it_is
        if isinstance(modules[names[0]], QuantAttention):
            lay = _heads_as_channels
        elif any(unit.startswith(f"{n}.") for n in attention):
            lay = _channels_first
        result.append(Unit(unit, modules, layers, quantizers, lay))
    return result


def reconstruct_weights(
    student: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    rows: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float,
    exclude: Iterable[str] = (),
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """Learn the rounding of every weight by AdaRound, unit by unit; the weights end as plain QuantLayers' (see `fold`).

    student: a quantized denoiser whose weight ranges are chosen. teacher: the float denoiser. rows: of the calibration
    set. exclude: globs over the names of layers that keep the codes they have.
    A unit's input comes from the weight-quantized network, its target from full precision; activations are float
    (Q-Diffusion's order). Time groups play no part, so rows of different groups may be mixed.
    Memory: the tensors alive in one forward pass over 2 len(rows) rows.
    Returns each unit's reconstruction error before and after. Departure from the papers: a unit whose error did not
    fall keeps its nearest codes.
    Raises FloatingPointError naming unit and iteration where the loss is not finite.
    """
    n = len(rows)
    inputs = _inputs(student, calibration, rows)
    errors: dict[str, tuple[float, float]] = {}
    learned: list[Tensor] = []

    def visit(unit: Unit, forwards: dict[str, Callable], name: str, *args, **kwargs) -> Tensor:
        call = partial(_call, args=args, kwargs=kwargs, n=2 * n)
        if not unit.layers:
            return _chunked(partial(call, [forwards[name]]), torch.arange(2 * n))
        layers = {
            name: layer
            for name, layer in unit.layers.items()
            if layer.weight_quantizer.spec.bits < FLOAT and not any(fnmatch(name, glob) for glob in exclude)
        }
        learning = bool(layers) and unit.name not in errors
        full = [teacher.get_submodule(m) for m in (unit.modules if learning else [name])]
        outputs = [_chunked(partial(call, [forward]), torch.arange(n)) for forward in full]
        if learning:
            errors[unit.name] = part(
                f"AdaRound-{unit.name}",
                lambda: {name: layer.weight for name, layer in layers.items()},
                lambda: learn_rounding(
                    unit.name,
                    layers,
                    lambda r: unit.lay(call(list(forwards.values()), r + n), len(r)),
                    unit.lay(_together(outputs), n),
                    iterations=iterations,
                    batch=batch,
                    lr=lr,
                    generator=generator,
                ),
                generator,
            )
            for layer in layers.values():
                layer.freeze()
            learned.extend(layer.weight for layer in layers.values())
        # The first of a unit's modules to be called is the one that learns.
        return torch.cat([outputs[0], _chunked(partial(call, [forwards[name]]), torch.arange(n, 2 * n))])

    # The first half of the rows runs through the units of full precision, the second through the quantized ones.
    doubled = {k: torch.cat([v, v]) for k, v in inputs.items()}
    with float_activations(input_quantizers(student).values()), frozen(student):
        _run(student, inputs, doubled, visit, "AdaRound")
    cost.record(student, "AdaRound", learned, iterations, batch)
    return errors


def reconstruct_activations(
    student: nn.Module,
    teacher: nn.Module,
    calibration: CalibrationSet,
    rows: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
) -> dict[str, tuple[float, float]]:
    """Learn the steps of the activation quantizers, unit by unit; weights and zero points stay (arXiv:2302.04304).

    Arguments and errors as for `reconstruct_weights`; the ranges must be calibrated. A unit's input and target both
    come from full precision. Quantizers of 16 bits and more are left alone. Departures from the released code: a step
    stays positive, and a unit whose error did not fall keeps the steps it had.
    With time groups, which it has not, each group learns its own steps on its own rows, in an equal share of the
    iterations: as inputs are those of full precision, groups do not depend on each other.
    Raises ValueError for a time group without a row.
    """
    n = len(rows)
    inputs = _inputs(student, calibration, rows)
    groups = getattr(student, "time_groups", None)
    parts = [torch.arange(n)] if groups is None else groups.rows(calibration.timestep[rows])
    shares = [iterations * (g + 1) // len(parts) - iterations * g // len(parts) for g in range(len(parts))]
    errors: dict[str, tuple[float, float]] = {}
    learned: list[Tensor] = []

    def visit(unit: Unit, forwards: dict[str, Callable], name: str, *args, **kwargs) -> Tensor:
        call = partial(_call, args=args, kwargs=kwargs, n=n)

        quantizers = {name: q for name, q in unit.quantizers.items() if q.spec.bits < FINE}
        learning = bool(quantizers) and unit.name not in errors
        with float_activations(() if unit.layers else unit.quantizers.values()):
            full = [
                teacher.get_submodule(m) if unit.layers else forwards[m] for m in (unit.modules if learning else [name])
            ]
            outputs = [_chunked(partial(call, [forward]), torch.arange(n)) for forward in full]
        if learning:
            target = unit.lay(_together(outputs), n)
            found = []
            for g, (own, share) in enumerate(zip(parts, shares, strict=True)):
                if groups is not None:
                    groups.enter(groups.starts[g])
                learning_steps = partial(
                    learn_steps,
                    unit.name,
                    quantizers,
                    lambda r, own=own: unit.lay(call(list(forwards.values()), own[r]), len(r)),
                    target if groups is None else target[own],
                    iterations=share,
                    batch=batch,
                    lr=lr,
                    generator=generator,
                )
                scales = {name: q.scale for name, q in quantizers.items()}
                kept = f"activation-steps-{unit.name}" + (f"-{g}" if groups is not None else "")
                found.append(part(kept, lambda scales=scales: scales, learning_steps, generator))
            errors[unit.name] = tuple(sum(values) / len(found) for values in zip(*found, strict=True))
            learned.extend(q.scale for q in quantizers.values())
        return outputs[0]

    with frozen(student):
        _run(student, inputs, inputs, visit, "activation steps")
    cost.record(student, "activation steps", learned, iterations, batch)
    return errors


def learn_rounding(
    name: str,
    layers: dict[str, QuantLayer],
    run: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """AdaRound of one unit (arXiv:2004.10568, equations 21 to 25): Adam on alpha, mini-batches drawn anew each time.

    run(rows) gives the unit's output on these rows, target [N, ...] the output to reach. Loss: `error` with power 2
    plus LAMBDA times the regulariser, a sum over all weights of the unit. Returns the error before and after.
    """
    for layer in layers.values():
        layer.freeze()
    check = _check(target)
    before = _judge(run, target, check, 2)
    rounding = Rounding(list(layers.values()))
    adam = torch.optim.Adam([rounding.alpha.requires_grad_()], lr=lr, fused=True)
    with torch.enable_grad():
        for i in range(iterations):
            for layer, weight in zip(layers.values(), rounding.soft(beta(i, iterations)), strict=True):
                layer.packed = weight
            rows = torch.randperm(len(target), generator=generator)[:batch]
            loss = error(run(rows), target[rows], 2)
            _finite(loss, "AdaRound", name, i)
            adam.zero_grad()
            loss.backward()
            adam.step()
    weights = [layer.weight.data for layer in layers.values()]
    for layer, weight in zip(layers.values(), rounding.folded(), strict=True):
        layer.weight.data = weight
        layer.freeze()
    after = _judge(run, target, check, 2)
    if not after < before:
        for layer, weight in zip(layers.values(), weights, strict=True):
            layer.weight.data = weight
            layer.freeze()
    return before, min(before, after)


def learn_steps(
    name: str,
    quantizers: dict[str, Quantizer],
    run: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    iterations: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Adam on the scales of one unit's activation quantizers, its rate falling to zero as a cosine.

    With time groups those of the current one: the others have no gradient, and a new Adam does not move them.
    run, target and result as for `learn_rounding`; loss: `error` with power 2.4.
    """
    scales = [q.scale for q in quantizers.values()]
    first = [s.detach().clone() for s in scales]
    check = _check(target)
    before = _judge(run, target, check, ACTIVATION_POWER)
    adam = torch.optim.Adam([s.requires_grad_() for s in scales], lr=lr, fused=True)
    with torch.enable_grad():
        for i in range(iterations):
            rows = torch.randperm(len(target), generator=generator)[:batch]
            loss = error(run(rows), target[rows], ACTIVATION_POWER)
            _finite(loss, "activation steps", name, i)
            adam.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / iterations))
            adam.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(scales, EPS)
    for s in scales:
        s.requires_grad_(False).grad = None
    after = _judge(run, target, check, ACTIVATION_POWER)
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


def beta(iteration: int, iterations: int) -> float | None:
    """Exponent of the regulariser: None while it is off, then falling linearly (BRECQ's comments say cosine)."""
    start = WARMUP * iterations
    if iteration < start:
        return None
    first, last = BETA
    return last + (first - last) * max(0.0, 1 - (iteration - start) / (iterations - start))


class Rounding:
    """AdaRound's variables of some layers, each one flat tensor over all their weights.

    Values lie as in a convolution whose channels are innermost, as the activations' are: no pass reorders them.
    """

    def __init__(self, layers: list[QuantLayer]):
        self.shapes = [layer.weight.shape for layer in layers]
        self.qparams = [layer.weight_quantizer.qparams for layer in layers]
        self.weights = [layer.weight.detach() for layer in layers]
        pairs = list(zip(self.weights, self.qparams, strict=True))
        scale = _flat(q.scale.detach().expand_as(w) for w, q in pairs)
        low = _flat((q.spec.qmin - q.zero_point).expand_as(w) for w, q in pairs)
        high = _flat((q.spec.qmax - q.zero_point).expand_as(w) for w, q in pairs)
        ratio = _flat(self.weights) / scale
        floor = ratio.floor()
        # So that h(alpha) is the fraction: the soft weights start as the float ones, up to clipping.
        self.alpha = -((ZETA - GAMMA) / (ratio - floor - GAMMA) - 1).log()
        # clip(floor + h) s for any h in [0, 1]; a clipped weight has no step.
        self.base = torch.minimum(torch.maximum(floor, low), high) * scale
        self.step = scale * ((floor >= low) & (floor < high))

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        return [v.view(s[0], *s[2:], s[1]).movedim(-1, 1) for v, s in parts]

    def soft(self, beta: float | None) -> list[Tensor]:
        """Dequantized weights with soft rounding; their gradient brings that of the regulariser along, see `_Soft`."""
        return self._split(_Soft.apply(self.alpha, self.base, self.step, beta))

    @torch.no_grad()
    def folded(self) -> list[Tensor]:
        """Float weights whose nearest codes are the learned ones, see `fold`."""
        up = self._split((self.alpha >= 0).float())
        return [fold(w, u, q) for w, u, q in zip(self.weights, up, self.qparams, strict=True)]


def fold(weight: Tensor, up: Tensor, qparams: QParams) -> Tensor:
    """w + (b - 1/2) s, whose nearest code is the floor of w / s plus b: plain quantized layers need no alpha.

    Gradients and distances to the next code are the original's. A weight on a tie is put on the middle of its code.
    """
    scale, zero_point, spec = qparams
    codes = ((weight / scale).floor() + up + zero_point).clamp(spec.qmin, spec.qmax)
    moved = weight + (up - 0.5) * scale
    return torch.where(quantize(moved, qparams).codes == codes, moved, (codes - zero_point) * scale)


class _Soft(torch.autograd.Function):
    """Soft weights base + h step, h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1) (arXiv:2004.10568, eq. 22, 23).

    The gradient of LAMBDA times the regulariser, the sum of 1 - |2 h - 1|^beta (eq. 24), is added on the way back: its
    value is never needed. beta None leaves it out. Written by hand for its number of passes over tensors as large as
    the weights: small units spend most of their time in them.
    """

    @staticmethod
    def forward(ctx, alpha, base, step, beta):
        sigmoid = alpha.sigmoid()
        h = (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1)
        ctx.beta = beta
        ctx.save_for_backward(sigmoid, h, step)
        return torch.addcmul(base, h, step)

    @staticmethod
    def backward(ctx, grad):
        sigmoid, h, step = ctx.saved_tensors
        grad = grad * step
        if ctx.beta is not None:
            side = (h + h).sub_(1)
            power = side.abs().log_().mul_(ctx.beta - 1).exp_().copysign_(side)
            grad.add_(power, alpha=-2 * LAMBDA * ctx.beta)
        grad = torch.ops.aten.hardtanh_backward(grad, h, 0, 1)
        return torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(ZETA - GAMMA), None, None, None


@contextmanager
def float_activations(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """While inside, these quantizers leave their tensors in float."""
    specs = [(q, q.spec) for q in quantizers]
    for q, _ in specs:
        q.spec = QuantSpec(FLOAT)
    try:
        yield
    finally:
        for q, spec in specs:
            q.spec = spec


@contextmanager
def frozen(denoiser: nn.Module) -> Iterator[None]:
    """While inside, weights are packed: a forward pass does not round them again."""
    layers = [layer for _, layer in quant_layers(denoiser)]
    for layer in layers:
        layer.freeze()
    try:
        yield
    finally:
        for layer in layers:
            layer.thaw()


def _inputs(denoiser: nn.Module, calibration: CalibrationSet, rows: Tensor) -> dict[str, Tensor]:
    device = next(denoiser.parameters()).device
    return {k: v.to(device) for k, v in calibration.inputs(rows).items()}


@torch.no_grad()
def _run(
    denoiser: nn.Module, example: dict[str, Tensor], inputs: dict[str, Tensor], visit: Callable, stage: str
) -> None:
    """One forward pass in which visit(unit, forwards, name, *args, **kwargs) stands in for every unit's modules.

    forwards: what the unit's modules compute, by name. name: which of them is called.
    `forward` and not a call of the denoiser: a pass over all timesteps is in no time group.
    """
    found = units(denoiser, {k: v[:1] for k, v in example.items()})
    modules = {n: m for unit in found for n, m in unit.modules.items()}
    bar = tqdm(total=len(modules), desc=stage, mininterval=5)

    def visited(*args, **kwargs):
        output = visit(*args, **kwargs)
        bar.update()
        return output

    for unit in found:
        forwards = {n: m.forward for n, m in unit.modules.items()}
        for name, module in unit.modules.items():
            module.forward = partial(visited, unit, forwards, name)
    try:
        with bar:
            denoiser.forward(**inputs)
    finally:
        for module in modules.values():
            del module.forward


def _call(forwards: list[Callable], rows: Tensor, *, args: tuple, kwargs: dict, n: int) -> Tensor:
    """The outputs of some modules side by side, on some of the n rows that their arguments hold."""
    args, kwargs = [_take(a, rows, n) for a in args], {k: _take(v, rows, n) for k, v in kwargs.items()}
    return _together([forward(*args, **kwargs) for forward in forwards])


def _together(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _take(value, rows: Tensor, n: int):
    """Rows of a tensor whose first dimension holds n rows of one or, in attention, several heads; else the value."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if len(value) == n:
        return value[rows]
    return value.unflatten(0, (n, -1))[rows].flatten(0, 1)


def _chunked(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([run(chunk) for chunk in rows.split(CHUNK)])


def _check(target: Tensor) -> Tensor:
    return torch.arange(0, len(target), max(1, len(target) // CHECK))


@torch.no_grad()
def _judge(run: Callable[[Tensor], Tensor], target: Tensor, rows: Tensor, power: float) -> float:
    return error(_chunked(run, rows), target[rows], power).item()


def _finite(loss: Tensor, stage: str, unit: str, iteration: int) -> None:
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{stage}, unit {unit}, iteration {iteration}: the loss is {loss.item()}")


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.movedim(1, -1).flatten() for t in tensors])
