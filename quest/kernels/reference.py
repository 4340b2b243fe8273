"""What every quantized operation means: fake-quantize, then the float operation. Also the path that trains."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quest.affine import QParams, QTensor, QuantSpec, fake_quantize

AT_ONCE = 2**26  # attention probabilities


def unavailable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why nothing can run on this kernel here: nothing can be in the way."""
    return None


def supports(weight: QTensor, weight_spec: QuantSpec, input: QParams, **conv) -> str | None:
    """Why a layer cannot run here: every layer can."""
    return None


def supports_attention(q: QParams, k: QParams, v: QParams, p: QParams) -> str | None:
    """Why an attention cannot run here: every one can."""
    return None


def pack(weight: QTensor) -> Tensor:
    """The form in which a frozen weight is kept: here its dequantized values."""
    codes, zero_point, scale = (t.detach() for t in (weight.codes, weight.zero_point, weight.scale))
    return (codes - zero_point).mul_(scale)  # as `dequantize`, with one tensor less in memory


def linear(x: Tensor, qparams: QParams, weight: QTensor | Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]. qparams quantize x; weight is live codes or what `pack` gave."""
    return F.linear(fake_quantize(x, qparams), _float(weight), bias)


def conv2d(x: Tensor, qparams: QParams, weight: QTensor | Tensor, bias: Tensor | None, **conv) -> Tensor:
    """x [N, C, H, W], weight [O, C / groups, kh, kw] -> [N, O, H', W']. Padding is zero, after quantization."""
    return F.conv2d(fake_quantize(x, qparams), _float(weight), bias, **conv)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_params: QParams,
    k_params: QParams,
    v_params: QParams,
    p_params: QParams,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """q [B, n, d], k and v [B, m, d] (B counts heads) -> [B, n, d].

    Queries, keys and values are quantized, then the normalised softmax probabilities. mask [B, 1 or n, m] is added to
    the logits; other kernels take none. Of the probabilities, at most AT_ONCE are in memory: larger attentions are
    computed in parts, again in the backward pass, which then sums the gradient of p's scale over the parts.
    """
    q, k, v = fake_quantize(q, q_params), fake_quantize(k, k_params), fake_quantize(v, v_params)
    masks = () if mask is None else (mask,)

    def attend(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        return torch.bmm(fake_quantize(probabilities(q, k, scale, *masks), p_params), v)

    if len(q) <= (size := _part(q, k)):
        return attend(q, k, v, *masks)
    if torch.is_grad_enabled():
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([attend(*part) for part in zip(*(x.split(size) for x in (q, k, v, *masks)), strict=True)])


def observed_probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """What the range of probabilities is chosen from: all of them, [B, n, m], or of a large attention, [2, n, m].

    Those are the least and the largest over the batch, which is all that a range from zero to the maximum depends on.
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
    """How many of the batch have at most AT_ONCE probabilities, at least one."""
    return max(1, AT_ONCE // max(1, q.shape[1] * k.shape[1]))


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + mask), [B, n, m]."""
    if mask is not None:
        return torch.baddbmm(mask.to(q.dtype), q, k.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def _float(weight: QTensor | Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QTensor) else weight
