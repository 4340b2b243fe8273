"""Quantized linear layers and convolutions. Their kernel decides whether codes are multiplied or simulated in floats.

x ── (prologue) ─┬─ input_quantizer: scale, zero point ─┐
                 │         weight: Parameter or QTensor ─┴─ kernel ─┐
                 └─ (branch) ───────────────────────────────────────┴─ (output_quantizer) ── y
"""

from collections.abc import Iterator, Mapping
from functools import partial
from types import ModuleType

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quest import kernels
from quest.affine import FLOAT, QTensor, QuantSpec, fake_quantize, in_groups, quantize
from quest.quantization import packing, ranges
from quest.quantization.branch import Branch
from quest.quantization.prologue import Prologue, along
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups

ONE_DEVICE = "a quantized denoiser stays whole, on one device"


def _moved_alone(_layer, _forward) -> None:
    raise ValueError(f"accelerate cannot move the layers of a quantized denoiser one by one; {ONE_DEVICE}")


class QuantLayer(nn.Module):
    """The common part of QuantLinear and QuantConv2d: quantizers, a kernel, and a weight that can be frozen.

    weight_quantizer: asymmetric, one scale per output channel, as in every method of the paper. input_quantizer: for
    the layer's input, one scale per time group. output_quantizer: None, or the quantizer of the layer's output for a
    method that quantizes there; then the input stays in float, and no integer kernel can multiply it.
    prologue: None, or what is done to the input before it is quantized (`prologue.Prologue`); `scale_input` and
    `rotate_input` make it, and change the weight so that the layer in float computes the same.
    branch: None, or a part of the weight that stays in float (`branch.Branch`); `add_branch` takes it from the weight.

    The weight has two states:

        learned   `weight` is a Parameter. Every forward pass quantizes it again, with a gradient.
        frozen    `weight` is a QTensor. Its codes do not change, and QTensor refuses to be written.

    `freeze` and `thaw` change the state. Assigning a Parameter also thaws. A weight of 32 bits is always a Parameter. A
    state dict contains a learned weight as `weight`, and a frozen one as `codes`, packed as in a file (`packing`).

    A frozen layer has these buffers:

        operand   what its kernel multiplies, in the kernel's format; for the reference kernel dequantized floats
        codes     packed as in a file; None if the kernel can unpack codes from the operand
        origin    the floats that were quantized, with which `thaw` continues; None in a layer that was loaded as codes.
                  While it is finetuned, others hold them too (`share_floats`), so nothing writes into them

    Keywords `fused` of a forward pass: further work that the integer kernel does in the same pass (see
    `kernels.cpu.blocks`). Other kernels take none.
    """

    kernel_name = "reference"  # a name, because a copy of the layer could not contain a Python module
    channels: int  # the dimension of the input that has the channels
    groups: int  # of a convolution; 1 for a linear layer
    _old_forward = property(fset=_moved_alone)  # accelerate sets it before it moves the tensors of a module

    @property
    def kernel(self) -> ModuleType:
        return kernels.get(self.kernel_name)

    def add_quantizers(
        self, weight: QuantSpec, input: QuantSpec, groups: TimeGroups | None, output: QuantSpec | None = None
    ) -> None:
        """Add quantizers of these formats, without ranges, and the buffers of a frozen weight."""
        self.weight_quantizer = Quantizer(weight, (len(self.weight),) + (1,) * (self.weight.ndim - 1))
        self.weight_quantizer.size = self.weight.shape[1]
        self.input_quantizer = Quantizer(input, groups=groups)
        self.input_quantizer.size = self.weight.shape[1] * self.groups
        self.output_quantizer = None if output is None else Quantizer(output, groups=groups)
        self.register_module("prologue", None)
        self.register_module("branch", None)
        for name in ("operand", "codes", "origin"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def scale_input(self, factors: Tensor) -> None:
        """Divide input channels by positive factors [C] before they are quantized, and multiply the weight by them.

        Earlier factors stay. Raises RuntimeError for a layer that is rotated, frozen or has a branch, which multiplies
        what a prologue leaves, and for a grouped convolution.
        """
        before = self._own_prologue("scale_input")
        multiplier = 1 / factors if before.multiplier is None else before.multiplier / factors
        self.weight.data.mul_(along(factors, self.weight, 1))
        self.prologue = Prologue(multiplier.to(self.weight))

    @torch.no_grad()
    def rotate_input(self, block: int, form: str = "regular", single: bool = False) -> None:
        """Rotate blocks of input channels before they are quantized, and the weight with them.

        single: rotate the weight after it is quantized. Raises RuntimeError as `scale_input` does, and ValueError for
        a block that does not divide the channels.
        """
        before = self._own_prologue("rotate_input")
        if self.weight.shape[1] % block:
            raise ValueError(f"block: {block} does not divide the {self.weight.shape[1]} input channels")
        self.prologue = Prologue(before.multiplier, block, form, single).to(self.weight.device)
        if not single:
            self.weight.data.copy_(self.prologue.rotated(self.weight, 1))

    @torch.no_grad()
    def add_branch(self, branch: Branch) -> None:
        """Let a branch multiply its part of the weight, and take that part from the weight.

        Raises RuntimeError for a layer that has a branch or is frozen, and for a grouped convolution.
        """
        if self.is_frozen or self.branch is not None or self.groups > 1:
            raise RuntimeError("add_branch: not of a layer that is frozen or has one, or of a grouped convolution")
        self.branch = branch.to(self.weight.device)
        self.weight.data.sub_(self.branch.product(self.weight))

    def _own_prologue(self, what: str) -> Prologue:
        before = self.prologue or Prologue()
        if self.is_frozen or before.block > 1 or self.branch is not None or self.groups > 1:
            raise RuntimeError(
                f"{what}: not of a layer that is frozen, rotated or has a branch, or a grouped convolution"
            )
        return before

    def choose_weight_range(self, choose=ranges.minmax) -> None:
        """Choose the weight's scales and zero points from the weight itself. A channel of zeros gets a tiny scale.

        Groups have the scales of their whole range (`affine.in_groups`), whatever `choose` is.
        Raises RuntimeError for a frozen weight, because its codes belong to the scales it has.
        """
        if self.weight_quantizer.spec.bits == FLOAT:
            return
        if self.is_frozen:
            raise RuntimeError(f"layer {self.input_quantizer.name}: thaw() its frozen weight to choose its range")
        spec = self.weight_quantizer.spec
        if spec.widths is not None:
            choose = partial(ranges.of_widths, choose=choose)
        scale, zero_point = (in_groups if spec.group else choose)(self.weight.detach(), spec)
        self.weight_quantizer.scale.data, self.weight_quantizer.zero_point = scale[None], zero_point[None]

    @property
    def is_frozen(self) -> bool:
        return self.operand is not None or self.codes is not None

    @property
    def weight(self) -> nn.Parameter | QTensor:
        if self.is_frozen:
            return self.qweight
        if "weight" not in self._parameters:
            raise AttributeError("weight")  # torch asks whether there is one before it registers it
        return self._parameters["weight"]

    @property
    def qweight(self) -> QTensor:
        """The codes of a frozen weight; for a learned weight the nearest codes, with a gradient."""
        scale, zero_point, spec = qparams = self.weight_quantizer.qparams
        if not self.is_frozen:
            return quantize(self.weight, qparams)
        shape, packed = self.weight_shape, self.codes
        # Codes get the memory layout of the weight, because float sums depend on it.
        if packed is not None:
            return QTensor(packing.unpack(packed, spec, shape, self.layout), scale, zero_point)
        codes = self.kernel.unpack(self.operand, shape)
        laid_out = torch.empty_strided(shape, self.layout, dtype=codes.dtype, device=codes.device)
        return QTensor(laid_out.copy_(codes), scale, zero_point)

    @property
    def float_weight(self) -> Tensor:
        """The weight in floats: as it is learned, or as it was before freezing; if unknown, its dequantized codes."""
        if not self.is_frozen:
            return self.weight
        return self.qweight.dequantize() if self.origin is None else self.origin

    @torch.no_grad()
    def freeze(self, kernel: str = "reference") -> None:
        """Make the weight a QTensor and run on `kernel`. The codes of a weight are computed only once.

        The parametrizations of a weight are merged into it first. Raises FloatingPointError for a weight that is not
        finite.
        """
        spec = self.weight_quantizer.spec
        if parametrize.is_parametrized(self, "weight"):
            parametrize.remove_parametrizations(self, "weight")
        if spec.bits == FLOAT or self.operand is not None and kernel == self.kernel_name:
            return
        qweight = self.qweight
        if not self.is_frozen:
            weight = self.weight
            if not weight.isfinite().all():
                raise FloatingPointError(f"layer {self.input_quantizer.name}: its weight is not finite")
            self.origin, self.strides, self.layout, self.weight = weight.detach(), weight.stride(), layout(weight), None
        self.kernel_name = kernel
        input, channels = self.input_quantizer.spec, self.weight_shape[1]
        groups = [s.group for s in (spec, input) if s.group is not None and s.scales(channels) > 1]
        self.operand = self.kernel.pack(qweight, *groups[:1])
        self.codes = None if hasattr(self.kernel, "unpack") else packing.pack(qweight.codes, spec)

    def thaw(self) -> None:
        """Make the weight a Parameter again and run on the reference kernel, the only one that has gradients."""
        if self.is_frozen:
            weight = self.float_weight
            if weight is self.origin:  # a copy of its own, because learning writes into it
                own = torch.empty_strided(weight.shape, self.strides, dtype=weight.dtype, device=weight.device)
                weight = own.copy_(weight)
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.input_quantizer.as_numbers(False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name != "weight" or "operand" not in self._buffers or not self.is_frozen:
            return super().register_parameter(name, param)
        self._hold(param, None)
        self.kernel_name = "reference"

    def _hold(self, weight: nn.Parameter | None, codes: Tensor | None) -> None:
        self._parameters["weight"], self.codes = weight, codes
        self.operand = self.origin = None

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_frozen:
            own, spec = self.codes, self.weight_quantizer.spec
            destination[f"{prefix}codes"] = packing.pack(self.qweight.codes, spec) if own is None else own

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """Load codes or floats. Codes freeze the weight; the kernel packs them when it first needs them.

        A frozen weight refuses floats.
        """
        codes, quantizer = state_dict.pop(f"{prefix}codes", None), self.weight_quantizer
        if codes is not None and packing.fits(codes, self.weight_shape, quantizer.spec):
            at_kernel, self.layout = self.operand is not None, self.layout if self.is_frozen else layout(self.weight)
            self._hold(None, codes.to(quantizer.scale.device))
            if at_kernel:  # a kernel packs scales and zero points together with codes
                quantizer._load_from_state_dict(state_dict, f"{prefix}weight_quantizer.", metadata, strict, [], [], [])
                self.freeze(self.kernel_name)
        elif codes is not None or self.is_frozen and f"{prefix}weight" in state_dict:
            wanted = f"{quantizer.spec.bits}-bit codes of a weight {list(self.weight_shape)}"
            errors.append(f"{prefix}codes: a frozen weight takes {wanted}; thaw() the layer to load floats")
        elif self.is_frozen:
            missing.append(f"{prefix}codes")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse=True):
        # An operand of another kernel than the reference has bytes in its own order; memory formats must not change it.
        packed = None if self.kernel_name == "reference" else self.operand
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape) if t is packed else fn(t), recurse)

    def multiplied(self) -> Tensor | QTensor:
        """What the kernel multiplies: the operand of a frozen weight, or the nearest codes of a learned one."""
        operand = self.operand
        if operand is not None:
            return operand
        if self.codes is not None:
            self.freeze(self.kernel_name)
            return self.operand
        return self.weight if self.weight_quantizer.spec.bits == FLOAT else self.qweight

    def prepared(self, x: Tensor) -> tuple[Tensor, Tensor | QTensor]:
        """Return what is quantized of an input, and what the kernel multiplies it by.

        A weight that is rotated after it is quantized has values then, and no codes.
        """
        weight = self.multiplied()
        if self.prologue is None:
            return x, weight
        if self.prologue.single:
            weight = self.prologue.rotated(weight.dequantize() if isinstance(weight, QTensor) else weight, 1)
        return self.prologue(x, self.channels), weight

    def finished(self, x: Tensor, y: Tensor, **conv) -> Tensor:
        """Return the layer's output from its kernel's, which has no bias where there is a branch; x is prepared."""
        if self.branch is not None:
            y = y + self.branch(x, **conv)
            y = y if self.bias is None else y + along(self.bias, y, self.channels)
        return y if self.output_quantizer is None else fake_quantize(y, self.output_quantizer(y))


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer, x [..., K] -> [..., N]."""

    channels = -1
    groups = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor, **fused) -> Tensor:
        (x, weight), bias = self.prepared(x), self.bias if self.branch is None else None
        return self.finished(x, self.kernel.linear(x, self.input_quantizer(x), weight, bias, **fused))


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A convolution, x [N, C, H, W] -> [N, O, H', W']. Padding is zero, after quantization."""

    channels = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor, **fused) -> Tensor:
        conv = dict(stride=self.stride, padding=self.padding, dilation=self.dilation)
        (x, weight), bias = self.prepared(x), self.bias if self.branch is None else None
        y = self.kernel.conv2d(x, self.input_quantizer(x), weight, bias, **conv, groups=self.groups, **fused)
        return self.finished(x, y, **conv)


