"""Learned equivalent scaling: factors of input channels by gradient descent (DMQ, arXiv:2507.12933).

    y = W x = (W tau) (x / tau)        tau [C], one factor for each input channel, for all taps and timesteps

One layer at a time (or those that read one input, such as to_q, to_k and to_v), on inputs x of full precision. The
loss of a row at timestep t is lambda_t |W x - Q(W tau) Q(x / tau)|^2. While tau is learned, both quantizers take whole
ranges from what they quantize, the weight's for each output channel and the input's over the mini-batch, so that the
gradient reaches their scales too.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.affine import FLOAT, QParams, QuantSpec, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.adam import Adam, Descent
from quest.learning.lowrank import factors
from quest.learning.reconstruction import check_rows, finite, float_activations, gradients, multiplying
from quest.learning.units import ALONE, call_modules, fill, walk
from quest.quantization import cost
from quest.quantization.layers import QuantLayer, input_quantizers, quant_layers
from quest.quantization.prologue import along
from quest.runtime import memory
from quest.runtime.resume import part

STAGE = "equivalent scaling"
BINS = 20  # of the timesteps, with one average loss each
MOMENTUM = 0.95  # of these averages
POWER = 20  # of the weight of a timestep: rare small losses count more
STARTS = ("ones", "smooth")


class TimestepWeights:
    """lambda_t = (1 - L_b / sum of all L)^20 of the bin b of a timestep; L are running averages of losses.

    Departures from the released code: a bin's loss is the mean over its rows in the mini-batch and not their sum, which
    grows with their number; an average starts at its first loss and not at zero; and timestep 0 has a bin.
    """

    def __init__(self, train_timesteps: int):
        self.train_timesteps = train_timesteps
        self.averages = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def bins(self, timesteps: Tensor) -> Tensor:
        return (timesteps.double().cpu() * BINS / self.train_timesteps).long().clamp(0, BINS - 1)

    @torch.no_grad()
    def __call__(self, timesteps: Tensor, losses: Tensor) -> Tensor:
        """Take in the losses of some rows, [rows] as their timesteps, and return the rows' weights, with a mean of 1.

        Adam does not see the mean. Where all rows so far were of one bin, every weight is 1.
        """
        bins, losses_there = self.bins(timesteps), losses.double().cpu()
        for b in bins.unique():
            mean = losses_there[bins == b].mean()
            old = self.averages[b]
            self.averages[b] = mean if old == 0 else MOMENTUM * old + (1 - MOMENTUM) * mean
        shares = self.averages / self.averages.sum().clamp(min=torch.finfo(torch.float64).tiny)
        found = ((1 - shares) ** POWER)[bins]
        found = found / found.mean() if found.any() else torch.ones_like(found)
        return found.to(losses)


def whole(x: Tensor, bits: int) -> Tensor:
    """Quantize each row of x [rows, values] with its whole range, widened to include zero; gradients reach the ends."""
    clip, zero = x.new_ones(()), x.new_zeros(())
    return fake_quantize(x, QParams(clip, zero, QuantSpec(bits, axis=1, rows="tensor")))


def scaled(layer: QuantLayer, weight: Tensor, x: Tensor, tau: Tensor, bits: tuple[int, int]) -> Tensor:
    """A layer's output without bias from its quantized weight times tau, and its input x (of one range) over tau.

    bits: of weight and input.
    """
    w = whole((weight * along(tau, weight, 1)).flatten(1), bits[0]).view_as(weight)
    x = whole((x / along(tau, x, layer.channels)).reshape(1, -1), bits[1]).view_as(x)
    return _product(layer, w, x)


def _product(layer: QuantLayer, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def learn_factors(
    name: str,
    layers: dict[str, QuantLayer],
    inputs: Callable[[Tensor], Tensor],
    timesteps: Tensor,
    bits: dict[str, tuple[int, int]],
    log_tau: Tensor,
    weights: TimestepWeights,
    descent: Descent,
    chunk: int,
) -> tuple[float, float]:
    """Adam on log tau [C], in place; its rate falls to zero as a cosine. The logarithm keeps tau positive.

    layers: all of them read inputs(rows). timesteps: [n], of all rows. bits: of each layer's weight and input.
    Returns the mean squared error over rows (with equal weights) before and after. Factors without which the error is
    not larger are set to 1.
    Raises FloatingPointError, which names the layer, for a loss that is not finite.
    """
    n = len(timesteps)
    check = check_rows(n)
    floats = {key: layer.float_weight.detach() for key, layer in layers.items()}

    def losses(rows: Tensor, tau: Tensor) -> Tensor:
        x = inputs(rows)
        off = [
            (scaled(layer, floats[key], x, tau, bits[key]) - _product(layer, floats[key], x)).square()
            for key, layer in layers.items()
        ]
        return sum(each.reshape(len(rows), -1).sum(1) for each in off)

    @torch.no_grad()
    def judged(tau: Tensor) -> float:
        return sum(losses(rows, tau).double().sum().item() for rows in check.split(chunk)) / len(check)

    before = judged(torch.ones_like(log_tau))
    adam = Adam([log_tau.requires_grad_()])
    with torch.enable_grad():
        for i in range(descent.iterations):
            rows = descent.rows(n)
            each = losses(rows, log_tau.exp())
            loss = (weights(timesteps[rows], each.detach()) * each).mean()
            finite(loss, f"{STAGE}, layer {name}", i)
            adam.step(gradients(loss, [log_tau]), descent.falling(i))
    log_tau.requires_grad_(False)
    after = judged(log_tau.exp())
    if not after < before:
        log_tau.zero_()
    return before, min(before, after)


@torch.no_grad()
def learn_scaling(
    denoiser: nn.Module, calibration: CalibrationSet, train_timesteps: int, descent: Descent, start: str = "ones"
) -> dict[str, tuple[float, float]]:
    """Learn factors for the inputs of all layers whose weights and inputs are quantized, and scale the layers by them.

    denoiser: quantized, without ranges; its weights are not rounded yet. All rows of the calibration set are inputs.
    start: factors of 1, or those of SmoothQuant with alpha 1/2 ("smooth"). Grouped convolutions are left alone.
    Returns the error before and after, by what reads one input (see `learn_factors`).
    """
    n, device, waiting = len(calibration), denoiser.device, memory.waiting(denoiser.device.type)
    everything = torch.arange(n, device="cpu")
    bits = {
        name: (layer.weight_quantizer.spec.bits, layer.input_quantizer.spec.bits)
        for name, layer in quant_layers(denoiser)
        if layer.groups == 1
    }
    bits = {name: both for name, both in bits.items() if max(both) < FLOAT}
    errors: dict[str, tuple[float, float]] = {}
    found: dict[str, Tensor] = {}

    def visit(unit, forwards, name, *args, **kwargs) -> Tensor:
        own = {key: layer for key, layer in unit.layers.items() if key in bits}
        if own and unit.name not in errors:
            x = args[0]
            first = next(iter(own.values()))
            log_tau = torch.zeros(first.weight_shape[1], dtype=torch.float32, device=device)
            if start == "smooth":
                largest = x.movedim(first.channels, 0).flatten(1).abs().amax(1).to(device)
                weights = torch.cat([layer.float_weight.detach() for layer in own.values()])
                log_tau.copy_(factors(largest, weights, 0.5, 0.5).log())
            learn = partial(
                learn_factors,
                unit.name,
                own,
                partial(call_modules, [nn.Identity()], args=(x,), kwargs={}, n=n, device=device),
                calibration.timestep,
                bits,
                log_tau,
                TimestepWeights(train_timesteps),
                descent,
                waiting.chunk,
            )
            errors[unit.name] = part(f"scaling-{unit.name}", lambda: {"log_tau": log_tau}, learn, descent.generator)
            found.update(dict.fromkeys(own, log_tau.exp()))
        call = partial(call_modules, [forwards[name]], args=args, kwargs=kwargs, n=n, device=device)
        return fill(call, everything, n, waiting)

    every = dict(quant_layers(denoiser))
    floats = multiplying(every.values(), [layer.float_weight for layer in every.values()])
    with float_activations(input_quantizers(denoiser).values()), floats:
        walk(denoiser, calibration, everything, visit, STAGE, waiting, ALONE)
    changed = {name: tau for name, tau in found.items() if (tau != 1).any()}
    for name, tau in changed.items():
        every[name].scale_input(tau)
    learned = {id(tau): tau for tau in found.values()}  # each once, where layers share it
    cost.record(denoiser, STAGE, learned.values(), descent.iterations, descent.batch)
    return errors
