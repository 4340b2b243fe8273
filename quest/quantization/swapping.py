"""A pipeline whose denoiser has quantized layers in place of the float ones, and which of their ranges have axes."""

import copy

from torch import nn

from quest.affine import QuantSpec
from quest.diffusion.denoisers import denoiser_of, name_of
from quest.quantization import guards
from quest.quantization.attention import QuantAttention
from quest.quantization.layer_names import KEEP, Keep, check, layer_bits
from quest.quantization.layers import (
    attentions,
    input_quantizers,
    name_quantizers,
    quant_layers,
    quantized,
    replace,
)
from quest.quantization.splitting import split
from quest.quantization.timegroups import TimeGroups

# How many scales an activation has: one, or one for every index of a dimension, as in the released QuEST at 4 bits.
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
    """A pipeline with every Linear, Conv2d and attention of the denoiser in its quantized twin; ranges not yet chosen.

    The pipeline that is given stays as it was; the new one shares all but denoiser and scheduler with it.
    keep: globs over the names of layers and attention processors to the bits such a one keeps at least (default: KEEP).
    softmax_bits: of the attention probabilities. weight_axis: 0 for one weight scale per output channel, None for one
    per tensor. splits: convolutions to split at a channel, see `shortcut_splits`.
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
    """By name: every Linear and Conv2d of a denoiser, and every attention, under the name of its processor."""
    layers = {n: m for n, m in denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    return layers, {f"{n}.processor": m for n, m in attentions(denoiser)}


def finish(denoiser: nn.Module, groups: TimeGroups | None) -> nn.Module:
    """Name the quantizers, attach the time groups, freeze every parameter, refuse what would undo quantization."""
    name_quantizers(denoiser)
    guards.guard_denoiser(denoiser)
    if groups is not None:
        groups.attach(denoiser)
    return denoiser.requires_grad_(False).eval()


def with_denoiser(pipe, denoiser: nn.Module):
    """A copy of the pipeline with another denoiser and a scheduler of its own; all else is shared."""
    new = copy.copy(pipe)
    setattr(new, name_of(pipe), denoiser)
    new.scheduler = copy.deepcopy(pipe.scheduler)
    guards.guard(new)
    return new


def scale_axes(denoiser: nn.Module, granularity: str, a: int) -> dict[str, int]:
    """Activation quantizer -> the dimension along which it has its scales; one that is not there has a single scale.

    "tensor": nothing. "released": `released_axes` at 4 bits, nothing at others. Raises ValueError for another name.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: {granularity!r} is not one of {', '.join(GRANULARITIES)}")
    return released_axes(denoiser) if granularity == "released" and a == 4 else {}


def released_axes(denoiser: nn.Module) -> dict[str, int]:
    """The dimension along which the released code has a scale of its own for every index, for 4-bit activations.

    Of [N, C, H, W] and [N, C] the channels, of three dimensions the last. The products' inputs and transformers' tokens
    are [B, n, C], so again the channels; an unconditional attention of CompVis works on [B, C, n], so its scales go by
    token. Probabilities [B, n, m] have one scale per key. Most of these dimensions are summed over in the product, so
    that no integer kernel can compute it.
    """
    by_token = tuple(f"{n}." for n, m in attentions(denoiser) if m.residual_connection)
    convolutions = {f"{n}.input_quantizer" for n, m in quant_layers(denoiser) if isinstance(m, nn.Conv2d)}
    axes = dict.fromkeys(input_quantizers(denoiser), -1)
    for name in axes:
        if name in convolutions or name.startswith(by_token) and not name.endswith("processor.p"):
            axes[name] = 1
    return axes
