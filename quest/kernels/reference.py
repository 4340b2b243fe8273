"""The reference kernel: quantize and dequantize the operands, then compute in floats.

It defines what each function of a kernel computes, and it is the only kernel with gradients.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quest.affine import QParams, QTensor, QuantSpec, fake_quantize

AT_ONCE = 2**26  # most attention probabilities in memory


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why this kernel cannot run on a device; None, because it always can."""
    return None


def supports(weight: QTensor, weight_spec: QuantSpec, input: QParams, **conv) -> str | None:
    """Return why this kernel cannot compute a layer; None, because it computes all."""
    return None


def supports_attention(q: QParams, k: QParams, v: QParams, p: QParams) -> str | None:
    """Return why this kernel cannot compute an attention; None, because it computes all."""
    return None


def pack(weight: QTensor, group: int | None = None) -> Tensor:
    """Return the operand of a frozen weight: here its dequantized values.

    group: how many input channels share a scale, of the weight or of the input; None if all do.
    """
    codes, zero_point, scale = (t.detach() for t in (weight.codes, weight.zero_point, weight.scale))
    return (codes - zero_point).mul_(scale)  # like `dequantize`, but with one tensor less in memory


def linear(x: Tensor, qparams: QParams, weight: QTensor | Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]. qparams quantize x; weight is a QTensor or the result of `pack`."""
    return F.linear(fake_quantize(x, qparams), _float(weight), bias)


def conv2d(x: Tensor, qparams: QParams, weight: QTensor | Tensor, bias: Tensor | None, **conv) -> Tensor:
    """x [N, C, H, W], weight [O, C / groups, kh, kw] -> [N, O, H', W']. Padding is zero, after quantization."""
    return F.conv2d(fake_quantize(x, qparams), _float(weight), bias, **conv)


def attention(
    q: Tensor, k: Tensor, v: Tensor, formats: Sequence[QParams], scale: float, mask: Tensor | None = None
) -> Tensor:
    """q [B, n, d], k and v [B, m, d] (B counts heads) -> [B, n, d].

    formats: those of queries, keys, values and the normalized softmax probabilities. mask [B, 1 or n, m] is added to
    the logits; other kernels take none. At most AT_ONCE probabilities are in memory. A larger attention is computed in
    parts, which the backward pass computes again; it adds up the gradients of p's scale over the parts.
    """
    q, k, v = map(fake_quantize, (q, k, v), formats)
    masks = () if mask is None else (mask,)

    def attend(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        return torch.bmm(fake_quantize(probabilities(q, k, scale, *masks), formats[3]), v)

    if len(q) <= (size := _part(q, k)):
        return attend(q, k, v, *masks)
    if torch.is_grad_enabled():
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([attend(*part) for part in zip(*(x.split(size) for x in (q, k, v, *masks)), strict=True)])


def observed_probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return the probabilities from which their range is chosen: all of them, [B, n, m], or [2, n, m].

    For a large attention only the smallest and the largest over the batch are returned. A range from zero to the
    maximum depends on nothing else.
    """
    if len(q) <= (size := _part(q, k)):
        return probabilities(q, k, scale, mask)
    least = most = None
    masks = [None] * -(-len(q) // size) if mask is None else mask.split(size)
    for one_q, one_k, one_mask in zip(q.split(size), k.split(size), masks, strict=True):
        p = probabilities(one_q, one_k, scale, one_mask)
        low, high = p.amin(0), p.amax(0)
        least, most = (low, high) if least is None else (torch.minimum(least, low), torch.maximum(most, high))
    return torch.stack([least, most])


def _part(q: Tensor, k: Tensor) -> int:
    """Return how many entries of the batch have at most AT_ONCE probabilities together; at least 1."""
    return max(1, AT_ONCE // max(1, q.shape[1] * k.shape[1]))


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return softmax(scale q k^T + mask), [B, n, m]."""
    if mask is not None:
        return torch.baddbmm(mask.to(q.dtype), q, k.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def _float(weight: QTensor | Tensor) -> Tensor:
    """Return the values of a QTensor; a tensor holds values already."""
    return weight.dequantize() if isinstance(weight, QTensor) else weight