def layout(weight: Tensor) -> tuple[int, ...]:
    """Return the strides of a weight's codes. Those of a 1x1 convolution are ambiguous; then torch uses these.

    Float sums depend on the layout, so a layer loaded from codes must have the layout of the layer that was quantized.
    """
    if not weight.is_contiguous():
        return weight.stride()
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta").stride()


def quantized(
    layer: nn.Module, weight: QuantSpec, input: QuantSpec, groups: TimeGroups | None, output: QuantSpec | None = None
) -> QuantLayer:
    """Return the quantized form of a float Linear or Conv2d with the same weight and bias. It has no ranges yet.

    Raises NotImplementedError for a padding mode other than zeros.
    """
    if isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        if layer.padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode {layer.padding_mode!r}: only zeros is supported")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        new = QuantConv2d(**{n: getattr(layer, n) for n in names}, bias=layer.bias is not None, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    new.add_quantizers(weight, input, groups, output)
    return new


def name_quantizers(denoiser: nn.Module) -> None:
    """Tell each activation quantizer the name of its layer, for error messages."""
    for name, quantizer in input_quantizers(denoiser).items():
        quantizer.name = name.removesuffix(".input_quantizer").removesuffix(".output_quantizer")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_quantized(denoiser: nn.Module) -> bool:
    """Return whether a denoiser has a quantizer."""
    return any(isinstance(m, Quantizer) for m in denoiser.modules())


