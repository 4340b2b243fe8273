"""SVDQuant (arXiv:2411.05007): factors of input channels and a low-rank branch that make a weight easy to quantize.

One layer at a time, on inputs x of full precision, with y = W x as the target:

1. Smooth: divide channel c of x by s_c and multiply it in W, s_c = max|x_c|^alpha / max|W_c|^beta. The candidates are
   no smoothing, beta = 0 and beta = 1 - alpha, each at the first branch of step 2.
2. Branch: L is the best approximation of rank r of W - Q, with Q = 0 at first and then the codes of W - L, until the
   output error rises. It takes what codes represent worst: a few directions that are far larger than the others.
3. Round what is left, to nearest or by GPTQ.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quest.affine import FLOAT
from quest.diffusion.calibration_set import CalibrationSet
from quest.diffusion.denoisers import changed
from quest.learning.gptq import observed, round_weight
from quest.learning.reconstruction import float_activations, multiplying
from quest.learning.units import ALONE, call_modules, fill, walk
from quest.quantization import cost, ranges
from quest.quantization.attention import QuantAttention
from quest.quantization.branch import Branch
from quest.quantization.layers import QuantLayer
from quest.runtime import memory

STAGE = "SVDQuant"
LEAST = 1e-5  # of max|W_c| in the factor of a channel, as released
BRANCHLESS = 8  # weight bits from which a layer gets neither factors nor a branch


def rank_of(outputs: int, inputs: int) -> int:
    """Return the rank that fits a layer: a power of two up to a sixteenth of its channels, from 4 to 32.

    4 up to 96 channels, 8 for 128, 16 for 320, 32 from 512 on; the paper's models have 1152 and more and rank 32.
    """
    return min(32, max(4, 2 ** int(math.log2(max(1, min(outputs, inputs) / 16)))))


def factored(weight: Tensor, rank: int) -> Branch:
    """Return the best approximation of a weight [O, ...] of this rank: D = V_r^T and U = U_r S_r of its SVD."""
    left, values, right = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    down = right[:rank].view(-1, *weight.shape[1:])
    return Branch(down, left[:, :rank] * values[:rank])


def kept_channels(weight: Tensor, largest: Tensor, rank: int) -> Branch:
    """Return the branch that keeps whole input channels, as large as one of this rank: the control of equal size.

    largest: [C], max|x_c|. Channels with the largest max|x_c| times |W_c| are kept.
    """
    outputs, inputs, *taps = weight.shape
    share = rank * (math.prod(weight.shape[1:]) + outputs) / (outputs * math.prod(taps))
    norms = weight.transpose(0, 1).flatten(1).norm(dim=1)
    chosen = (norms * largest).topk(min(inputs, max(1, round(share)))).indices.sort().values
    return Branch(weight[:, chosen], None, chosen)


def exponent_pairs(grid: int) -> list[tuple[float, float]]:
    """Return (alpha, beta) of no smoothing, of beta = 0 and of beta = 1 - alpha, for each alpha = i / grid below 1."""
    alphas = [i / grid for i in range(1, grid)]
    return [(0.0, 0.0), *((alpha, 0.0) for alpha in alphas), *((alpha, 1 - alpha) for alpha in alphas)]


def weight_reach(weights: Iterable[Tensor]) -> Tensor:
    """Return max|W_c|, [C]: the largest |weight| of an input channel, over the outputs and taps of these weights."""
    return torch.stack([w.detach().abs().transpose(0, 1).flatten(1).amax(1) for w in weights]).amax(0)


def factors(largest: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """Return s [C] = max|x_c|^alpha / max|W_c|^beta, 1 for a channel that is always zero, with geometric mean 1.

    A common factor changes nothing, and around 1 the branch's float16 is far from its limits.
    """
    logarithm = alpha * largest.clamp(min=LEAST).log() - beta * weight_reach([weight]).clamp(min=LEAST).log()
    used = largest > 0
    logarithm = torch.where(used, logarithm - logarithm[used].mean() if used.any() else 0.0, 0.0)
    return logarithm.clamp(-10, 10).exp()


@dataclass
class Decomposed:
    """A layer while its factors and its branch are searched."""

    layer: QuantLayer
    run: Callable[[], Iterable[tuple[Tensor, Tensor]]]  # for all rows: the layer's output, and that of full precision
    largest: Tensor  # [C], max|x_c|
    calibrate: Callable  # sets the range of a static input quantizer

    def __post_init__(self):
        self.weight = self.layer.weight.detach().clone()

    def smooth(self, alpha: float, beta: float) -> Tensor:
        """Give the layer no branch and these factors. Returns its weight with them."""
        self.layer.weight.data.copy_(self.weight)
        self.layer.prologue = self.layer.branch = None
        if alpha or beta:
            self.layer.scale_input(factors(self.largest, self.weight, alpha, beta))
        self.calibrate()
        return self.layer.weight.detach().clone()

    def error(self, smoothed: Tensor, branch: Branch | None) -> float:
        """The squared output error with this branch beside the nearest codes of what it leaves."""
        self.layer.weight.data.copy_(smoothed)
        self.layer.branch = None
        if branch is not None:
            self.layer.add_branch(branch)
        self.layer.choose_weight_range(ranges.mse)
        return sum((output - target).double().square().sum().item() for output, target in self.run())

    def first(self, smoothed: Tensor, rank: int, channels: bool) -> Branch | None:
        if not rank:
            return None
        if channels:
            largest = self.largest if self.layer.prologue is None else self.largest * self.layer.prologue.multiplier
            return kept_channels(smoothed, largest, rank)
        return factored(smoothed, rank)

    def search(self, candidates: Iterable[tuple[float, float]], rank: int, channels: bool, most: int) -> list[float]:
        """Steps 1 and 2, with at most so many alternations. Returns the errors that were kept, each below the last."""
        found = []
        for alpha, beta in candidates:
            smoothed = self.smooth(alpha, beta)
            found.append((self.error(smoothed, self.first(smoothed, rank, channels)), alpha, beta))
        best, alpha, beta = min(found)
        smoothed = self.smooth(alpha, beta)
        branch, kept = self.first(smoothed, rank, channels), [best]
        self.error(smoothed, branch)
        for _ in range(most - 1 if rank and not channels else 0):
            other = factored(smoothed - self.layer.qweight.dequantize(), rank)
            if (error := self.error(smoothed, other)) >= kept[-1]:
                break
            branch = other
            kept.append(error)
        self.error(smoothed, branch)
        return kept


@torch.no_grad()
def decompose(
    denoiser: nn.Module,
    layers: dict[str, QuantLayer],
    calibration: CalibrationSet,
    *,
    iterations: int,
    grid: int,
    rank: int | None,
    channels: bool,
    gptq: bool,
    choose: Callable,
) -> dict[str, list[float]]:
    """Give each of these layers its factors and its branch, on all rows of the calibration set, and round the rest.

    denoiser: quantized, its weights are Parameters. iterations: most alternations. grid: alpha is i / grid. rank: of
    every branch, 0 for none; None for `rank_of`. channels: keep whole channels in place of directions. gptq: round by
    GPTQ, else to nearest. choose: the range of a static input, here one for all timesteps. Returns the errors of each
    layer, see `Decomposed.search`.
    Layers with BRANCHLESS bits or more, and grouped convolutions, only get their ranges. Raises FloatingPointError,
    which names the layer, for an input that is not finite.
    """
    n, device, waiting = len(calibration), denoiser.device, memory.waiting(denoiser.device.type)
    everything, candidates = torch.arange(n, device="cpu"), exponent_pairs(grid)
    errors: dict[str, list[float]] = {}

    def visit(unit, forwards, name, *args, **kwargs) -> Tensor:
        call = partial(call_modules, [forwards[name]], args=args, kwargs=kwargs, n=n, device=device)
        if name not in layers:
            return fill(call, everything, n, waiting)
        layer = layers[name]
        with float_activations([layer.input_quantizer]), multiplying([layer], [layer.weight]):
            exact = fill(call, everything, n, waiting)
        layer.choose_weight_range(ranges.mse)
        decomposable = layer.weight_quantizer.spec.bits < BRANCHLESS and layer.groups == 1
        x = args[0]

        def run():
            heads = len(exact) // n
            for chunk in everything.split(waiting.chunk):
                yield call(chunk), exact[chunk[0] * heads : (chunk[-1] + 1) * heads].to(device)

        def calibrate():
            layer.input_quantizer.calibrate(layer.prepared(x.to(device))[0], choose)

        calibrate()
        if decomposable:
            axis = layer.channels % x.ndim
            largest = x.abs().amax([d for d in range(x.ndim) if d != axis]).to(device)
            if not largest.isfinite().all():  # no candidate would have the least error
                raise FloatingPointError(f"layer {name}: its calibration input holds NaN or infinite values")
            outputs, inputs = layer.weight_shape[:2]
            own = min(rank_of(outputs, inputs) if rank is None else rank, outputs, math.prod(layer.weight_shape[1:]))
            errors[name] = Decomposed(layer, run, largest, calibrate).search(candidates, own, channels, iterations)
        if gptq:
            with observed({name: layer}) as hessians:
                for _ in run():
                    pass
            layer.weight.data.copy_(round_weight(layer, hessians[name]))
        return exact

    others = [q for m in denoiser.modules() if isinstance(m, QuantAttention) for q in (m.q, m.k, m.v, m.p)]
    floats = [m for m in denoiser.modules() if isinstance(m, QuantLayer) and m.weight_quantizer.spec.bits == FLOAT]
    # Without its groups, the first range of an input quantizer holds for all timesteps.
    for_all_timesteps = changed([layer.input_quantizer for layer in layers.values()], "groups", None)
    with float_activations([*others, *(m.input_quantizer for m in floats)]), for_all_timesteps:
        walk(denoiser, calibration, everything, visit, STAGE, waiting, ALONE)
    learned = [b for m in layers.values() if m.branch is not None for b in m.branch.buffers()]
    cost.record(denoiser, STAGE, learned, len(candidates), n)
    return errors
