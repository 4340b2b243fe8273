"""Reads and checks the header of a checkpoint, without torch, because reports do not load torch.

A hash shows that a file was not changed after it was written, not that its content is valid. So the type and range of
every field are checked here. A wrong field is named in an error and cannot cause a failure, or a wrong result, later.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from quest.runtime.files import dumps, loads
from quest.runtime.hashing import opened

# 1 kept every weight in float32 and had no hashes. 3 is 2 with prologues or branches, which a version that reads only 2
# would lose.
FORMATS = 2, 3
FLOAT = 32  # as in quest.affine, which loads torch
CODES = "codes"  # the name of a layer's packed weight; a float weight is called `weight`
SCHEDULER = "scheduler."  # prefix of the tensors that belong to the scheduler, not to the denoiser


class Effort(TypedDict):
    """The cost of making a checkpoint; NaN where the header does not state a value.

    seconds, peak_memory (1e6 bytes): of the quantize job. seconds_before, peak_memory_before: of the job whose
    checkpoint it started from; 0 if it started from full precision. iterations: of all stages; NaN if the method
    diverged.
    """

    seconds: float
    seconds_before: float
    peak_memory: float
    peak_memory_before: float
    iterations: float


def effort(path: str | Path) -> Effort:
    """Read the effort from a checkpoint's header. Raises ValueError as `read` does, and if it does not list stages."""
    header = read(path, diverged=True)
    stages = header.get("cost", {}).get("stages")
    if stages is None and "diverged" not in header:
        raise ValueError(f"{path}: header field cost.stages is None; valid: {OPTIONAL['cost'][1]}; it is missing")
    started = header.get("init") or {"seconds": 0.0, "peak_memory": 0}
    return {
        "seconds": header.get("seconds", math.nan),
        "seconds_before": started.get("seconds", math.nan),
        "peak_memory": header.get("peak_memory", math.nan),
        "peak_memory_before": started.get("peak_memory", math.nan),
        "iterations": math.nan if stages is None else sum(stage["iterations"] for stage in stages),
    }


def read(path: str | Path, diverged: bool = False) -> dict:
    """Read the header of a checkpoint.

    diverged: whether to return the header of a method that diverged too, which has no layers (see
    `checkpoint.save_diverged`). Raises ValueError for a file that `checkpoint.save` of this version did not write, and
    without `diverged` FloatingPointError for a method that diverged.
    """
    with opened(path, "numpy") as file:
        return of(file, path, diverged)


def of(file, path, diverged: bool = False) -> dict:
    """Read the header of an open file, see `read`."""
    try:
        header = loads((file.metadata() or {})["quest"], path)
        if not isinstance(header, dict):
            raise ValueError(f"{path}: its header is not a mapping")
        if type(header["format"]) is not int or header["format"] not in FORMATS:
            raise ValueError(
                f"{path} has checkpoint format {header['format']!r}, this version reads "
                f"{' and '.join(map(str, FORMATS))}: quantize again"
            )
        if "diverged" not in header:
            header["layers"]  # a calibration set has a header too
        if header["hash"] != header_hash(header):
            raise ValueError(f"{path} is corrupted: its header is not what was saved")
    except KeyError as error:
        raise ValueError(f"{path} is not a quantized checkpoint: its header lacks {error}") from error
    check(header, path)
    if "diverged" in header and not diverged:
        made = " ".join(filter(None, (header.get("method"), header.get("bits"))))
        raise FloatingPointError(
            f"{path}: {made or 'the method'} diverged, so there is no denoiser: {header['diverged']}"
        )
    return header


def sealed(fields: dict) -> dict:
    """Return a header of these fields, with the format version and the hash added."""
    header = {"format": FORMATS[bool(fields.get("prologues") or fields.get("branches"))]} | fields
    return header | {"hash": header_hash(header)}


def header_hash(header: dict) -> str:
    """Return the SHA-256 of a header as JSON without the hash itself."""
    return hashlib.sha256(dumps({k: v for k, v in header.items() if k != "hash"}).encode()).hexdigest()


