"""What the tensors of a checkpoint must be, by its header."""

import math

import torch

from quest.affine import FLOAT, QuantSpec
from quest.quantization import packing, prologue
from quest.quantization.header import CODES, SCHEDULER
from quest.runtime.files import one_line

KINDS = ("weight", "input", "output")  # the quantizers of a layer, in the order of their formats in the header
LEAVES = ("scale", "zero_point")  # the tensors of a quantizer


def check_tensors(header: dict, tensors: dict[str, torch.Tensor], path) -> None:
    """Raise ValueError, which names file and tensor, for a tensor that is not finite or does not fit the header.

    Scales must be positive, zero points whole and codes within their bits. Every quantizer in the header must have a
    scale and a zero point.
    """
    quantized = {  # by name of the quantizer: its format, the shape of its weight; None for activations, and channels
        f"{n}.{kind}_quantizer": (spec, header["shapes"][n] if kind == "weight" else None, header["shapes"][n][1])
        for n, own in header["layers"].items()
        for kind, spec in zip(KINDS, own, strict=False)
    }
    for name, own in header["attentions"].items():
        each = own if len(own) > 2 else [own[0]] * 3 + own[1:]
        quantized |= {f"{name}.processor.{leaf}": (spec, None, 0) for leaf, spec in zip("qkvp", each, strict=True)}
    groups = len(header["time_groups"] or [0])

    def refuse(name, what):
        raise ValueError(one_line(f"{path}: tensor {name} {what}"))

    for name in (f"{quantizer}.{leaf}" for quantizer in quantized for leaf in LEAVES):
        if name not in tensors:
            refuse(name, "is missing")
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if value.is_floating_point() and not value.isfinite().all():
            refuse(name, "is not finite")
        if leaf in LEAVES and not name.startswith(SCHEDULER):
            if module not in quantized or not _fits(value, tensors[f"{module}.scale"], groups, *quantized[module]):
                refuse(
                    name, f"is {value.dtype} {tuple(value.shape)}: of no quantizer in the header, or not of its groups"
                )
            free = quantized[module][0].get("table") is not None  # zero points of small floats may be fractions
            if not (value > 0).all() if leaf == "scale" else not (free or (value == value.round()).all()):
                refuse(name, "holds a scale that is not positive" if leaf == "scale" else "holds a fraction")
        if name.endswith(f".{prologue.MULTIPLIER}") and not (value > 0).all():
            refuse(name, "holds a factor that is not positive")
        if leaf == CODES:
            if module not in header["layers"]:
                refuse(name, "is of no layer in the header")
            spec, weight = QuantSpec(**header["layers"][module][0]), tuple(header["shapes"][module])
            if spec.bits == FLOAT or value.dtype != packing.dtype(spec) or value.shape != packing.shape(weight, spec):
                refuse(
                    name, f"is {value.dtype} {tuple(value.shape)}, not codes of {spec.bits} bits of a weight {weight}"
                )
            if packing.largest(value, spec) >= packing.levels(spec):
                refuse(name, f"holds a code that {spec.bits} bits do not have")
    for name, (weight, *_) in header["layers"].items():
        coded = header["weights"] == CODES and weight["bits"] < FLOAT
        if (other := f"{name}.{'weight' if coded else CODES}") in tensors:
            refuse(other, f"is there, but this weight is kept as {'codes' if coded else 'floats'}")


def _fits(
    value: torch.Tensor, scale: torch.Tensor, groups: int, spec: dict, shape: list[int] | None, channels: int
) -> bool:
    """Whether scales (or the zero points of these scales) have the shape [1 or groups, ...] that their format asks for.

    shape: of the weight; None for an activation, whose channels are counted.

    A weight without groups has one for each output channel, or one for all, whatever its format: one in float has ones
    for each channel, and one of another checkpoint (`init`) has the scales that it had there.
    """
    if not value.is_floating_point() or value.ndim == 0 or (value.shape, value.dtype) != (scale.shape, scale.dtype):
        return False
    each = tuple(value.shape[1:])
    one = shape is None and (spec["axis"] is None or "rows" in spec)
    if len(value) not in (1, groups) or one and math.prod(each) != 1:
        return False
    if shape is None and "group" in spec and "rows" not in spec:
        return math.prod(each) == QuantSpec(**spec).scales(channels)
    if shape is not None and "group" in spec:
        return each == (shape[0], QuantSpec(**spec).scales(shape[1]), *shape[2:])
    return shape is None or each in ((), (1,) * len(shape), (shape[0], *(1 for _ in shape[1:])))
