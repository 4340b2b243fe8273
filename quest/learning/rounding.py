"""AdaRound's arithmetic (arXiv:2004.10568): soft rounding of weights, its regulariser, and the codes it ends at."""

from collections.abc import Iterable

import torch
from torch import Tensor

from quest.affine import QParams, quantize
from quest.learning.adam import Adam
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

    soft: the dequantized weights with soft rounding, one leaf of the graph for each layer: base + h width, with
    h = clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1) (arXiv:2004.10568, equations 22 and 23). `step` moves alpha by
    the gradients of a loss in them, and changes them in place. It is written by hand, for few passes over tensors as
    large as the weights: small units spend most of their time in them.

    Values lie as in a convolution whose channels are innermost, as the activations' are: no pass reorders them.
    """

    def __init__(self, layers: list[QuantLayer]):
        for layer in layers:
            if layer.weight_quantizer.spec.table is not None or layer.weight_quantizer.spec.widths is not None:
                raise ValueError(
                    f"layer {layer.input_quantizer.name}: AdaRound rounds to neighbouring whole codes of one width only"
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
        # clip(floor + h) s for any h in [0, 1]; a clipped weight has no width.
        self.base = torch.minimum(torch.maximum(floor, low), high) * scale
        self.width = scale * ((floor >= low) & (floor < high))
        self.adam = Adam([self.alpha])
        # Passes write into the same memory in every iteration. The last three are the gradient of alpha on its way.
        buffers = self.alpha.new_empty(6, len(self.alpha))
        self.sigmoid, self.h, self._soft, self._gradient, self._side, self._power = buffers
        sizes = [shape.numel() for shape in self.shapes]
        self._layers = list(zip(self.width.split(sizes), self._gradient.split(sizes), strict=True))
        self.soften()
        self.soft = [v.detach().requires_grad_() for v in self._split(self._soft)]

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = zip(flat.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        return [v.view(s[0], *s[2:], s[1]).movedim(-1, 1) for v, s in parts]

    @torch.no_grad()
    def soften(self) -> None:
        """Write the weights that belong to alpha into `soft`."""
        torch.sigmoid(self.alpha, out=self.sigmoid)
        torch.mul(self.sigmoid, ZETA - GAMMA, out=self.h).add_(GAMMA).clamp_(0, 1)
        torch.addcmul(self.base, self.h, self.width, out=self._soft)

    @torch.no_grad()
    def gradient(self, gradients: Iterable[Tensor], beta: float | None) -> Tensor:
        """The gradient of alpha, from those of a loss in `soft`: of the loss plus LAMBDA times the regulariser.

        The regulariser is the sum of 1 - |2 h - 1|^beta over all weights (equation 24); beta None leaves it out.
        """
        grad, h = self._gradient, self.h
        for of_layer, (width, part) in zip(gradients, self._layers, strict=True):
            torch.mul(_lain(of_layer), width, out=part)
        if beta is not None:
            side, power = torch.add(h, h, out=self._side).sub_(1), self._power
            torch.abs(side, out=power).log_().mul_(beta - 1).exp_().copysign_(side)
            grad.add_(power, alpha=-2 * LAMBDA * beta)
        torch.ops.aten.hardtanh_backward.grad_input(grad, h, 0, 1, grad_input=grad)
        return torch.ops.aten.sigmoid_backward.grad_input(grad, self.sigmoid, grad_input=grad).mul_(ZETA - GAMMA)

    def step(self, gradients: Iterable[Tensor], beta: float | None, lr: float) -> None:
        """One step of Adam on alpha, see `gradient`."""
        self.adam.step([self.gradient(gradients, beta)], lr)
        self.soften()

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


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([_lain(t) for t in tensors])


def _lain(weight: Tensor) -> Tensor:
    """[O, C, ...] -> one dimension, channels innermost."""
    return weight.movedim(1, -1).flatten()
