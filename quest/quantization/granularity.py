"""How many scales an activation has: one, or one for every index of a dimension, as in the released QuEST at 4 bits."""

from torch import nn

from quest.quantization.layers import attentions, input_quantizers, quant_layers

GRANULARITIES = ("tensor", "released")


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
