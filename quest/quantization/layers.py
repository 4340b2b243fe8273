"""Quantized layers. One forward pass: whether codes are simulated or multiplied is the kernel's business."""

from collections.abc import Iterator
from types import ModuleType

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quest import kernels
from quest.affine import FLOAT, QTensor, QuantSpec, fake_quantize, quantize
from quest.quantization import packing, ranges
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share: two quantizers, a kernel, and a weight that can be frozen.

    weight_quantizer: asymmetric, one scale per output channel, as in every method of the paper. input_quantizer: of the
    layer's input, one scale per time group. output_quantizer: of the layer's output, for a method that quantizes there
    (no integer kernel can multiply the float input it leaves behind); else None.

    `fused`: what the integer kernel computes in the same pass (see `kernels.cpu.blocks`); others take nothing.

    `weight` is a Parameter while it is learned: every forward pass quantizes it anew, with a gradient. `freeze` makes
    it a QTensor, whose codes do not change any more, `thaw` a Parameter again; so does assigning a Parameter. Nothing
    writes into what is frozen: `QTensor` refuses. A weight of 32 bits stays a Parameter. In a state dict a learned
    weight is `weight`, a frozen one `codes`, packed as in a file (`packing`).

    What a frozen layer keeps, each in a buffer of its own:

        operand   what its kernel multiplies, as the kernel packed it; of the reference kernel dequantized floats
        codes     packed as in a file; None where the operand itself can be unpacked to codes
        origin    the floats that were quantized, from which `thaw` goes on learning; None in a layer loaded from codes
    """

    kernel_name = "reference"  # a name, because modules of Python cannot be copied with the layer

    @property
    def kernel(self) -> ModuleType:
        return kernels.get(self.kernel_name)

    def add_quantizers(
        self, weight: QuantSpec, input: QuantSpec, groups: TimeGroups | None, output: QuantSpec | None = None
    ) -> None:
        self.weight_quantizer = Quantizer(weight, (len(self.weight),) + (1,) * (self.weight.ndim - 1))
        self.input_quantizer = Quantizer(input, groups=groups)
        self.output_quantizer = None if output is None else Quantizer(output, groups=groups)
        for name in ("operand", "codes", "origin"):
            self.register_buffer(name, None, persistent=False)

    def choose_weight_range(self, choose=ranges.minmax) -> None:
        """Take the weight's scales and zero points from the weight itself. A zero channel keeps a tiny scale.

        Raises RuntimeError for a frozen weight: its codes have the scales they were made with.
        """
        if self.weight_quantizer.spec.bits == FLOAT:
            return
        if self.is_frozen:
            raise RuntimeError(f"layer {self.input_quantizer.name}: thaw() its frozen weight to choose its range")
        scale, zero_point = choose(self.weight.detach(), self.weight_quantizer.spec)
        self.weight_quantizer.scale.data, self.weight_quantizer.zero_point = scale[None], zero_point[None]

    @property
    def is_frozen(self) -> bool:
        return self.operand is not None or self.codes is not None

    @property
    def weight(self) -> nn.Parameter | QTensor:
        if self.is_frozen:
            return self.qweight
        if "weight" not in self._parameters:
            raise AttributeError("weight")  # none yet, as torch asks before it registers one
        return self._parameters["weight"]

    @property
    def qweight(self) -> QTensor:
        """The codes that a frozen weight holds; of a learned one the nearest, with a gradient."""
        scale, zero_point, spec = qparams = self.weight_quantizer.qparams
        if not self.is_frozen:
            return quantize(self.weight, qparams)
        shape, packed = self.weight_shape, self.codes
        # In the memory layout of the weight: float sums depend on it.
        if packed is not None:
            return QTensor(packing.unpack(packed, spec, shape, self.layout), scale, zero_point)
        codes = self.kernel.unpack(self.operand, shape)
        laid_out = torch.empty_strided(shape, self.layout, dtype=codes.dtype, device=codes.device)
        return QTensor(laid_out.copy_(codes), scale, zero_point)

    @property
    def float_weight(self) -> Tensor:
        """The weight in floats: those that are learned, or were before it was frozen; else what its codes mean."""
        if not self.is_frozen:
            return self.weight
        return self.qweight.dequantize() if self.origin is None else self.origin

    @torch.no_grad()
    def freeze(self, kernel: str = "reference") -> None:
        """Make the weight a QTensor that `kernel` multiplies, and run on that kernel; codes are found only once.

        A parametrized weight becomes a plain one first. Raises FloatingPointError for a weight that is not finite.
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
            self.origin, self.layout, self.weight = weight.detach(), layout(weight), None
        self.kernel_name = kernel
        self.operand = self.kernel.pack(qweight)
        self.codes = None if hasattr(self.kernel, "unpack") else packing.pack(qweight.codes, spec)

    def thaw(self) -> None:
        """Make the weight a Parameter, quantized in every call on the reference kernel: the one with a gradient."""
        if self.is_frozen:
            self.weight = nn.Parameter(self.float_weight, requires_grad=False)
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
        """Codes make any weight a frozen one, at a kernel when it is first needed; a frozen weight takes no floats."""
        codes, quantizer = state_dict.pop(f"{prefix}codes", None), self.weight_quantizer
        if codes is not None and packing.fits(codes, self.weight_shape, quantizer.spec):
            at_kernel, self.layout = self.operand is not None, self.layout if self.is_frozen else layout(self.weight)
            self._hold(None, codes.to(quantizer.scale.device))
            if at_kernel:  # where scales and zero points are packed with the codes
                quantizer._load_from_state_dict(state_dict, f"{prefix}weight_quantizer.", metadata, strict, [], [], [])
                self.freeze(self.kernel_name)
        elif codes is not None or self.is_frozen and f"{prefix}weight" in state_dict:
            wanted = f"{quantizer.spec.bits}-bit codes of a weight {list(self.weight_shape)}"
            errors.append(f"{prefix}codes: a frozen weight takes {wanted}; thaw() the layer to load floats")
        elif self.is_frozen:
            missing.append(f"{prefix}codes")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse=True):
        # What another kernel than the reference packed are bytes in its own order, which no memory format may change.
        packed = None if self.kernel_name == "reference" else self.operand
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape) if t is packed else fn(t), recurse)

    def multiplied(self) -> Tensor | QTensor:
        """What the kernel multiplies: the operand, or while the weight is learned its nearest codes."""
        operand = self.operand
        if operand is not None:
            return operand
        if self.codes is not None:
            self.freeze(self.kernel_name)
            return self.operand
        return self.weight if self.weight_quantizer.spec.bits == FLOAT else self.qweight

    def quantize_output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else fake_quantize(y, self.output_quantizer(y))


