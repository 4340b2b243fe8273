"""Whether the header of a checkpoint, and the tensors beside it, are what `checkpoint.save` writes. Loads no torch.

A hash says that a file is as it was written, not that it was written well: every field that loading uses has its type
and its range checked here, so that a wrong one is named and does not fail, or compute, somewhere else.
"""

import math
import re
from collections.abc import Callable, Iterator

FLOAT = 32  # as in quest.affine, which loads torch


def check(header, path) -> None:
    """Raise ValueError, naming the file and the first field, unless every field has its type and range."""
    for field, value, valid in _faults(header):
        raise ValueError(f"{path}: header field {field} is {_short(value)}; valid: {valid}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _faults(header) -> Iterator[tuple[str, object, str]]:
    if not isinstance(header, dict):
        yield "quest", header, "a mapping"
        return
    for field, (holds, valid) in FIELDS.items():
        if field not in header:
            yield field, None, f"{valid}; it is missing"
        elif not holds(header[field]):
            yield field, header[field], valid
    for field, (holds, valid) in OPTIONAL.items():
        if field in header and not holds(header[field]):
            yield field, header[field], valid
    for name, specs in header["layers"].items():
        yield from _spec_faults(f"layers.{name}", specs, (2, 3))
        shape = header["shapes"].get(name)
        if not (isinstance(shape, list) and len(shape) in (2, 4) and all(_count(size) for size in shape)):
            yield f"shapes.{name}", shape, "the shape of a linear layer's weight, or of a convolution's"
    for name, specs in header["attentions"].items():
        yield from _spec_faults(f"attentions.{name}", specs, (2,))
    for name in header["shapes"].keys() - header["layers"].keys():
        yield f"shapes.{name}", header["shapes"][name], "shapes of the layers only"


def _spec_faults(field, specs, counts):
    if not (isinstance(specs, list) and len(specs) in counts):
        yield field, specs, f"a list of {' or '.join(map(str, counts))} formats"
        return
    for place, spec in enumerate(specs):
        where = f"{field}[{place}]"
        if not (isinstance(spec, dict) and spec.keys() == SPEC.keys()):
            yield where, spec, f"a mapping of {', '.join(SPEC)}"
            continue
        for key, (holds, valid) in SPEC.items():
            if not holds(spec[key]):
                yield f"{where}.{key}", spec[key], valid
        if spec["wide"] is True and spec["symmetric"] is not True:
            yield f"{where}.wide", True, "wide codes are symmetric"


def _whole(value, low=0, high=2**31) -> bool:
    return type(value) is int and low <= value < high


def _count(value) -> bool:
    return _whole(value, 1)


def _text(value) -> bool:
    return isinstance(value, str)


def _mapping_of(holds: Callable) -> Callable:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _steps(value) -> bool:
    """Timesteps, each once."""
    return isinstance(value, list) and len(value) > 0 and all(map(_whole, value)) and len(set(value)) == len(value)


def _hash(value) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


SPEC = {
    "bits": (lambda value: _whole(value, 2, 17) or value == FLOAT and type(value) is int, "2 to 16, or 32 for float"),
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
    "axis": (lambda value: value is None or _whole(value, -4, 4), "null, or a dimension"),
    "wide": (lambda value: isinstance(value, bool), "true or false"),
}
_ANY = _mapping_of(lambda _: True)
FIELDS: dict[str, tuple[Callable, str]] = {
    "weights": (lambda value: value in ("codes", "float"), "codes or float"),
    "denoiser": (_text, "the name of a class"),
    "splits": (_mapping_of(_count), "channels of the first half by layer"),
    "layers": (_ANY, "formats by layer"),
    "shapes": (_ANY, "shapes by layer"),
    "attentions": (_ANY, "formats by attention"),
    "granularity": (_mapping_of(_text), "texts"),
    "time_groups": (lambda value: value is None or _steps(value), "null, or the first timesteps of groups, each once"),
    "hashes": (_mapping_of(_hash), "a SHA-256 for each tensor"),
}
OPTIONAL: dict[str, tuple[Callable, str]] = {
    "method": (_text, "the name of a method"),
    "bits": (lambda value: _text(value) and re.fullmatch(r"w\d+a\d+", value) is not None, "such as w4a8"),
    "recipe": (_ANY, "keyword arguments"),
    "timesteps": (_steps, "the calibrated timesteps, each once"),
    "cost": (_ANY, "a mapping"),
    "provenance": (_ANY, "a mapping"),
    "seconds": (
        lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
        "a number from 0 on",
    ),
}
