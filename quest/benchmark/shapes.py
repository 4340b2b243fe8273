"""Shapes and work of the layers that the benchmark measures."""

import math
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from quest.diffusion import published
from quest.diffusion.models import Model
from quest.planning.shapes import inputs
from quest.quantization.layer_names import layer_class

ZOO = ("emoji-uncond", "photos-class", "emoji-text")  # those of the default run
PAPER = ("sd14", "lsun-bedrooms")  # Stable Diffusion v1.4 and LDM-4
# One layer of each kind in Stable Diffusion. They are measured first, in case the time runs out.
FIRST = (
    "residual convolution 320 > 320, 3x3, 64x64",
    "residual convolution 1280 > 1280, 3x3, 16x16",
    "resampling 320 > 320, 3x3, 64x64, stride 2",
    "attention q, k, v 320 > 320, 4096 rows",
    "feed-forward 640 > 5120, 1024 rows",
    "feed-forward 5120 > 1280, 256 rows",
)


class Layer(NamedTuple):
    """A layer of a denoiser, or the two products of an attention.

    input: shape of one sample, [C, H, W] or [n, C]. kernel, stride, padding: only of convolutions. heads, keys: only of
    attentions, whose `outputs` are the channels of all heads. count: how many equal layers the denoiser has.
    """

    kind: str  # "conv2d", "linear" or "attention"
    role: str
    input: tuple[int, ...]
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    heads: int = 0
    keys: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        if self.kind == "attention":
            tokens, channels = self.input
            return f"{self.role} {self.heads} x {channels // self.heads}, {tokens} queries, {self.keys} keys"
        if self.kind == "linear":
            return f"{self.role} {self.input[-1]} > {self.outputs}, {math.prod(self.input[:-1])} rows"
        channels, height, width = self.input
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.role} {channels} > {self.outputs}, {self.kernel}x{self.kernel}, {height}x{width}{stride}"

    @property
    def output(self) -> tuple[int, ...]:
        if self.kind != "conv2d":
            return (*self.input[:-1], self.outputs)
        return (self.outputs, *((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.input[1:]))

    @property
    def weights(self) -> int:
        """Numbers in the weight, without the bias."""
        channels = self.input[0] if self.kind == "conv2d" else self.input[-1]
        return 0 if self.kind == "attention" else self.outputs * channels * self.kernel**2

    def macs(self, batch: int) -> int:
        """Multiply-accumulates for a batch."""
        if self.kind == "attention":
            return 2 * batch * self.input[0] * self.keys * self.outputs
        return batch * math.prod(self.output) // self.outputs * self.weights

    def bytes(self, batch: int, weight_bits: int) -> float:
        """The least number of bytes to read and write: float activations and the weight."""
        read = math.prod(self.input)
        if self.kind == "attention":
            read += 2 * self.keys * self.outputs
        return 4 * batch * (read + math.prod(self.output)) + self.weights * weight_bits / 8


def layers(model: Model) -> list[Layer]:
    """The distinct layers and attentions of a model's published denoiser, in the order in which they run.

    The denoiser is traced on the meta device, so no weights are needed.
    """
    denoiser = published.denoiser(model)
    counts: dict[Layer, int] = {}

    def note(layer):
        counts[layer] = counts.get(layer, 0) + 1

    def linear_or_conv(name):
        def hook(module, args):
            shape, role = tuple(args[0].shape[1:]), layer_class(name)
            if isinstance(module, nn.Linear):
                note(Layer("linear", role, shape, module.out_features))
            else:
                side, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
                note(Layer("conv2d", role, shape, module.out_channels, side, stride, padding))

        return hook

    def products(module, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        tokens = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
        role, keys = ("self-attention", tokens) if context is None else ("cross-attention", context.shape[1])
        channels = module.to_q.out_features
        note(Layer("attention", role, (tokens, channels), channels, heads=module.heads, keys=keys))

    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(linear_or_conv(name))
        elif isinstance(module, Attention):
            module.register_forward_pre_hook(products, with_kwargs=True)
    with torch.no_grad():
        denoiser(**inputs(denoiser, model, 1, "meta"))
    return [layer._replace(count=count) for layer, count in counts.items()]