class QuantLinear(QuantLayer, nn.Linear):
    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor, **fused) -> Tensor:
        weight = self.multiplied()
        return self.quantize_output(self.kernel.linear(x, self.input_quantizer(x), weight, self.bias, **fused))


class QuantConv2d(QuantLayer, nn.Conv2d):
    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, x: Tensor, **fused) -> Tensor:
        conv = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups) | fused
        weight = self.multiplied()
        return self.quantize_output(self.kernel.conv2d(x, self.input_quantizer(x), weight, self.bias, **conv))


def layout(weight: Tensor) -> tuple[int, ...]:
    """The strides that codes of a weight have. Those of a 1x1 convolution are ambiguous; torch gives sums these ones.

    Float sums depend on the layout, so a layer loaded from codes must have the one that the quantized layer had.
    """
    if not weight.is_contiguous():
        return weight.stride()
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta").stride()


def quantized(
    layer: nn.Module, weight: QuantSpec, input: QuantSpec, groups: TimeGroups | None, output: QuantSpec | None = None
) -> QuantLayer:
    """The quantized twin of a float Linear or Conv2d, sharing its weight and bias; ranges not yet chosen."""
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
    for name, quantizer in input_quantizers(denoiser).items():
        quantizer.name = name.removesuffix(".input_quantizer").removesuffix(".output_quantizer")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_quantized(denoiser: nn.Module) -> bool:
    return any(isinstance(m, Quantizer) for m in denoiser.modules())


def quant_layers(denoiser: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, QuantLayer))


def freeze(denoiser: nn.Module) -> None:
    """Freeze every layer that is not yet: what sampling runs on."""
    for _, layer in quant_layers(denoiser):
        layer.freeze(layer.kernel_name)


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, Attention))


def input_quantizers(denoiser: nn.Module) -> dict[str, Quantizer]:
    """Every activation quantizer by name: layer inputs (or outputs), and q, k, v and p of each attention."""
    return {
        n: m for n, m in denoiser.named_modules() if isinstance(m, Quantizer) and not n.endswith("weight_quantizer")
    }
