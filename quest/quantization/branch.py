"""A float path beside the codes of a layer: r directions of its weight, which are not quantized (SVDQuant, 2411.05007).

    x ─┬─ input_quantizer ── kernel: the codes of W - U D ──┐
       └─ D: to r channels ── U: to the layer's outputs ────┴─ + ── bias ── y

D [r, C, kh, kw] of a convolution has its stride, padding and dilation, and U [O, r] is a product at each pixel; of a
linear layer D is [r, K]. Both are kept in float16. They multiply the input as the prologue leaves it, without rounding.

The channel form keeps whole inputs instead: y = (codes of W without these channels) x + W_c x_c. It is the control of
equal size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest.runtime.files import one_line

DTYPE = torch.float16
BITS = 16  # of both operands of its products, as they are counted
PARTS = ("down", "up", "channels")  # its tensors in a checkpoint


class Branch(nn.Module):
    """The low-rank part of a weight: down [r, C, kh, kw] or [r, K], up [O, r]. A layer makes it, see `add_branch`.

    channels: None, or the r input channels that are kept whole. Then down is the float weight of these channels,
    [O, r, kh, kw] or [O, r], and up is None.
    """

    def __init__(self, down: Tensor, up: Tensor | None, channels: Tensor | None = None):
        super().__init__()
        self.register_buffer("down", down.detach().to(DTYPE).contiguous())
        self.register_buffer("up", None if up is None else up.detach().to(DTYPE).contiguous())
        self.register_buffer("channels", channels)

    @property
    def rank(self) -> int:
        """The number of directions, or of channels that are kept whole."""
        return self.down.shape[0] if self.channels is None else len(self.channels)

    @property
    def description(self) -> dict:
        """What a checkpoint's header says of it."""
        return {"rank": self.rank, "channels": self.channels is not None}

    def product(self, weight: Tensor) -> Tensor:
        """The part of a weight of this shape that the branch multiplies, float32."""
        if self.channels is None:
            return (self.up.float() @ self.down.float().flatten(1)).view(weight.shape)
        part = torch.zeros_like(weight)
        part[:, self.channels] = self.down.float()
        return part

    def forward(self, x: Tensor, **conv) -> Tensor:
        """x [..., K] -> [..., O], or [N, C, H, W] -> [N, O, H', W']; conv: stride, padding and dilation."""
        down = self.down.to(x.dtype)
        if self.channels is not None:
            x = x[:, self.channels] if down.ndim == 4 else x[..., self.channels]
        x = F.conv2d(x, down, **conv) if down.ndim == 4 else F.linear(x, down)
        if self.up is None:
            return x
        up = self.up.to(x.dtype)
        return F.conv2d(x, up[:, :, None, None]) if down.ndim == 4 else F.linear(x, up)

    def macs(self, outputs: int) -> int:
        """Multiply-accumulates for one sample; outputs: values of the layer's output, all channels together."""
        each = self.down.numel() + (0 if self.up is None else self.up.numel())
        return each * outputs // (len(self.down) if self.up is None else len(self.up))


def names(header: dict) -> set[str]:
    """The names that the tensors of branches have in a checkpoint with this header."""
    return {f"{name}.branch.{part}" for name in header.get("branches", {}) for part in PARTS}


def restore(layers: dict[str, nn.Module], header: dict, tensors: dict[str, Tensor], path) -> None:
    """Give these layers their branches of a checkpoint. Raises ValueError for one that does not fit its layer."""
    told = header.get("branches", {})
    for name in told.keys() & layers.keys():
        layer, (down, up, channels) = layers[name], (tensors.get(f"{name}.branch.{part}") for part in PARTS)
        (outputs, inputs, *taps), rank = layer.weight_shape, told[name]["rank"]
        if told[name]["channels"]:
            shapes, dtypes = ((outputs, rank, *taps), None, (rank,)), (DTYPE, None, torch.int64)
        else:
            shapes, dtypes = ((rank, inputs, *taps), (outputs, rank), None), (DTYPE, DTYPE, None)
        own = (down, up, channels)
        fits = shapes == tuple(t if t is None else tuple(t.shape) for t in own)
        fits = fits and dtypes == tuple(t if t is None else t.dtype for t in own)
        fits = fits and (channels is None or bool(((channels >= 0) & (channels < inputs)).all()))
        if not fits or layer.groups > 1:
            raise ValueError(one_line(f"{path}: the branch of {name} does not fit its weight {layer.weight_shape}"))
        layer.branch = Branch(down.clone(), up, channels).to(layer.weight_quantizer.scale.device)
