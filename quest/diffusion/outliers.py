"""The outlier dial: a model with a few large channels, which computes the same as before in full precision.

Where one linear map follows another, a channel between them can be made larger by the first and read with smaller
weights by the second. The product is the same, but an activation range for the whole tensor then has to span a few
large values and many small ones. That is the imbalance on which QuEST's argument rests (arXiv:2402.03666, section 3),
and it can be dialled: 1, 4 or 16 times. Factors are powers of two, so no product of floats rounds differently.
"""

from collections.abc import Iterator

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

SHARE = 16  # one channel of so many is scaled, at least one


@torch.no_grad()
def rescale(denoiser: nn.Module, factor: int) -> list[str]:
    """Enlarge some channels of a float denoiser in place; returns the names of what reads them.

    factor: a power of two from 1 on. Scaled are values and what reads them, queries (against keys), the value branch of
    GEGLU, and the outputs of normalizations that only linear layers read. Raises ValueError for another factor.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"outliers: factor {factor}; valid: powers of two from 1 on")
    names = []
    for number, (name, enlarged, reduced) in enumerate(pairs(denoiser)):
        channels = enlarged[0].shape[0]
        chosen = (
            torch.arange(number % SHARE, channels, SHARE) if channels > SHARE else torch.tensor([number % channels])
        )
        for rows in enlarged:
            rows[chosen] *= factor
        for columns in reduced:
            columns[:, chosen] /= factor
        names.append(name)
    return names


def pairs(denoiser: nn.Module) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """(name, tensors whose rows [channels, ...] can grow, tensors whose columns [..., channels, ...] then shrink)."""
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention):
            yield f"{name}.to_out", _rows(module.to_v), [module.to_out[0].weight]
            yield f"{name}.to_k", _rows(module.to_q), [one[None] for one in _rows(module.to_k)]
            if module.group_norm is not None and not module.norm_cross:
                yield f"{name}.to_v", _rows(module.group_norm), _read(module)
        elif isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            inner = module.net[2].in_features
            yield f"{name}.net.2", [one[:inner] for one in _rows(module.net[0].proj)], [module.net[2].weight]
        elif isinstance(module, BasicTransformerBlock) and module.norm_type == "layer_norm":
            cross = module.attn2 is not None and module.attn2.is_cross_attention
            yield f"{name}.attn1.to_v", _rows(module.norm1), _read(module.attn1)
            if module.attn2 is not None:
                second = [module.attn2.to_q.weight] if cross else _read(module.attn2)
                yield f"{name}.attn2.to_q", _rows(module.norm2), second
            if isinstance(module.ff.net[0], GEGLU):
                yield f"{name}.ff.net.0", _rows(module.norm3), [module.ff.net[0].proj.weight]
        elif isinstance(module, Transformer2DModel) and isinstance(getattr(module, "norm", None), nn.GroupNorm):
            yield f"{name}.proj_in", _rows(module.norm), [module.proj_in.weight]


def _rows(module: nn.Module) -> list[Tensor]:
    return [one for one in (module.weight, module.bias) if one is not None]


def _read(attention: Attention) -> list[Tensor]:
    """The weights that read the input of a self-attention."""
    return [layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]
