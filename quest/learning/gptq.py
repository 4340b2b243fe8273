"""GPTQ (arXiv:2210.17323): rounds the weights of a layer one input at a time, and the inputs that follow make good.

Rounding a weight w_k to q_k changes the layer's output by (q_k - w_k) x_k. Where inputs are correlated, the weights of
the inputs that are not yet rounded can take most of that back. By how much is said by the layer's Hessian
H = 2 / n sum x x^T, the second moments of its inputs:

1. Order the inputs by falling H_kk. Add 1 % of the mean of H_kk to each, so that H can be inverted.
2. Take U, the upper Cholesky factor of H^-1.
3. For each input k: q_k is the nearest code, and every later weight w_j loses (w_k - q_k) / U_kk U_kj.

A convolution is the linear layer of its unfolded input: an input is one channel at one tap. Scales and zero points are
chosen before, from the weights as they were, and do not move ("static groups" in the released code), so a kernel
computes what it computed.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.affine import FLOAT, QParams, fake_quantize, quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import hooked
from quest.learning.reconstruction import float_activations, multiplying
from quest.learning.units import ALONE, call_modules, chunk_rows, fill, walk
from quest.quantization import cost
from quest.quantization.layers import QuantLayer, input_quantizers, quant_layers
from quest.runtime import memory

STAGE = "GPTQ"
BLOCK = 128  # inputs whose errors reach the inputs after them in one product
DAMPING = 0.01  # added to the diagonal of the Hessian, as a share of its mean
RETRIES = 250  # times 0.1 of it is added again until both factorizations succeed
UNFOLDED = 2**25  # most values of an unfolded input in memory


class Hessian:
    """Sums x x^T over the columns x of a layer's unfolded inputs, [G, K, K] for G groups of channels."""

    def __init__(self, layer: QuantLayer):
        self.layer, self.groups, self.count = layer, layer.groups, 0
        inputs = math.prod(layer.weight_shape[1:])
        self.sum = torch.zeros(self.groups, inputs, inputs, dtype=torch.float32, device=layer.weight.device)

    def add(self, x: Tensor) -> None:
        """Add what the layer multiplies: x [..., K] of a linear layer, [N, C, H, W] of a convolution."""
        for columns in self._unfolded(x):  # [samples, G, K]
            self.count += len(columns)
            for g in range(self.groups):
                own = columns[:, g]
                self.sum[g].addmm_(own.T, own)

    def _unfolded(self, x: Tensor) -> Iterator[Tensor]:
        if not isinstance(self.layer, nn.Conv2d):
            yield x.reshape(-1, 1, x.shape[-1])
            return
        conv, taps = self.layer, self.layer.kernel_size[0] * self.layer.kernel_size[1]
        for part in x.split(max(1, UNFOLDED // (x[0].numel() * taps))):
            padded = F.pad(part, conv._reversed_padding_repeated_twice)  # also where padding is given by name
            unfolded = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)  # [N, C taps, positions]
            yield unfolded.transpose(1, 2).reshape(-1, self.groups, self.sum.shape[1])

    def mean(self) -> Tensor:
        """Return H in float64. Raises ValueError where nothing was added, FloatingPointError if it is not finite."""
        if not self.count:
            raise ValueError(f"layer {self.layer.input_quantizer.name}: no calibration row reaches it")
        if not self.sum.isfinite().all():
            raise FloatingPointError(f"layer {self.layer.input_quantizer.name}: its calibration input is not finite")
        return self.sum.double() * (2 / self.count)


@contextmanager
def observed(layers: dict[str, QuantLayer]) -> Iterator[dict[str, Hessian]]:
    """While inside, every call of a layer adds to its Hessian what it multiplies: its input, quantized if it is."""
    hessians = {name: Hessian(layer) for name, layer in layers.items()}

    def hook(hessian):
        return lambda _, args, qparams: hessian.add(fake_quantize(args[0], qparams))

    with hooked(layer.input_quantizer.register_forward_hook(hook(hessians[n])) for n, layer in layers.items()):
        yield hessians


def compensated(weight: Tensor, hessian: Tensor, qparams: QParams, block: int = BLOCK) -> Tensor:
    """Return the weights [O, K] whose nearest codes are GPTQ's: each as it was, less what it makes good.

    hessian: [K, K], float64. qparams: scale and zero point broadcast against the weight. Inputs that are always zero
    get the weight zero. Raises FloatingPointError where the Hessian cannot be factored.
    """
    scale, zero_point, spec = qparams
    hessian = hessian.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _upper(hessian[order][:, order])
    left = weight.double().masked_fill(unused, 0)[:, order]
    scale, zero_point = (t.expand_as(weight)[:, order] for t in (scale, zero_point))
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, len(order), block):
        last = min(first + block, len(order))
        errors = left.new_empty(len(left), last - first)
        for k in range(first, last):
            # In float32, as a layer does, so that a weight nothing was taken from keeps its nearest code.
            result[:, k] = left[:, k]
            rounded = quantize(result[:, k], QParams(scale[:, k], zero_point[:, k], spec)).dequantize()
            errors[:, k - first] = (left[:, k] - rounded) / factor[k, k]
            left[:, k + 1 : last].addr_(errors[:, k - first], factor[k, k + 1 : last], alpha=-1)
        left[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return result[:, order.argsort()]


def _upper(hessian: Tensor) -> Tensor:
    """Return U with H^-1 = U^T U, of the damped Hessian."""
    share = DAMPING * hessian.diagonal().mean()
    for attempt in range(RETRIES + 1):
        damped = hessian.clone()
        damped.diagonal().add_((1 + 0.1 * attempt) * share)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and factor.isfinite().all():
            return factor
    raise FloatingPointError(f"the Hessian cannot be factored, also with {1 + 0.1 * RETRIES:.0f} times the damping")


@torch.no_grad()
def round_weight(layer: QuantLayer, hessian: Hessian, block: int = BLOCK) -> Tensor:
    """Return a layer's weights after GPTQ, see `compensated`; its ranges must be chosen. Groups are rounded apart.

    Raises FloatingPointError, which names the layer, where the Hessian is not finite or cannot be factored.
    """
    weight, (scale, zero_point, spec) = layer.weight, layer.weight_quantizer.qparams
    groups = (t.expand_as(weight).flatten(1).chunk(hessian.groups) for t in (weight, scale, zero_point))
    parts = zip(*groups, hessian.mean(), strict=True)
    try:
        rounded = [compensated(w, h, QParams(s, z, spec), block) for w, s, z, h in parts]
    except FloatingPointError as error:
        raise FloatingPointError(f"layer {layer.input_quantizer.name}: {error}") from error
    return torch.cat(rounded).view(weight.shape)


@torch.no_grad()
def gptq(denoiser: nn.Module, calibration: CalibrationSet, quantized: bool) -> None:
    """Round the weights of every layer by GPTQ, with H from all rows of the calibration set.

    denoiser: quantized, its weights are Parameters and their ranges are chosen; afterwards the nearest code of each
    weight is GPTQ's. quantized: inputs come from the network whose layers before are rounded and whose activations are
    quantized if they have ranges. Otherwise they come from full precision. Time groups play no part.
    Raises ValueError for a layer that no row reaches, and FloatingPointError where a Hessian is not finite.
    """
    layers = {n: m for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.bits < FLOAT}
    (_one_by_one if quantized else _in_full_precision)(denoiser, layers, calibration)
    cost.record(denoiser, STAGE, [m.weight for m in layers.values()], 1, len(calibration))


def _in_full_precision(denoiser: nn.Module, layers: dict[str, QuantLayer], calibration: CalibrationSet) -> None:
    """One pass for all layers, or one for each part of them whose Hessians fit into half of the memory."""
    at_once = chunk_rows(denoiser, calibration.inputs(torch.arange(1, device="cpu")))
    everything = dict(quant_layers(denoiser)).values()
    found = {}
    for part in _fitting(layers, int(memory.SHARE * memory.budget(denoiser.device.type))):
        floats = multiplying(everything, [layer.float_weight for layer in everything])
        with float_activations(input_quantizers(denoiser).values()), floats, observed(part) as hessians:
            for chunk in torch.arange(len(calibration), device="cpu").split(at_once):
                denoiser.forward(**calibration.inputs(chunk))
        for name in part:
            found[name] = round_weight(part[name], hessians.pop(name))
    for name, weight in found.items():
        layers[name].weight.data.copy_(weight)


def _fitting(layers: dict[str, QuantLayer], room: int) -> Iterable[dict[str, QuantLayer]]:
    """Parts of the layers whose Hessians take at most `room` bytes together, or one layer."""
    part, size = {}, 0
    for name, layer in layers.items():
        own = 4 * math.prod(layer.weight_shape[1:]) ** 2 * layer.groups
        if part and size + own > room:
            yield part
            part, size = {}, 0
        part[name], size = layer, size + own
    if part:
        yield part


def _one_by_one(denoiser: nn.Module, layers: dict[str, QuantLayer], calibration: CalibrationSet) -> None:
    """One pass over all rows that stops at every layer: it is rounded there, and the pass goes on with its output."""
    n, device, waiting = len(calibration), denoiser.device, memory.waiting(denoiser.device.type)
    everything = torch.arange(n, device="cpu")

    def visit(unit, forwards, name, *args, **kwargs) -> Tensor:
        call = partial(call_modules, [forwards[name]], args=args, kwargs=kwargs, n=n, device=device)
        if name in layers:
            with observed({name: layers[name]}) as hessians:
                for chunk in everything.split(waiting.chunk):
                    call(chunk)
            layers[name].weight.data.copy_(round_weight(layers[name], hessians[name]))
            layers[name].freeze()
        return fill(call, everything, n, waiting)

    walk(denoiser, calibration, everything, visit, STAGE, waiting, ALONE)
    for layer in layers.values():
        layer.thaw()
