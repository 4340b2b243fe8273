"""What a layer does to the channels of its input before they are quantized: multiply each, then rotate them in blocks.

    x [..., C] ── * multiplier [C] ── blocks of channels H ── input_quantizer ── kernel ── y

The weight holds the inverse, so a layer in float computes the same with and without a prologue: for a multiplier 1 / s
its input channels are multiplied by s (SmoothQuant, arXiv:2211.10438), and for a rotation H they are rotated by H too,
because (x H) (W H)^T = x W^T (QuaRot, arXiv:2404.00456). All taps of a convolution share both, and zero padding stays
zero. A prologue runs in float in front of the kernel, whichever that is.

    H (regular)  =  1/2 |  1  1  1 -1 |     and its Kronecker powers, of size 4, 16, 64 and 256;
                        |  1  1 -1  1 |     each row sums to 1, so equal channels stay equal (ConvRot, arXiv:2512.03673)
                        |  1 -1  1  1 |
                        | -1  1  1  1 |     Sylvester's form exists for every power of two; it collects the mean in one
"""

from functools import cache

import torch
from torch import Tensor, nn

from quest.runtime.files import one_line

MULTIPLIER = "prologue.multiplier"  # the name of the factors of a layer's input channels in a checkpoint
FORMS = ("regular", "sylvester")
# Sizes that `block_size` chooses from. Few widths of U-Nets are multiples of more.
BLOCKS = {"regular": (64, 16, 4), "sylvester": (64, 32, 16, 8, 4, 2)}


@cache
def hadamard(size: int, form: str = "regular") -> Tensor:
    """Return a symmetric orthogonal matrix with entries +-1 / sqrt(size), [size, size], float32; do not write into it.

    Raises ValueError for another form, and for a size that the form does not have.
    """
    if form not in FORMS:
        raise ValueError(f"form: {form!r} is not one of {', '.join(FORMS)}")
    first = [[1, 1], [1, -1]] if form == "sylvester" else [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    start = torch.tensor(first, dtype=torch.float32, device="cpu")
    found = torch.ones_like(start[:1, :1])
    while len(found) < size:
        found = torch.kron(found, start)
    if len(found) != size:
        raise ValueError(f"block: there is no {form} Hadamard matrix of {size} in use; valid: powers of {len(start)}")
    return found / size**0.5


def block_size(channels: int, most: int | None = None, form: str = "regular") -> int:
    """Return the largest size of this form, up to `most`, that divides the channels; 1 (no rotation) if none does."""
    return next((b for b in BLOCKS[form] if channels % b == 0 and b <= (most or b)), 1)


class Prologue(nn.Module):
    """Multiplies the channels of a layer's input and rotates blocks of them. A layer makes it, see `QuantLayer`.

    multiplier: [C], or None for ones. block: channels that are rotated together, 1 for no rotation. form: one of FORMS.
    single: the weight is quantized as it is, and its dequantized values are rotated (HQ-DM, arXiv:2512.05746).
    """

    def __init__(self, multiplier: Tensor | None = None, block: int = 1, form: str = "regular", single: bool = False):
        super().__init__()
        self.block, self.form, self.single = block, form, single
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("matrix", hadamard(block, form).clone(), persistent=False)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """axis: the dimension of x that has the channels."""
        if self.multiplier is not None:
            x = x * along(self.multiplier, x, axis)
        return self.rotated(x, axis)

    def rotated(self, x: Tensor, axis: int) -> Tensor:
        """Rotate the channels of an input or of a weight."""
        if self.block == 1:
            return x
        blocks = x.movedim(axis, -1).unflatten(-1, (-1, self.block))
        return (blocks @ self.matrix).flatten(-2).movedim(-1, axis)

    @property
    def description(self) -> dict:
        """What a checkpoint's header says of it."""
        scaled = self.multiplier is not None
        return {"scaled": scaled, "block": self.block, "form": self.form, "single": self.single}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.description.items())


def restore(layers: dict[str, nn.Module], header: dict, tensors: dict[str, Tensor], path) -> None:
    """Give these layers their prologues of a checkpoint. Raises ValueError for one that does not fit its layer."""
    told = header.get("prologues", {})
    for name in told.keys() & layers.keys():
        layer, multiplier, fields = layers[name], tensors.get(f"{name}.{MULTIPLIER}"), dict(told[name])
        size = layer.weight_shape[1]
        fits = fields.pop("scaled") == (multiplier is not None) and size % fields["block"] == 0
        fits = fits and (multiplier is None or (multiplier.shape, multiplier.dtype) == ((size,), torch.float32))
        if not fits or layer.groups > 1:
            raise ValueError(one_line(f"{path}: the prologue of {name} does not fit its {size} input channels"))
        prologue = Prologue(None if multiplier is None else multiplier.clone(), **fields)
        layer.prologue = prologue.to(layer.weight_quantizer.scale.device)


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Shape values [C] so that they broadcast against x, whose dimension `axis` they belong to."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)
