"""Formats of 4-bit inputs that follow a SiLU: a study of zero points and of small floats.

A SiLU is never below -0.2785, and most of its output is positive. With 16 codes from -0.2785 to 8 a step is 0.55, so
the zero point is 0 or 1, and with 0 all negative values become zeros. Every format below quantizes inputs of the first
and second convolution of a residual block, of its time embedding and of `conv_out` (where that has 4 bits); weights and
other activations are those of the row without it.

    symmetric      -7 to 7
    nearest        0 to 15, the zero point rounded to the nearest, not clamped to the codes (as DMQ, arXiv:2507.12933)
    fixed          0 to 15 from -0.2785 on, the zero point rounded up: no negative value is clipped
    shifted        the same, the zero point not rounded: x + 0.2785 has unsigned codes, and the bias takes it back
                   (SVDQuant, arXiv:2411.05007, with 0.2734)
    free           the zero point not rounded, searched with the range
    e2m1           signed floats
    e2m2           unsigned floats with a zero point that is not rounded (MSFP, arXiv:2505.21591)
    nvfp4          E2M1 in groups of 16 channels of a pixel, scales E4M3
    int4-blocks    -7 to 7 in the same groups, with the same scales: the control of nvfp4

No range is widened to include zero, and no zero point is clamped. Where zero points are not whole numbers, convolutions
pad with the real zero here; integers would need a correction at the borders. Kernels compute the first three.
"""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor, nn

from quest.affine import QuantSpec
from quest.quantization import ranges
from quest.quantization.layers import quant_layers

LOWEST = -0.2785  # of a SiLU, rounded down
BITS = 4
LAYERS = ("*.conv1", "*.conv2", "*.time_emb_proj", "time_embedding.linear_2", "conv_out")  # whose input is a SiLU's


def from_lowest(x: Tensor, spec: QuantSpec, rounded: Callable = torch.ceil) -> tuple[Tensor, Tensor]:
    """Choose of 80 ranges from LOWEST to (1 - 0.01 i) max x the one of least error, as `ranges.mse` does.

    rounded: what becomes of the zero point -LOWEST / scale.
    """
    high = x.amax() * (1 - 0.01 * torch.arange(80, device=x.device, dtype=x.dtype))
    scale = ((high - LOWEST) / (spec.qmax - spec.qmin)).clamp(min=ranges.EPS)[:, None]
    zero_point = rounded(-LOWEST / scale)
    best = ranges.least_error(x.reshape(1, -1), scale, zero_point, spec).view(())
    return scale[best, 0], zero_point[best, 0]


# Table e1m3 has the whole numbers 0 to 15, and allows zero points between them.
FORMATS: dict[str, tuple[dict, Callable | None]] = {  # fields of the format, and how its range is chosen
    "symmetric": (dict(symmetric=True, narrow=True), ranges.mse),
    "nearest": ({}, ranges.mse),
    "fixed": ({}, from_lowest),
    "shifted": (dict(table="e1m3"), partial(from_lowest, rounded=lambda zero_point: zero_point)),
    "free": (dict(table="e1m3"), ranges.mse_free),
    "e2m1": (dict(symmetric=True, table="e2m1"), ranges.mse),
    "e2m2": (dict(table="e2m2"), ranges.mse_free),
    "nvfp4": (dict(symmetric=True, rows="token", group=16, table="e2m1", block_scale="e4m3"), None),
    "int4-blocks": (dict(symmetric=True, rows="token", group=16, block_scale="e4m3"), None),
}


def set_formats(denoiser: nn.Module, name: str) -> dict[str, Callable]:
    """Give 4-bit inputs after a SiLU this format. Returns how the ranges of static ones are chosen, by quantizer.

    Raises ValueError where there is no such input.
    """
    fields, choose = FORMATS[name]
    layers = {n: m for n, m in quant_layers(denoiser) if any(fnmatch(n, glob) for glob in LAYERS)}
    layers = {n: m for n, m in layers.items() if m.input_quantizer.spec.bits == BITS}
    if not layers:
        raise ValueError(f"after_silu: {name!r} is of {BITS}-bit inputs after a SiLU, and this denoiser has none")
    for layer in layers.values():
        q = layer.input_quantizer
        if choose is None:
            q.make_dynamic(QuantSpec(BITS, axis=layer.channels, **fields))
        else:
            q.spec = replace(q.spec, **fields)
    return {f"{n}.input_quantizer": choose for n in layers} if choose else {}
