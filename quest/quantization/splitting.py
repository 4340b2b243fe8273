"""Splits a convolution over a concatenated input into two convolutions, each with its own quantizers."""

from inspect import signature

import torch
from torch import Tensor, nn

from quest.diffusion.denoisers import hooked
from quest.kernels.cpu.integer import plus
from quest.quantization.layers import QuantLayer


class SplitConv2d(nn.Module):
    """A convolution over the concatenation [hidden, skip], computed as the sum of two convolutions.

        conv([hidden, skip])  =  hidden_conv(hidden)  +  skip_conv(skip)

    The two inputs of a decoder's shortcut have different ranges, so each gets its own quantizers (Q-Diffusion,
    arXiv:2302.04304, section 4.2). Q-Diffusion's code dequantizes both and concatenates them again. The result is the
    same, but the input is float then; here both convolutions multiply integers.
    """

    def __init__(self, hidden: nn.Conv2d, skip: nn.Conv2d):
        super().__init__()
        self.hidden, self.skip = hidden, skip

    def forward(self, x: Tensor) -> Tensor:
        channels = self.hidden.in_channels
        return plus(self.skip, x[:, channels:], self.hidden(x[:, :channels]))


def split(conv: nn.Conv2d, channels: int) -> SplitConv2d:
    """Split a float or quantized convolution into one over its first `channels` inputs, with the bias, and the rest.

    Both have new quantizers of the same formats, without ranges.
    """
    if getattr(conv, "prologue", None) is not None or getattr(conv, "branch", None) is not None:
        raise NotImplementedError("split a convolution before it gets a prologue or a branch")
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
def concatenation_splits(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Find the convolutions of the decoder that read a concatenation: {name: channels of its first part}.

    These are conv_shortcut and conv1 of its residual blocks. One forward pass shows them. A residual block of an up
    block reads [hidden, skip], and takes its skip from the end of the tuple that the up block receives. A denoiser
    without up blocks has none.
    """
    found: dict[str, int] = {}

    def record(name):
        def hook(block, args, kwargs):
            skips = signature(block.forward).bind(*args, **kwargs).arguments["res_hidden_states_tuple"]
            for j, resnet in enumerate(block.resnets):
                for kind in ("conv_shortcut", "conv1"):
                    if isinstance(conv := getattr(resnet, kind, None), nn.Conv2d):
                        found[f"{name}.resnets.{j}.{kind}"] = conv.in_channels - skips[-1 - j].shape[1]

        return hook

    handles = [
        block.register_forward_pre_hook(record(f"up_blocks.{i}"), with_kwargs=True)
        for i, block in enumerate(getattr(denoiser, "up_blocks", ()))
        if "res_hidden_states_tuple" in signature(block.forward).parameters and hasattr(block, "resnets")
    ]
    with hooked(handles):
        denoiser(**inputs)
    return found


def split_layers(denoiser: nn.Module) -> dict[str, int]:
    """Return the split convolutions by name, with the number of channels of their first part."""
    return {n: m.hidden.in_channels for n, m in denoiser.named_modules() if isinstance(m, SplitConv2d)}