def quant_layers(denoiser: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Iterate over the quantized layers with their names."""
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, QuantLayer))


def freeze(denoiser: nn.Module) -> None:
    """Freeze every layer that is not frozen, as sampling needs it."""
    for _, layer in quant_layers(denoiser):
        layer.freeze(layer.kernel_name)


def share_floats(denoiser: nn.Module, floats: Mapping[str, Tensor]) -> None:
    """Let frozen layers hold these tensors where they equal the floats that were quantized, in place of copies.

    floats: weights by name, of the teacher or of a file that is mapped into memory, which must not be written. Results
    do not change. With those of the teacher a denoiser takes so much less memory as it has weights. `own_floats` ends
    the sharing.
    """
    for name, layer in quant_layers(denoiser):
        own, other = layer.origin, floats.get(f"{name}.weight")
        if own is None or other is None or (own.device, own.dtype) != (other.device, other.dtype):
            continue
        if torch.equal(own, other):
            layer.origin = other.detach()


def own_floats(denoiser: nn.Module) -> None:
    """Let frozen layers hold copies of the floats that were quantized, which nobody else can write."""
    for _, layer in quant_layers(denoiser):
        if layer.origin is not None:
            layer.origin = layer.origin.clone()


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Iterate over the attentions with their names."""
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, Attention))


def input_quantizers(denoiser: nn.Module) -> dict[str, Quantizer]:
    """Return all activation quantizers by name: of layer inputs (or outputs), and q, k, v and p of attentions."""
    return {
        n: m for n, m in denoiser.named_modules() if isinstance(m, Quantizer) and not n.endswith("weight_quantizer")
    }
