"""Quantized layers. One forward pass: whether codes are simulated or multiplied is the kernel's business."""

import copy
from collections.abc import Iterator
from fnmatch import fnmatch
from inspect import signature
from types import ModuleType

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quest import kernels, ranges
from quest.affine import FLOAT, QTensor, QuantSpec, fake_quantize, quantize
from quest.attention import QuantAttention
from quest.kernels.integer import plus
from quest.quantizer import Quantizer
from quest.timegroups import TimeGroups


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share: two quantizers, a kernel, and a weight that can be frozen.

    weight_quantizer: asymmetric, one scale per output channel, as in every method of the paper. input_quantizer: of the
    layer's input, one scale per time group. output_quantizer: of the layer's output, for a method that quantizes there
    (no integer kernel can multiply the float input it leaves behind); else None.

    `fused`: what the integer kernel computes in the same pass (see `kernels.blocks`); others take nothing.

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


class SplitConv2d(nn.Module):
    """A convolution over the concatenation [hidden, skip] as the sum of two, each with quantizers of its own.

    The two halves of a decoder's shortcut have different ranges (Q-Diffusion, arXiv:2302.04304, section 4.2). Its code
    concatenates the dequantized halves again; a sum of two convolutions is the same and multiplies integers twice.
    """

    def __init__(self, hidden: nn.Conv2d, skip: nn.Conv2d):
        super().__init__()
        self.hidden, self.skip = hidden, skip

    def forward(self, x: Tensor) -> Tensor:
        channels = self.hidden.in_channels
        return plus(self.skip, x[:, channels:], self.hidden(x[:, :channels]))


def split(conv: nn.Conv2d, channels: int) -> SplitConv2d:
    """A float or quantized convolution as two: over its first `channels` inputs, with the bias, and over the others.

    Quantizers are new and of the same specs; their ranges are not yet chosen.
    """
    halves = []
    for weight, bias in ((conv.weight[:, :channels], conv.bias), (conv.weight[:, channels:], None)):
        names = ("out_channels", "kernel_size", "stride", "padding", "dilation")
        shape = {n: getattr(conv, n) for n in names}
        half = type(conv)(weight.shape[1], **shape, bias=bias is not None, device="meta")
        half.weight, half.bias = nn.Parameter(weight.detach().clone(), requires_grad=False), bias
        if isinstance(conv, QuantLayer):
            input, output = conv.input_quantizer, conv.output_quantizer
            half.add_quantizers(conv.weight_quantizer.spec, input.spec, input.groups, output and output.spec)
        halves.append(half)
    return SplitConv2d(*halves)


