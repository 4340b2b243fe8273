"""The quantizer of one tensor: a spec, and a scale and zero point for each time group."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quest.affine import FLOAT, QParams, QuantSpec
from quest.quantization import ranges
from quest.quantization.timegroups import TimeGroups


class Numbers:
    """Scales and zero points of all groups, [T] each, read where the tensors lie: what is written there is seen."""

    def __init__(self, *tensors: Tensor):
        self.views = [memoryview(t.detach().numpy()) for t in tensors]  # which keep the memory, too
        self.addresses = [t.data_ptr() for t in tensors]

    def __reduce__(self):
        return Numbers, tuple(torch.tensor(view.tolist(), dtype=torch.float32, device="cpu") for view in self.views)

    def are_of(self, *tensors: Tensor) -> bool:
        return [t.data_ptr() for t in tensors] == self.addresses

    def of(self, group: int) -> list[float]:
        return [view[group] for view in self.views]


class Quantizer(nn.Module):
    """scale [T, *shape] (a parameter), zero_point [T, *shape] (a buffer).

    T is the number of time groups, 1 without. Called with a tensor it gives the `QParams` to quantize that tensor with;
    quantizing is the kernel's business. TAQuant is a Quantizer with time groups.
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...] = (), groups: TimeGroups | None = None):
        super().__init__()
        self.spec, self.groups = spec, groups
        self.name = ""  # in its denoiser, for error messages
        # NaN until calibrated: an uncalibrated quantizer cannot pass for a calibrated one. Float needs no calibration.
        scale, zero_point = (1.0, 0.0) if spec.bits == FLOAT else (torch.nan, torch.nan)
        shape = (len(groups) if groups else 1, *shape)
        start = torch.full(shape, scale, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        self.scale = nn.Parameter(start, requires_grad=False)
        self.register_buffer("zero_point", torch.full_like(self.scale.data, zero_point))
        self.choose: Callable | None = None  # a range chooser while calibrating, see calibration.calibrating
        self.numbers: Numbers | None = None  # see `as_numbers`
        self.may_be_constant = False

    def as_numbers(self, wanted: bool) -> None:
        """Answer with plain numbers from now on, which a kernel reads at no cost; or with tensors again."""
        self.numbers = Numbers(self.scale, self.zero_point) if wanted else None

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.as_numbers(self.numbers is not None)

    def _apply(self, fn, recurse=True):
        # Memory formats are of images and of the weights of convolutions: a scale [T, O, 1, 1, 1] has none.
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape), recurse)

    @property
    def qparams(self) -> QParams:
        """Scale and zero point of the current time group. Raises RuntimeError outside of a forward pass."""
        if self.numbers is not None and not torch.compiler.is_compiling():
            if not self.numbers.are_of(self.scale, self.zero_point):
                self.as_numbers(True)
            return QParams(*self.numbers.of(0 if self.groups is None else self.groups.number), self.spec)
        if self.groups is None or self.spec.bits == FLOAT:  # a float tensor has no range, at any timestep
            return QParams(self.scale[0], self.zero_point[0], self.spec)
        group = self.groups.current
        return QParams(self.scale[group].squeeze(0), self.zero_point[group].squeeze(0), self.spec)

    @torch.no_grad()
    def calibrate(self, x: Tensor, choose: Callable) -> None:
        """Take scale and zero point of the current group from x; nothing to do where the spec is float.

        A constant channel takes the range from zero to its value, which it then meets exactly: at a single timestep
        every channel of a time embedding is constant.
        Raises FloatingPointError for a tensor that is not finite, and ValueError for a constant one unless it may be.
        """
        if self.spec.bits == FLOAT:
            return
        self.as_numbers(False)
        dims = [d for d in range(x.ndim) if self.spec.axis is None or d != self.spec.axis % x.ndim]
        low, high = x.amin(dims), x.amax(dims)
        if not (low.isfinite() & high.isfinite()).all():
            raise FloatingPointError(f"layer {self.name}: its calibration input holds NaN or infinite values")
        constant = low == high
        if self.spec.axis is None and constant and not self.may_be_constant:
            raise ValueError(f"layer {self.name}: its calibration input is constant ({low.item()})")
        scale, zero_point = choose(x, self.spec)
        if constant.any():
            constant = constant.reshape(scale.shape)
            whole = ranges.minmax(x, self.spec)
            scale, zero_point = (torch.where(constant, a, b) for a, b in zip(whole, (scale, zero_point), strict=True))
        if self.scale.shape[1:] != scale.shape:
            # The shape of a per-channel scale is known from the first tensor it meets.
            self.scale.data = scale.new_full((len(self.scale), *scale.shape), torch.nan)
            self.zero_point = torch.full_like(self.scale.data, torch.nan)
        group = self.groups.current if self.groups else 0
        self.scale[group], self.zero_point[group] = scale, zero_point

    def forward(self, x: Tensor) -> QParams:
        if self.choose is not None:
            self.calibrate(x, self.choose)
        return self.qparams
