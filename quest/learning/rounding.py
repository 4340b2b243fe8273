"""AdaRound's arithmetic (arXiv:2004.10568): soft rounding of weights, its regulariser, and the codes it ends at."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quest.affine import QParams, quantize
from quest.quantization.layers import QuantLayer

GAMMA, ZETA = -0.1, 1.1  # of the rectified sigmoid (arXiv:2004.10568, equation 23)
LAMBDA = 0.01  # weight of the rounding regulariser
WARMUP = 0.2  # share of the iterations without it
BETA = (20.0, 2.0)  # its exponent, from the end of the warm-up to the last iteration


def beta(iteration: int, iterations: int) -> float | None:
    """Exponent of the regulariser: None while it is off, then falling linearly (BRECQ's comments say cosine)."""
    start = WARMUP * iterations
    if iteration < start:
        return None
    first, last = BETA
    return last + (first - last) * max(0.0, 1 - (iteration - start) / (iterations - start))


class Rounding:
    """AdaRound's variables of some layers, each one flat tensor over all their weights.

    Values lie as in a convolution whose channels are innermost, as the activations' are: no pass reorders them.
    """

    def __init__(self, layers: list[QuantLayer]):
        for layer in layers:
            if layer.weight_quantizer.spec.table is not None:
                raise ValueError(
                    f"layer {layer.input_quantizer.name}: AdaRound rounds to neighbouring whole codes only"
                )
        self.shapes = [layer.weight.shape for layer in layers]
        self.qparams = [layer.weight_quantizer.qparams for layer in layers]
        self.weights = [layer.weight.detach() for layer in layers]
        pairs = list(zip(self.weights, self.qparams, strict=True))
        scale = _flat(q.scale.detach().expand_as(w) for w, q in pairs)
        low = _flat((q.spec.qmin - q.zero_point).expand_as(w) for w, q in pairs)
        high = _flat((q.spec.qmax - q.zero_point).expand_as(w) for w, q in pairs)
        ratio = _flat(self.weights) / scale
        floor = ratio.floor()
        # So that h(alpha) is the fraction: the soft weights start as the float ones, up to clipping.
        self.alpha = -((ZETA - GAMMA) / (ratio - floor - GAMMA) - 1).log()
        # clip(floor + h) s for any h in [0, 1]; a clipped weight has no step.
        self.base = torch.minimum(torch.maximum(floor, low), high) * scale
        self.step = scale * ((floor >= low) & (floor < high))

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        return [v.view(s[0], *s[2:], s[1]).movedim(-1, 1) for v, s in parts]

    def soft(self, beta: float | None) -> list[Tensor]:
        """Dequantized weights with soft rounding; their gradient brings that of the regulariser along, see `_Soft`."""
        return self._split(_Soft.apply(self.alpha, self.base, self.step, beta))

    @torch.no_grad()
    def folded(self) -> list[Tensor]:
        """Float weights whose nearest codes are the learned ones, see `fold`."""
        up = self._split((self.alpha >= 0).float())
        return [fold(w, u, q) for w, u, q in zip(self.weights, up, self.qparams, strict=True)]


def fold(weight: Tensor, up: Tensor, qparams: QParams) -> Tensor:
    """w + (b - 1/2) s, whose nearest code is the floor of w / s plus b: plain quantized layers need no alpha.

    Gradients and distances to the next code are the original's. A weight on a tie is put on the middle of its code.
    """
    scale, zero_point, spec = qparams
    codes = ((weight / scale).floor() + up + zero_point).clamp(spec.qmin, spec.qmax)
    moved = weight + (up - 0.5) * scale
    return torch.where(quantize(moved, qparams).codes == codes, moved, (codes - zero_point) * scale)


class _Soft(torch.autograd.Function):
    """Soft weights base + h step, h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1) (arXiv:2004.10568, eq. 22, 23).

    The gradient of LAMBDA times the regulariser, the sum of 1 - |2 h - 1|^beta (eq. 24), is added on the way back: its
    value is never needed. beta None leaves it out. Written by hand for its number of passes over tensors as large as
    the weights: small units spend most of their time in them.
    """

    @staticmethod
    def forward(ctx, alpha, base, step, beta):
        sigmoid = alpha.sigmoid()
        h = (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1)
        ctx.beta = beta
        ctx.save_for_backward(sigmoid, h, step)
        return torch.addcmul(base, h, step)

    @staticmethod
    def backward(ctx, grad):
        sigmoid, h, step = ctx.saved_tensors
        grad = grad * step
        if ctx.beta is not None:
            side = (h + h).sub_(1)
            power = side.abs().log_().mul_(ctx.beta - 1).exp_().copysign_(side)
            grad.add_(power, alpha=-2 * LAMBDA * ctx.beta)
        grad = torch.ops.aten.hardtanh_backward(grad, h, 0, 1)
        return torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(ZETA - GAMMA), None, None, None


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.movedim(1, -1).flatten() for t in tensors])