@torch.no_grad()
def shortcut_splits(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Each shortcut convolution of the decoder that reads a concatenation, with the channels that are not of the skip.

    Traced by one forward pass: a resnet of an up block reads [hidden, skip], the skips popped from the block's tuple.
    """
    found: dict[str, int] = {}

    def record(name):
        def hook(block, args, kwargs):
            skips = signature(block.forward).bind(*args, **kwargs).arguments["res_hidden_states_tuple"]
            for j, resnet in enumerate(block.resnets):
                if resnet.conv_shortcut is not None:
                    channels = resnet.conv_shortcut.in_channels - skips[-1 - j].shape[1]
                    found[f"{name}.resnets.{j}.conv_shortcut"] = channels

        return hook

    handles = [
        block.register_forward_pre_hook(record(f"up_blocks.{i}"), with_kwargs=True)
        for i, block in enumerate(denoiser.up_blocks)
    ]
    try:
        denoiser(**inputs)
    finally:
        for h in handles:
            h.remove()
    return found


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


Keep = dict[str, int | list[int]]  # globs over layer names -> bits kept at least: of both, or [weight, input]


def layer_bits(name: str, w: int, a: int, keep: Keep) -> tuple[int, int]:
    """Weight and input bits of the layer: at least those of the first glob in `keep` that matches it, else (w, a).

    For an attention's `processor`: bits of q, k and v, and of the probabilities.
    """
    for glob, bits in keep.items():
        if fnmatch(name, glob):
            kept_w, kept_a = bits if isinstance(bits, list | tuple) else (bits, bits)
            return max(kept_w, w), max(kept_a, a)
    return w, a


KEEP = {"conv_in": 8, "conv_out": 8}  # the released QuEST's exceptions, for weights as well as inputs
# Layers that not every U-Net has (residual blocks can resample, attention stand in transformers): keep may name them.
OPTIONAL = ("*.conv_shortcut", "*.downsamplers.*.conv", "*.attentions.?.to_*")


def swap(
    pipe,
    w: int,
    a: int,
    *,
    keep: Keep | None = None,
    softmax_bits: int = 8,
    groups: TimeGroups | None = None,
    weight_axis: int | None = 0,
    splits: dict[str, int] | None = None,
):
    """A pipeline with every Linear, Conv2d and attention of the denoiser in its quantized twin; ranges not yet chosen.

    The pipeline that is given stays as it was; the new one shares all but denoiser and scheduler with it.
    keep: globs over the names of layers and attention processors to the bits such a one keeps at least (default: KEEP).
    softmax_bits: of the attention probabilities. weight_axis: 0 for one weight scale per output channel, None for one
    per tensor. splits: convolutions to split at a channel, see `shortcut_splits`.
    Raises ValueError for a denoiser that is already quantized or not float32, and for a glob that matches nothing.
    """
    keep = KEEP if keep is None else keep
    if is_quantized(pipe.unet):
        raise ValueError("the pipeline is already quantized; quantize the full-precision one")
    if pipe.unet.dtype.itemsize < 4:
        raise ValueError(f"the denoiser is in {pipe.unet.dtype}; load the pipeline in torch.float32 to quantize it")
    denoiser = copy.deepcopy(pipe.unet)
    layers = {n: m for n, m in denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    processors = {f"{n}.processor": m for n, m in attentions(denoiser)}
    for glob in keep:
        if glob not in OPTIONAL and not any(fnmatch(n, glob) for n in (*layers, *processors)):
            raise ValueError(f"keep: no layer is named like {glob!r}")
    for name, layer in layers.items():
        layer_w, layer_a = layer_bits(name, w, a, keep)
        replace(denoiser, name, quantized(layer, QuantSpec(layer_w, axis=weight_axis), QuantSpec(layer_a), groups))
    for name, module in processors.items():
        qkv_bits, p_bits = layer_bits(name, a, max(softmax_bits, a), keep)
        module.set_processor(QuantAttention(QuantSpec(qkv_bits), QuantSpec(p_bits), groups))
    for name, channels in (splits or {}).items():
        replace(denoiser, name, split(denoiser.get_submodule(name), channels))
    return with_denoiser(pipe, finish(denoiser, groups))


def finish(denoiser: nn.Module, groups: TimeGroups | None) -> nn.Module:
    """Name the quantizers, attach the time groups, and freeze every parameter."""
    name_quantizers(denoiser)
    if groups is not None:
        groups.attach(denoiser)
    return denoiser.requires_grad_(False).eval()


def name_quantizers(denoiser: nn.Module) -> None:
    for name, quantizer in input_quantizers(denoiser).items():
        quantizer.name = name.removesuffix(".input_quantizer").removesuffix(".output_quantizer")


def with_denoiser(pipe, denoiser: nn.Module):
    """A copy of the pipeline with another denoiser and a scheduler of its own; all else is shared."""
    new = copy.copy(pipe)
    new.unet = denoiser
    new.scheduler = copy.deepcopy(pipe.scheduler)
    return new


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_quantized(denoiser: nn.Module) -> bool:
    return any(isinstance(m, Quantizer) for m in denoiser.modules())


def quant_layers(denoiser: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, QuantLayer))


def split_layers(denoiser: nn.Module) -> dict[str, int]:
    """The split convolutions by name, with the channels of their first half."""
    return {n: m.hidden.in_channels for n, m in denoiser.named_modules() if isinstance(m, SplitConv2d)}


def attentions(denoiser: nn.Module) -> Iterator[tuple[str, Attention]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, Attention))


def input_quantizers(denoiser: nn.Module) -> dict[str, Quantizer]:
    """Every activation quantizer by name: layer inputs (or outputs), and q, k, v and p of each attention."""
    return {
        n: m for n, m in denoiser.named_modules() if isinstance(m, Quantizer) and not n.endswith("weight_quantizer")
    }


LAYER_CLASSES = (  # first match wins; names are those of diffusers' U-Nets
    ("boundary", ("conv_in", "conv_out")),
    ("time embedding", ("time_embedding.*", "*time_emb_proj")),
    ("attention q, k, v", ("*.to_q", "*.to_k", "*.to_v")),
    ("attention output", ("*.to_out.*",)),
    ("feed-forward", ("*.ff.net.*",)),
    ("transformer in, out", ("*.proj_in", "*.proj_out")),
    ("shortcut", ("*.conv_shortcut",)),
    ("resampling", ("*samplers.*",)),
    ("residual convolution", ("*.conv1", "*.conv2")),
)


def layer_class(name: str) -> str:
    """The class of a layer by its name in a diffusers denoiser, for figures and sensitivity tables."""
    return next((c for c, globs in LAYER_CLASSES if any(fnmatch(name, g) for g in globs)), "other")
