"""What every quantized operation means: fake-quantize, then the float operation. Also the path that trains."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quest.affine import QParams, QTensor, QuantSpec, fake_quantize


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
    return weight.dequantize().detach()


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
) -> Tensor:
    """q [B, n, d], k and v [B, m, d] (B counts heads) -> [B, n, d].

    Queries, keys and values are quantized, then the normalised softmax probabilities.
    """
    p = probabilities(fake_quantize(q, q_params), fake_quantize(k, k_params), scale)
    return torch.bmm(fake_quantize(p, p_params), fake_quantize(v, v_params))


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T), [B, n, m]."""
    return torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def _float(weight: QTensor | Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QTensor) else weight
