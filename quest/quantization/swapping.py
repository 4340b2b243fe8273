"""Replaces the layers of a pipeline's denoiser by quantized ones, and says which activations have several scales."""

import copy
import dataclasses

from torch import nn

from quest.affine import FLOAT, QuantSpec
from quest.diffusion.denoisers import denoiser_of, name_of
from quest.quantization import guards, pretrained
from quest.quantization.attention import QuantAttention
from quest.quantization.layer_names import KEEP, Keep, check, layer_bits
from quest.quantization.layers import attentions, input_quantizers, name_quantizers, quant_layers, quantized, replace
from quest.quantization.splitting import split
from quest.quantization.timegroups import TimeGroups

# Scales of an activation: one per tensor, or one for every index of a dimension, as in the released QuEST at 4 bits.
GRANULARITIES = ("tensor", "released")


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
    """Return a pipeline whose denoiser has a quantized form of every Linear, Conv2d and attention, without ranges yet.

    The given pipeline does not change. The new one shares everything with it but the denoiser and the scheduler.
    keep: minimum bits by globs over names of layers and attention processors (default: KEEP). softmax_bits: bits of
    attention probabilities. weight_axis: 0 for one weight scale per output channel, None for one per tensor. splits:
    convolutions to split and where, see `concatenation_splits`.
    Raises ValueError for a pipeline that cannot be quantized (`guards.check`), and for a glob that matches nothing.
    """
    keep = KEEP if keep is None else keep
    guards.check(pipe, allow_meta=True)
    denoiser = copy.deepcopy(denoiser_of(pipe))
    layers, processors = quantizable(denoiser)
    check([*layers, *processors], keep)
    for name, layer in layers.items():
        layer_w, layer_a = layer_bits(name, w, a, keep)
        replace(denoiser, name, quantized(layer, QuantSpec(layer_w, axis=weight_axis), QuantSpec(layer_a), groups))
    for name, module in processors.items():
        qkv_bits, p_bits = layer_bits(name, a, max(softmax_bits, a), keep)
        module.set_processor(QuantAttention(QuantSpec(qkv_bits), QuantSpec(p_bits), groups))
    for name, channels in (splits or {}).items():
        replace(denoiser, name, split(denoiser.get_submodule(name), channels))
    return with_denoiser(pipe, finish(denoiser, groups))


def quantizable(denoiser: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return by name every Linear and Conv2d of a denoiser, and every attention under the name of its processor."""
    layers = {n: m for n, m in denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    return layers, {f"{n}.processor": m for n, m in attentions(denoiser)}


def finish(denoiser: nn.Module, groups: TimeGroups | None) -> nn.Module:
    """Name quantizers, attach time groups, turn off gradients, and refuse methods that would undo quantization."""
    name_quantizers(denoiser)
    guards.guard_denoiser(denoiser)
    pretrained.attach(denoiser)
    if groups is not None:
        groups.attach(denoiser)
    return denoiser.requires_grad_(False).eval()


def with_denoiser(pipe, denoiser: nn.Module):
    """Copy the pipeline with another denoiser and a copied scheduler; everything else is shared."""
    new = copy.copy(pipe)
    setattr(new, name_of(pipe), denoiser)
    new.scheduler = copy.deepcopy(pipe.scheduler)
    guards.guard(new)
    return new


def make_dynamic(denoiser: nn.Module, rows: str, group: int | None = None, symmetric: bool = False) -> None:
    """Let every activation quantizer that is not float take its scales from each tensor itself (`affine.measured`).

    rows, group, symmetric: see `QuantSpec`. Probabilities have unsigned codes always. Scales lie on the dimension that
    the product sums over:

        activation                   shape           a token              a group
        input of a convolution       [N, C, H, W]    a pixel              channels of a pixel, of one tap
        input of a linear layer      [..., C]        a token              channels of a token
        queries and keys of a head   [B, n, d]       a token              channels of a token
        values of a head             [B, m, d]       a channel            tokens of a channel
        probabilities of a head      [B, n, m]       a query              keys of a query

    With `rows` "tensor" a sample has one scale, and in attention each of its heads. Raises ValueError for a denoiser
    with time groups.
    """
    for name, axis in summed_axes(denoiser).items():
        q = denoiser.get_submodule(name)
        if q.spec.bits < FLOAT:
            signed = symmetric and not name.endswith("processor.p")
            q.make_dynamic(QuantSpec(q.spec.bits, signed, axis, rows=rows, group=group))


def make_grouped(denoiser: nn.Module, group: int) -> None:
    """Let the inputs of layers have a static scale for every `group` channels; products keep one scale for a tensor.

    Heads have few channels, and values and probabilities are summed over tokens, whose number is not fixed. Grouped
    convolutions keep one scale too.
    """
    for _, layer in quant_layers(denoiser):
        q = layer.input_quantizer
        if q.spec.bits < FLOAT and layer.groups == 1:
            q.spec = dataclasses.replace(q.spec, axis=layer.channels, group=group)


def summed_axes(denoiser: nn.Module) -> dict[str, int]:
    """Return by name the dimension of each activation that its product sums over, see `make_dynamic`."""
    channels = {f"{n}.{side}_quantizer": m.channels for n, m in quant_layers(denoiser) for side in ("input", "output")}
    others = {n: -2 if n.endswith("processor.v") else -1 for n in input_quantizers(denoiser)}
    return {n: channels.get(n, axis) for n, axis in others.items()}


def set_granularity(denoiser: nn.Module, granularity: str, a: int) -> None:
    """Let each activation have one scale ("tensor"), or with "released" at 4 bits those of `released_axes`.

    Raises ValueError for another name.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: {granularity!r} is not one of {', '.join(GRANULARITIES)}")
    axes = released_axes(denoiser) if granularity == "released" and a == 4 else {}
    for name, q in input_quantizers(denoiser).items():
        q.spec = dataclasses.replace(q.spec, axis=axes.get(name))


def released_axes(denoiser: nn.Module) -> dict[str, int]:
    """Return the dimension of each 4-bit activation along which the released QuEST has one scale per index.

        activation                                  shape             scales
        input of a convolution                      [N, C, H, W]      one per channel
        input of a linear layer                     [N, C]            one per channel
        tokens, and inputs of attention products    [B, n, C]         one per channel
        the same in CompVis's unconditional models  [B, C, n]         one per token
        probabilities                               [B, n, m]         one per key

    Most of these dimensions are summed over in a product, so no integer kernel can compute them.
    """
    by_token = tuple(f"{n}." for n, m in attentions(denoiser) if m.residual_connection)
    convolutions = {f"{n}.input_quantizer" for n, m in quant_layers(denoiser) if isinstance(m, nn.Conv2d)}
    axes = dict.fromkeys(input_quantizers(denoiser), -1)
    for name in axes:
        if name in convolutions or name.startswith(by_token) and not name.endswith("processor.p"):
            axes[name] = 1
    return axes
