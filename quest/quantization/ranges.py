"""Choosers of ranges: functions that compute scale and zero point for a tensor.

Every chooser has the signature `choose(x, spec) -> (scale, zero_point)`. With `spec.axis` None both have no dimensions.
Otherwise they have as many dimensions as x, all of size 1 but the axis, so that they broadcast against x.

At 4 bits (codes 0 to 15), for a tensor with values from -0.3 to 6.0:

    chooser   range           scale   zero point
    minmax    [-0.3, 6.0]     0.42        1        reaches every value; steps are wide
    mse       [-0.15, 3.0]    0.21        1        if few values exceed 3.0: they are clipped, the others are finer
"""

from dataclasses import replace

import torch
from torch import Tensor

from quest.affine import QuantSpec, Table, clamp_
from quest.quantization.prologue import along

EPS = 1e-8
BINS = 2048  # most bins of the histogram that replaces a large tensor in the search; 8 per step of an 8-bit code


def in_rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape x to [channels, values]; to one row if there is one range per tensor."""
    return x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)


def _shaped(value: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape a value for each channel, [channels], so that it broadcasts against x."""
    return value.reshape(()) if spec.axis is None else along(value, x, spec.axis)


def affine(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the scale and the unrounded zero point whose codes reach from low to high.

    The range is not widened to include zero.
    """
    if spec.symmetric:
        scale = (torch.maximum(low.abs(), high.abs()) / spec.qmax).clamp(min=EPS)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=EPS)
    return scale, -low / scale


def minmax(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Choose the whole range of x, widened to include zero.

    Q-Diffusion's code computes the scale from the raw range and the zero point from the widened one. For a tensor
    without negative (or without positive) values, this shifts the range away from the values. Here both come from the
    widened range. For other tensors the two ranges are equal.
    """
    return from_range(*extremes(x, spec), x, spec)


def from_range(low: Tensor, high: Tensor, x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the range from low to high, [channels] each, shaped to broadcast against x."""
    scale, zero_point = affine(low, high, spec)
    return _shaped(scale, x, spec), _shaped(zero_point.round(), x, spec)


def of_groups(x: Tensor, spec: QuantSpec, choose) -> tuple[Tensor, Tensor]:
    """Choose a range for each group of channels of an activation, [1, ..., groups, ..., 1] (`QuantSpec.group`).

    That of a group of equal values reaches from zero to this value.
    """
    alone, found = replace(spec, axis=None, group=None, narrow=spec.symmetric or None), []
    for part in x.split(spec.group, spec.axis):
        constant = part.amin() == part.amax()
        found.append((minmax if constant else choose)(part, alone))
    own = replace(spec, group=None)
    return tuple(_shaped(torch.stack(values), x, own) for values in zip(*found, strict=True))


def of_widths(x: Tensor, spec: QuantSpec, choose) -> tuple[Tensor, Tensor]:
    """Choose the range of each output channel of a weight by its own bits (`QuantSpec.widths`)."""
    scale = x.new_empty(len(x), *[1] * (x.ndim - 1))
    zero_point = torch.empty_like(scale)
    for width in sorted(set(spec.widths)):
        own = torch.tensor([width == each for each in spec.widths], dtype=torch.bool, device=x.device)
        scale[own], zero_point[own] = choose(x[own], QuantSpec(int(width), axis=0))
    return scale, zero_point


def always_zero(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Choose [0, max] with zero point 0, as Q-Diffusion (arXiv:2302.04304) does for softmax probabilities."""
    high = in_rows(x, spec).amax(1)
    scale = (high / (spec.qmax - spec.qmin)).clamp(min=EPS)
    return _shaped(scale, x, spec), _shaped(torch.zeros_like(scale), x, spec)


def mse(x: Tensor, spec: QuantSpec, steps: int = 80, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """Choose the range with the smallest mean |x - x~|^2.4 among the 80 ranges (1 - 0.01 i) [min, max], i = 0 to 79.

    This is the search of BRECQ (arXiv:2102.05426) and Q-Diffusion. The range is not widened to include zero. All
    channels are searched at once. The zero point, round(-min / scale), is the same for all 80 ranges, because the scale
    shrinks with the minimum. So only the extremes of x decide it, see `mse_zero_point`.
    """
    return _shrunk(x, spec, steps, power, (torch.round,))


def mse_zero_point(x: Tensor, spec: QuantSpec, steps: int = 80, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """Search as `mse` does, but try every range with its zero point rounded down and rounded up.

    This departs from BRECQ's search. There, at 4 bits, a single calibration value can decide whether negative outputs
    of a SiLU survive. Their minimum is -0.278. If the largest value exceeds 8.07, the zero point is rounded to 0 and
    all negative values are clipped. No later learning moves a zero point.
    """
    return _shrunk(x, spec, steps, power, (torch.floor, torch.ceil))


def mse_free(x: Tensor, spec: QuantSpec, steps: int = 80, power: float = 2.4) -> tuple[Tensor, Tensor]:
    """Search as `mse` does, with zero points that are not rounded: for tables of small floats."""
    return _shrunk(x, spec, steps, power, (lambda zero_point: zero_point,))


def mse_shifted(x: Tensor, spec: QuantSpec, agreement: float = 0.85) -> tuple[Tensor, Tensor]:
    """Choose one range as `mse_zero_point` does, and a power of two for each channel (DMQ, arXiv:2507.12933).

    x [samples, ..., C, ...] with C on `spec.axis`, not 0. Candidates are the scale times 2^-k, k = 0 to `spec.shifts`,
    with the zero point of the whole tensor. Each sample votes for the one with the least squared error of a channel.
    The most frequent k is taken if its share of the votes is at least `agreement`, else 0.
    """
    scale, zero_point = mse_zero_point(x, replace(spec, axis=None, shifts=None))
    rows = x.movedim(spec.axis, 1).flatten(2)  # [samples, C, values]
    flat = rows.flatten(0, 1)

    def error(k: int) -> Tensor:
        scales, zero_points = (t.expand(len(flat)) for t in (scale * 2.0**-k, zero_point))
        return (_dequantized(flat, scales, zero_points, spec) - flat).square().mean(1)

    votes = torch.stack([error(k) for k in range(spec.shifts + 1)]).argmin(0).view(rows.shape[:2])  # [samples, C]
    counts = torch.stack([(votes == k).sum(0) for k in range(spec.shifts + 1)])  # [shifts + 1, C]
    most, k = counts.max(0)
    k = torch.where(most >= agreement * len(rows), k, 0)
    return _shaped(scale * 2.0**-k, x, spec), _shaped(zero_point.expand(len(k)), x, spec)


SEARCHED = {"mse-zero-point": mse_zero_point, "mse": mse}  # by their names in recipes


def _shrunk(x: Tensor, spec: QuantSpec, steps: int, power: float, roundings) -> tuple[Tensor, Tensor]:
    """Choose the best of the ranges (1 - 0.01 i) [min, max], each with its zero point rounded in all of these ways."""
    if spec.axis is None and x.numel() > 4 * BINS and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)  # the order of so many values plays no part, and this one needs no copy
    rows = in_rows(x, spec)
    factors = 1.0 - 0.01 * torch.arange(steps, device=rows.device, dtype=rows.dtype)[:, None]
    scale, zero_point = affine(factors * rows.amin(1), factors * rows.amax(1), spec)
    scale, zero_point = scale.repeat(len(roundings), 1), torch.cat([rounded(zero_point) for rounded in roundings])
    best = least_error(rows, scale, zero_point, spec, power)
    return tuple(_shaped(v.gather(0, best)[0], x, spec) for v in (scale, zero_point))


def least_error(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, power: float = 2.4) -> Tensor:
    """Return the index of the candidate with the least mean |x - x~|^power for each channel, [1, channels].

    rows are [channels, values]; scale and zero_point are [candidates, channels]. If a channel has more than 4 * 2048
    values, candidates are scored on a histogram between the channel's minimum and maximum. It has 2048 bins, or 32 per
    code if that is fewer. On activations this takes a hundredth of the time.
    """
    counts = None
    if rows.shape[1] > 4 * BINS:
        rows, counts = _histogram(rows, rows.amin(1), rows.amax(1), min(BINS, 32 * 2**spec.bits))
    scores = []
    for s, z in zip(*(v.split(max(1, 2**18 // rows.numel())) for v in (scale, zero_point)), strict=True):
        # |e|^p is computed as exp(p/2 log e^2), in half the time of pow. The same range is chosen.
        error = _dequantized(rows, s, z, spec).sub_(rows).square_().log_().mul_(power / 2).exp_()
        scores.append((error if counts is None else error.mul_(counts)).mean(-1))
    return torch.cat(scores).argmin(0, keepdim=True)


def _histogram(rows: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return bin centres and counts of each row, both [channels, bins]. A single row comes without its empty bins."""
    width = ((high - low) / bins).clamp(min=EPS)[:, None]
    centres = low[:, None] + (torch.arange(bins, dtype=rows.dtype, device=rows.device) + 0.5) * width
    if len(rows) == 1:
        # A float32 counts to 2^24 and no further.
        counts = sum(part.histc(bins, low.item(), high.item()) for part in rows[0].split(2**24))
        found = counts > 0  # long tails leave many bins empty
        return centres[:, found], counts[None, found]
    index = ((rows - low[:, None]) / width).long().clamp_(max=bins - 1)
    index += torch.arange(len(rows), device=rows.device)[:, None] * bins
    counts = index.flatten().bincount(minlength=len(rows) * bins).reshape(-1, bins)
    return centres, counts.to(rows.dtype)


def _dequantized(rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize rows [channels, values]; scale and zero_point are [..., channels]."""
    s, z = scale[..., None], zero_point[..., None]
    if spec.table is not None:
        return Table.named(spec.table).nearest(rows / s + z, spec.symmetric).sub_(z).mul_(s)
    return clamp_((rows / s).round_(), spec.qmin - z, spec.qmax - z).mul_(s)


def percentile(
    x: Tensor, spec: QuantSpec, candidates: tuple[float, ...] = (0.999, 0.9999, 0.99999)
) -> tuple[Tensor, Tensor]:
    """Choose the percentile range with the smallest squared error, as QuEST's released code does for activations.

    For each candidate p, the range reaches from the quantile 1 - p to the quantile p. torch.quantile takes at most 2^24
    values, so every second (third, ...) value of a longer channel is used.
    """
    rows = in_rows(x, spec)
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
    """Return minimum and maximum of x, widened to include zero, [channels] each."""
    rows = in_rows(x, spec)
    return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)


def positive(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return 0 and the maximum of x, [channels] each, as the range of probabilities."""
    high = in_rows(x, spec).amax(1)
    return torch.zeros_like(high), high


class Running:
    """A chooser that returns the running average of the ranges of all batches so far.

    find(x, spec) -> (low, high) is the range of one batch. The average starts with the first range. Each further range
    has the weight 1 - momentum.
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
