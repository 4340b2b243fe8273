"""Quantized layers. One forward pass: whether codes are simulated or multiplied is the kernel's business."""

from collections.abc import Iterator
from types import ModuleType

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quest import kernels
from quest.affine import FLOAT, QTensor, QuantSpec, fake_quantize, quantize
from quest.quantization import ranges
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share: two quantizers, a kernel, and a weight that can be frozen.

    weight_quantizer: asymmetric, one scale per output channel, as in every method of the paper. input_quantizer: of the
    layer's input, one scale per time group. output_quantizer: of the layer's output, for a method that quantizes there
    (no integer kernel can multiply the float input it leaves behind); else None.

    `fused`: what the integer kernel computes in the same pass (see `kernels.cpu.blocks`); others take nothing.

    A weight that stands on its codes, as a loaded one does, is not kept beside them: `held` is None then, and `weight`
    is made of them anew each time it is asked for. To change it, `thaw` first.
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
        self.register_buffer("packed", None, persistent=False)

    def choose_weight_range(self, choose=ranges.minmax) -> None:
        """Take the weight's scales and zero points from the weight itself. A zero channel keeps a tiny scale."""
        if self.weight_quantizer.spec.bits == FLOAT:
            return
        scale, zero_point = choose(self.weight.detach(), self.weight_quantizer.spec)
        self.weight_quantizer.scale.data, self.weight_quantizer.zero_point = scale[None], zero_point[None]

    @property
    def held(self) -> nn.Parameter | None:
        """The float weight, of a parametrized one what it is made of; None where only its codes are kept."""
        if parametrize.is_parametrized(self, "weight"):
            return self.parametrizations.weight.original
        return self._parameters.get("weight")

    @property
    def weight(self) -> Tensor:
        return self.unpacked() if self.held is None else self.held

    @torch.no_grad()
    def unpacked(self) -> Tensor:
        """scale * (code - zero point) of the packed codes, in the memory layout of the weight."""
        codes = self.kernel.unpack(self.packed, self.form.shape)
        scale, zero_point, _ = self.weight_quantizer.qparams
        weight = QTensor(codes, scale, zero_point).dequantize()
        # Float sums depend on the layout.
        return torch.empty_strided(weight.shape, self.form.stride(), dtype=weight.dtype, device=weight.device).copy_(
            weight
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.held is None:
            destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def qweight(self) -> QTensor | Tensor:
        """Live codes while training, packed once frozen."""
        return quantize(self.weight, self.weight_quantizer.qparams) if self.packed is None else self.packed

    def freeze(self, kernel: str = "reference") -> None:
        """Keep the weight in a kernel's packed form and run on that kernel; `thaw` makes it follow `weight` again.

        Codes that give the float weight back, bit for bit, are all that is kept of it.
        """
        self.thaw()
        self.packed = kernels.get(kernel).pack(self.qweight)
        self.kernel_name = kernel
        if not hasattr(self.kernel, "unpack"):
            return
        self.form = torch.empty_like(self.weight, device="meta")  # shape and layout
        if torch.equal(self.unpacked(), self.weight):
            self.weight = None

    def thaw(self) -> None:
        """Follow `weight`, on the reference kernel: the one with a gradient."""
        if self.held is None:
            self.weight = nn.Parameter(self.unpacked(), requires_grad=False)
        self.packed = None
        self.kernel_name = "reference"
        self.input_quantizer.thaw()

    def quantize_output(self, y: Tensor) -> Tensor:
        return y if self.output_quantizer is None else fake_quantize(y, self.output_quantizer(y))


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, x: Tensor, **fused) -> Tensor:
        return self.quantize_output(self.kernel.linear(x, self.input_quantizer(x), self.qweight, self.bias, **fused))


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, x: Tensor, **fused) -> Tensor:
        conv = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups) | fused
        return self.quantize_output(self.kernel.conv2d(x, self.input_quantizer(x), self.qweight, self.bias, **conv))


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


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, Attention))


def input_quantizers(denoiser: nn.Module) -> dict[str, Quantizer]:
    """Every activation quantizer by name: layer inputs (or outputs), and q, k, v and p of each attention."""
    return {
        n: m for n, m in denoiser.named_modules() if isinstance(m, Quantizer) and not n.endswith("weight_quantizer")
    }