def check(header, path) -> None:
    """Raise ValueError, which names the file and the first wrong field, unless all types and ranges are right."""
    for field, value, valid in _faults(header):
        raise ValueError(f"{path}: header field {field} is {_short(value)}; valid: {valid}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _faults(header) -> Iterator[tuple[str, object, str]]:
    if not isinstance(header, dict):
        yield "quest", header, "a mapping"
        return
    for field, (holds, valid) in OPTIONAL.items():
        if field in header and not holds(header[field]):
            yield field, header[field], valid
    if "diverged" in header:  # no denoiser, no other fields
        return
    for field, (holds, valid) in FIELDS.items():
        if field not in header:
            yield field, None, f"{valid}; it is missing"
        elif not holds(header[field]):
            yield field, header[field], valid
    for name, specs in header["layers"].items():
        yield from _spec_faults(f"layers.{name}", specs, (2, 3), header["time_groups"], weight=True)
        shape = header["shapes"].get(name)
        if not (isinstance(shape, list) and len(shape) in (2, 4) and all(_count(size) for size in shape)):
            yield f"shapes.{name}", shape, "the shape of a linear layer's weight, or of a convolution's"
        elif isinstance(widths := _widths_of(specs), str) and len(widths) != shape[0]:
            yield f"layers.{name}[0].widths", widths, f"a digit for each of {shape[0]} output channels"
    for name, specs in header["attentions"].items():
        yield from _spec_faults(f"attentions.{name}", specs, (2, 4), header["time_groups"])
    for field in ("prologues", "branches"):
        for name in header.get(field, {}).keys() - header["layers"].keys():
            yield f"{field}.{name}", header[field][name], f"{field} of the layers only"
    for name in header["shapes"].keys() - header["layers"].keys():
        yield f"shapes.{name}", header["shapes"][name], "shapes of the layers only"


def _spec_faults(field, specs, counts, groups, weight=False):
    if not (isinstance(specs, list) and len(specs) in counts):
        yield field, specs, f"a list of {' or '.join(map(str, counts))} formats"
        return
    for place, spec in enumerate(specs):
        where = f"{field}[{place}]"
        if not (isinstance(spec, dict) and SPEC.keys() <= spec.keys() <= SPEC.keys() | SOME.keys()):
            yield where, spec, f"a mapping of {', '.join(SPEC)}, and in some formats {', '.join(SOME)}"
            continue
        for key, (holds, valid) in (SPEC | SOME).items():
            if key in spec and not holds(spec[key]):
                yield f"{where}.{key}", spec[key], valid
        of_weight = weight and place == 0
        plain = spec["axis"] is None or spec["wide"] is True or spec["bits"] == FLOAT
        if "rows" in spec and (plain or groups is not None or of_weight):
            yield f"{where}.rows", spec["rows"], "of an activation with an axis and less than 32 bits, no time groups"
        if "group" in spec and (spec["axis"] is None or of_weight != (spec["axis"] == 0)):
            yield f"{where}.group", spec["group"], "of a weight with axis 0, or of an activation with another axis"
        if "block_scale" in spec and ("group" not in spec or spec["block_scale"] != "e4m3" and not spec["symmetric"]):
            yield f"{where}.block_scale", spec["block_scale"], "of groups only, and powers of two of symmetric codes"
        if isinstance(table := spec.get("table"), str) and SOME["table"][0](table):
            if int(table[1]) + int(table[3]) != spec["bits"] - (spec["symmetric"] is True):
                yield f"{where}.table", table, "bits of exponent and mantissa that add up to those of the format"
        if "narrow" in spec and (spec["symmetric"] is not True or spec["wide"] is True):
            yield f"{where}.narrow", spec["narrow"], "of symmetric codes that are not wide"
        if "widths" in spec and not (of_weight and _widths(spec)):
            yield f"{where}.widths", spec["widths"], "of a weight of unsigned whole numbers: digits from 2 to its bits"
        if "shifts" in spec and (plain or {"rows", "group", "table"} & spec.keys() or of_weight):
            yield f"{where}.shifts", spec["shifts"], "of a static activation with an axis and less than 32 bits"
        if spec["wide"] is True and spec["symmetric"] is not True:
            yield f"{where}.wide", True, "wide codes are symmetric"


def _widths_of(specs):
    """The widths of a layer's weight, if its formats are there."""
    return specs[0].get("widths") if isinstance(specs, list) and specs and isinstance(specs[0], dict) else None


def _widths(spec) -> bool:
    """Whether the widths of a format fit its other fields."""
    plain = spec["symmetric"] is False and spec["axis"] == 0 and not {"rows", "group", "table", "shifts"} & spec.keys()
    return plain and _text(spec["widths"]) and spec["widths"] != "" and max(spec["widths"]) == str(spec["bits"])


def _whole(value, low=0, high=2**31) -> bool:
    return type(value) is int and low <= value < high


def _count(value) -> bool:
    return _whole(value, 1)


def _text(value) -> bool:
    return isinstance(value, str)


def _mapping_of(holds: Callable) -> Callable:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _steps(value) -> bool:
    """Whether a value is a list of different timesteps: all whole numbers, or all floats, as some samplers visit."""
    each = isinstance(value, list) and all(_amount(step) and step < 2**31 for step in value)
    return each and len(set(map(type, value))) == 1 and len(set(value)) == len(value)


def _amount(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _init(value) -> bool:
    """Whether a value describes the checkpoint that this one started from; what that header lacked is null."""
    kinds = {"method": _text, "bits": _text, "seconds": _amount, "peak_memory": _amount}
    return isinstance(value, dict) and all(value.get(k) is None or holds(value[k]) for k, holds in kinds.items())


def _cost(value) -> bool:
    stages = value.get("stages", []) if isinstance(value, dict) else None
    if not isinstance(stages, list):
        return False
    named = (isinstance(one, dict) and _text(one.get("stage")) and _whole(one.get("iterations")) for one in stages)
    footprint = value.get("footprint", {"bytes": 0, "macs": 0, "bops": 1})
    counted = isinstance(footprint, dict) and {"bytes", "macs", "bops"} <= footprint.keys()
    counted = counted and all(map(_amount, footprint.values()))
    return all(named) and counted and footprint["bops"] > 0


def _schedule(value) -> bool:
    """Whether a value has the form of what `samplers.trained_on` returns."""
    kinds = {
        "prediction_type": _text,
        "num_train_timesteps": _count,
        "betas": lambda v: isinstance(v, list) and len(v) == 3 and all(map(_amount, v)),
    }
    return isinstance(value, dict) and value.keys() <= kinds.keys() and all(kinds[k](v) for k, v in value.items())


def _prologue(value) -> bool:
    """Whether a value is what `prologue.Prologue.description` returns."""
    kinds = {
        "scaled": lambda v: isinstance(v, bool),
        "block": lambda v: _count(v) and v & (v - 1) == 0,
        "form": lambda v: v in ("regular", "sylvester"),
        "single": lambda v: isinstance(v, bool),
    }
    if not (isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[k](v) for k, v in value.items())):
        return False
    return value["form"] == "sylvester" or value["block"].bit_length() % 2 == 1  # regular ones: powers of 4


def _branch(value) -> bool:
    """Whether a value is what `branch.Branch.description` returns."""
    told = isinstance(value, dict) and value.keys() == {"rank", "channels"}
    return told and _count(value["rank"]) and isinstance(value["channels"], bool)


def _couples(value) -> bool:
    """Whether a value is what a denoiser's `coupled` says, see `checkpoint.load_weights`."""
    return isinstance(value, list) and all(isinstance(one, list) and all(map(_text, one)) for one in value)


def _hash(value) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


SPEC = {
    "bits": (lambda value: _whole(value, 2, 17) or value == FLOAT and type(value) is int, "2 to 16, or 32 for float"),
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
    "axis": (lambda value: value is None or _whole(value, -4, 4), "null, or a dimension"),
    "wide": (lambda value: isinstance(value, bool), "true or false"),
}
SOME = {  # what only some formats have
    "rows": (lambda value: value in ("tensor", "token"), "tensor or token"),
    "group": (_count, "a number from 1 on"),
    "table": (lambda value: _text(value) and re.fullmatch("e[1-5]m[0-9]", value) is not None, "such as e2m1"),
    "block_scale": (lambda value: value in ("e4m3", "e8m0", "e8m0-up"), "e4m3, e8m0 or e8m0-up"),
    "narrow": (lambda value: value is True, "true, or no such field"),
    "widths": (lambda value: _text(value) and re.fullmatch("[2-8]+", value) is not None, "digits from 2 to 8"),
    "shifts": (lambda value: _whole(value, 1, 8), "a number from 1 to 7"),
}
_ANY = _mapping_of(lambda _: True)
FIELDS: dict[str, tuple[Callable, str]] = {
    "weights": (lambda value: value in ("codes", "float"), "codes or float"),
    "denoiser": (_text, "the name of a class"),
    "splits": (_mapping_of(_count), "channels of the first half by layer"),
    "layers": (_ANY, "formats by layer"),
    "shapes": (_ANY, "shapes by layer"),
    "attentions": (_ANY, "formats by attention"),
    "granularity": (
        lambda value: _mapping_of(_text)(value) and {"weights", "activations"} <= value.keys(),
        "a text for weights and one for activations",
    ),
    "time_groups": (lambda value: value is None or _steps(value), "null, or the first timesteps of groups, each once"),
    "hashes": (_mapping_of(_hash), "a SHA-256 for each tensor"),
}
OPTIONAL: dict[str, tuple[Callable, str]] = {
    "diverged": (_text, "where and why the method diverged"),
    "model": (_text, "the name of a model"),
    "method": (_text, "the name of a method"),
    "bits": (lambda value: _text(value) and re.fullmatch(r"w\d+a\d+", value) is not None, "such as w4a8"),
    "recipe": (_ANY, "keyword arguments"),
    "timesteps": (_steps, "the calibrated timesteps, each once"),
    "prologues": (_mapping_of(_prologue), "scaled, block, form and single by layer"),
    "branches": (_mapping_of(_branch), "rank, and whether whole channels are kept, by layer"),
    "coupled": (_couples, "lists of layers whose weights were changed together"),
    "cost": (
        _cost,
        "a mapping; its stages have a stage and iterations, its footprint bytes, macs, bops and other numbers",
    ),
    "provenance": (_ANY, "a mapping"),
    "config": (_ANY, "the denoiser's configuration"),
    "scheduler": (_schedule, "prediction_type, num_train_timesteps and three betas"),
    "seconds": (_amount, "a number from 0 on"),
    "peak_memory": (_amount, "a number from 0 on"),
    "init": (_init, "a mapping of method, bits, seconds and peak_memory"),
}
