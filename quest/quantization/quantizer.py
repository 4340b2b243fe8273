"""The quantizer of one tensor: its format, and a scale and a zero point for each time group.

A layer's input with a range of [-1, 2] in noisy steps and of [-0.5, 1] in the last ones, at 4 bits (codes 0 to 15):

    group   timesteps    scale     zero point    code 0     code 15
    0       951..502     0.2           5         -1.0        2.0
    1       501..0       0.1           5         -0.5        1.0

With one group, all steps would share the first row, and the last steps would use only half of the codes.

A dynamic quantizer has no ranges: its kernel computes them from each tensor (`quest.affine.measured`). Its scale is the
clip ratio, 1 unless a method searches it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quest.affine import FLOAT, QParams, QuantSpec
from quest.quantization import ranges
from quest.quantization.timegroups import TimeGroups

GROUPED = "time groups: a dynamic format takes its scales from each tensor, so groups of timesteps have no meaning"


class Numbers:
    """Scales and zero points of all groups, [T] each, as plain numbers. They are read from the memory of the tensors,
    so that they follow what is written there."""

    def __init__(self, *tensors: Tensor):
        self.views = [memoryview(t.detach().numpy()) for t in tensors]  # a view also keeps the memory alive
        self.addresses = [t.data_ptr() for t in tensors]

    def __reduce__(self):
        return Numbers, tuple(torch.tensor(view.tolist(), dtype=torch.float32, device="cpu") for view in self.views)

    def are_of(self, *tensors: Tensor) -> bool:
        return [t.data_ptr() for t in tensors] == self.addresses

    def of(self, group: int) -> list[float]:
        return [view[group] for view in self.views]


class Quantizer(nn.Module):
    """scale [T, *shape] (a parameter), zero_point [T, *shape] (a buffer).

    T is the number of time groups, 1 without them. A call with a tensor returns the `QParams` with which to quantize
    it; the kernel quantizes. TAQuant is a Quantizer with time groups.
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), groups: TimeGroups | None = None):
        super().__init__()
        if spec.dynamic and groups is not None:
            raise ValueError(GROUPED)
        self.spec, self.groups = spec, groups
        self.name = ""  # the name of its layer, for error messages
        # NaN until calibration, so that nobody takes an uncalibrated quantizer for a calibrated one. Float and dynamic
        # formats need none.
        scale, zero_point = (1.0, 0.0) if spec.bits == FLOAT or spec.dynamic else (torch.nan, torch.nan)
        shape = (len(groups) if groups else 1, *shape)
        start = torch.full(shape, scale, dtype=torch.float32, device="cpu")  # independent of torch's defaults
        self.scale = nn.Parameter(start, requires_grad=False)
        self.register_buffer("zero_point", torch.full_like(self.scale.data, zero_point))
        self.choose: Callable | None = None  # chooses ranges during calibration, see quest.learning.calibrate
        self.numbers: Numbers | None = None  # see `as_numbers`
        self.may_be_constant = False
        self.size: int | None = None  # of the dimension whose scales are of groups, in static formats

    def make_dynamic(self, spec: QuantSpec) -> None:
        """Take this dynamic format, with clip ratio 1. Raises ValueError for a quantizer with time groups."""
        if self.groups is not None:
            raise ValueError(GROUPED)
        self.spec = spec
        self.scale.data, self.zero_point = torch.ones_like(self.scale.data), torch.zeros_like(self.zero_point)

    def as_numbers(self, wanted: bool) -> None:
        """Return plain numbers in `QParams` from now on, which the integer kernel reads fast; or tensors again."""
        self.numbers = Numbers(self.scale, self.zero_point) if wanted else None

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.as_numbers(self.numbers is not None)

    def _apply(self, fn, recurse=True):
        # Memory formats are for images and weights of convolutions. A flat scale is not affected by them.
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape), recurse)

    @property
    def qparams(self) -> QParams:
        """Scale and zero point of the current time group. Raises RuntimeError outside of a forward pass."""
        if self.numbers is not None and not torch.compiler.is_compiling():
            if not self.numbers.are_of(self.scale, self.zero_point):
                self.as_numbers(True)
            return QParams(*self.numbers.of(0 if self.groups is None else self.groups.number), self.spec)
        if self.groups is None or self.spec.bits == FLOAT:  # a float tensor has the same (no) range at all timesteps
            return QParams(*self._expanded(self.scale[0], self.zero_point[0]), self.spec)
        if self.spec.dynamic:
            raise ValueError(GROUPED)
        group = self.groups.current
        return QParams(*self._expanded(self.scale[group].squeeze(0), self.zero_point[group].squeeze(0)), self.spec)

    def _expanded(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Scales of groups, for each index that they belong to; other tensors as they are."""
        if self.spec.group is None or self.spec.dynamic or not tensors[0].ndim:  # the last: not calibrated yet
            return tensors
        axis, group = self.spec.grouped_axis, min(self.spec.group, self.size)
        return tuple(t.repeat_interleave(group, axis).narrow(axis, 0, self.size) for t in tensors)

    @torch.no_grad()
    def calibrate(self, x: Tensor, choose: Callable) -> None:
        """Choose scale and zero point of the current group for x; do nothing if the format is float or dynamic.

        The range of a constant channel reaches from zero to its value, which is then exact. For example, every channel
        of a time embedding is constant at a single timestep.
        Raises FloatingPointError for a tensor that is not finite, and ValueError for a constant one unless it may be.
        """
        if self.spec.bits == FLOAT or self.spec.dynamic:
            return
        self.as_numbers(False)
        # Shifted channels have one range, and groups are looked at one by one.
        axis = None if self.spec.shifts or self.spec.group else self.spec.axis
        dims = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
        low, high = x.amin(dims), x.amax(dims)
        if not (low.isfinite() & high.isfinite()).all():
            raise FloatingPointError(f"layer {self.name}: its calibration input holds NaN or infinite values")
        constant = low == high
        if axis is None and constant and not self.may_be_constant:
            raise ValueError(f"layer {self.name}: its calibration input is constant ({low.item()})")
        scale, zero_point = ranges.of_groups(x, self.spec, choose) if self.spec.group else choose(x, self.spec)
        if constant.any() and not self.spec.shifts and not self.spec.group:
            constant = constant.reshape(scale.shape)
            whole = ranges.minmax(x, self.spec)
            scale, zero_point = (torch.where(constant, a, b) for a, b in zip(whole, (scale, zero_point), strict=True))
        scale, zero_point = scale.to(self.scale.device), zero_point.to(self.scale.device)  # x may wait on the CPU
        if self.scale.shape[1:] != scale.shape:
            # The first tensor determines the shape of a per-channel scale.
            self.scale.data = scale.new_full((len(self.scale), *scale.shape), torch.nan)
            self.zero_point = torch.full_like(self.scale.data, torch.nan)
        group = self.groups.current if self.groups else 0
        self.scale[group], self.zero_point[group] = scale, zero_point

    def forward(self, x: Tensor) -> QParams:
        if self.choose is not None:
            self.calibrate(x, self.choose)
        return self.qparams
