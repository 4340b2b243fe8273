"""Choosing a scale and zero point for a tensor.

Every chooser has the signature `choose(x, spec) -> (scale, zero_point)`. With `spec.axis` None both are 0-dimensional;
else they keep x's number of dimensions, with size 1 everywhere but at the axis, so that they broadcast against x.
"""

import torch
from torch import Tensor

from quest.affine import QuantSpec, clamp_

EPS = 1e-8
BINS = 2048  # at most, of the histogram that stands for a large tensor in the search: 8 to a step of an 8-bit code


def _rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """x as [channels, values]; one row for a per-tensor spec."""
    return x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)


def _shaped(value: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """[channels] -> a shape that broadcasts against x."""
    if spec.axis is None:
        return value.reshape(())
    shape = [1] * x.ndim
    shape[spec.axis] = -1
    return value.reshape(shape)


def affine(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point, not yet rounded, whose codes reach from low to high; taken as it is, zero inside or not."""
    if spec.symmetric:
        scale = (torch.maximum(low.abs(), high.abs()) / spec.qmax).clamp(min=EPS)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=EPS)
    return scale, -low / scale


def minmax(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The whole range of x, widened to hold zero.

    Q-Diffusion's code takes the scale from the raw range and the zero point from the widened one, which shifts a
    one-signed tensor out of its own range. Here both come from the widened range; for two-signed tensors the two agree.
    """
    return from_range(*extremes(x, spec), x, spec)


def from_range(low: Tensor, high: Tensor, x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range from low to high, [channels] each, in the shape that goes with x."""
    scale, zero_point = affine(low, high, spec)
    return _shaped(scale, x, spec), _shaped(zero_point.round(), x, spec)


def always_zero(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """[0, max]: the range of softmax probabilities in Q-Diffusion (arXiv:2302.04304), zero point 0."""
    high = _rows(x, spec).amax(1)
    scale = (high / (spec.qmax - spec.qmin)).clamp(min=EPS)
    return _shaped(scale, x, spec), _shaped(torch.zeros_like(scale), x, spec)


def mse(x: Tensor, spec: QuantSpec, steps: int = 80, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """The range with the smallest mean |x - x~|^2.4 among 80 joint shrinkings (1 - 0.01 i) [min, max].

    The search of BRECQ (arXiv:2102.05426) and Q-Diffusion. The range is not widened to hold zero. All channels are
    searched at once. The zero point, round(-min / scale), is the same for all shrinkings: the extremes of x alone
    decide it, see `mse_zero_point`.
    """
    return _shrunk(x, spec, steps, power, (torch.round,))


def mse_zero_point(x: Tensor, spec: QuantSpec, steps: int = 80, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """As `mse`, with each range tried with its zero point rounded down and rounded up.

    A departure from BRECQ's search, in which at 4 bits a single calibration value can decide whether the negative
    outputs of a SiLU survive. Their minimum is -0.278, so the zero point becomes 0 where the largest value seen exceeds
    8.07, and all negative values are then clipped. Nothing that is learned afterwards moves a zero point.
    """
    return _shrunk(x, spec, steps, power, (torch.floor, torch.ceil))


SEARCHED = {"mse-zero-point": mse_zero_point, "mse": mse}  # names in recipes


def _shrunk(x: Tensor, spec: QuantSpec, steps: int, power: float, roundings) -> tuple[Tensor, Tensor]:
    """The best of the ranges (1 - 0.01 i) [min, max], each with its zero point rounded in all these ways."""
    rows = _rows(x, spec)
    factors = 1.0 - 0.01 * torch.arange(steps, device=rows.device, dtype=rows.dtype)[:, None]
    scale, zero_point = affine(factors * rows.amin(1), factors * rows.amax(1), spec)
    scale, zero_point = scale.repeat(len(roundings), 1), torch.cat([rounded(zero_point) for rounded in roundings])
    best = least_error(rows, scale, zero_point, spec, power)
    return tuple(_shaped(v.gather(0, best)[0], x, spec) for v in (scale, zero_point))


def least_error(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, power: float = 2.4) -> Tensor:
    """Which candidate of scale and zero_point, [candidates, channels], has the least mean |x - x~|^power: an index.

    rows [channels, values] -> [1, channels]. Where channels hold more than 4 * 2048 values, candidates are scored on a
    histogram of 2048 bins (32 for every code where that is fewer) between the channel's minimum and maximum: a
    hundredth of the cost on activations.
    """
    counts = None
    if rows.shape[1] > 4 * BINS:
        rows, counts = _histogram(rows, rows.amin(1), rows.amax(1), min(BINS, 32 * 2**spec.bits))
    scores = []
    for s, z in zip(*(v.split(max(1, 2**18 // rows.numel())) for v in (scale, zero_point)), strict=True):
        # |e|^p as exp(p/2 log e^2): half the time of pow, and the same range is chosen.
        error = _dequantized(rows, s, z, spec).sub_(rows).square_().log_().mul_(power / 2).exp_()
        scores.append((error if counts is None else error.mul_(counts)).mean(-1))
    return torch.cat(scores).argmin(0, keepdim=True)


def _histogram(rows: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Bin centres and counts of each row, both [channels, bins]; of a single row, without its empty bins."""
    width = ((high - low) / bins).clamp(min=EPS)[:, None]
    centres = low[:, None] + (torch.arange(bins, dtype=rows.dtype, device=rows.device) + 0.5) * width
    if len(rows) == 1:
        counts = rows.histc(bins, low.item(), high.item())
        found = counts > 0  # wide tails leave many bins empty
        return centres[:, found], counts[None, found]
    index = ((rows - low[:, None]) / width).long().clamp_(max=bins - 1)
    index += torch.arange(len(rows), device=rows.device)[:, None] * bins
    counts = index.flatten().bincount(minlength=len(rows) * bins).reshape(-1, bins)
    return centres, counts.to(rows.dtype)


def _dequantized(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """rows [channels, values] through codes and back; scale and zero_point [..., channels]."""
    s, z = scale[..., None], zero_point[..., None]
    return clamp_((rows / s).round_(), spec.qmin - z, spec.qmax - z).mul_(s)


def percentile(
    x: Tensor, spec: QuantSpec, candidates: tuple[float, ...] = (0.999, 0.9999, 0.99999)
) -> tuple[Tensor, Tensor]:
    """The two-sided percentile range with the smallest squared error: QuEST's released default for activations.

    Channels of more than 2^24 values (the limit of torch.quantile) are strided through.
    """
    rows = _rows(x, spec)
    rows = rows[:, :: -(-rows.shape[1] // 2**24)]
    best = torch.full_like(rows[:, 0], torch.inf)
    scale, zero_point = torch.ones_like(best), torch.zeros_like(best)
    for p in candidates:
        s, z = affine(rows.quantile(1 - p, dim=1), rows.quantile(p, dim=1), spec)
        z = z.round()
        score = _dequantized(rows, s, z, spec).sub_(rows).square_().mean(1)
        better = score < best
        best = torch.where(better, score, best)
        scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
    return _shaped(scale, x, spec), _shaped(zero_point, x, spec)


def extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of x, widened to hold zero, [channels] each."""
    rows = _rows(x, spec)
    return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)


def positive(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """0 and the maximum of x, [channels] each: the range of probabilities."""
    high = _rows(x, spec).amax(1)
    return torch.zeros_like(high), high


class Running:
    """A chooser with a memory: the running average of the ranges of the batches it has met.

    find(x, spec) -> (low, high) is the range of one batch. The first one counts in full, each further one is mixed in
    with weight 1 - momentum.
    """

    def __init__(self, momentum: float, find=extremes):
        self.momentum, self.find = momentum, find
        self.low = self.high = None

    def __call__(self, x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        low, high = self.find(x, spec)
        if self.low is not None:
            low, high = torch.lerp(low, self.low, self.momentum), torch.lerp(high, self.high, self.momentum)
        self.low, self.high = low, high
        return from_range(low, high, x, spec)
