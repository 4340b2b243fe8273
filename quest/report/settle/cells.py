"""What a cell leaves in results/settled: enough to judge methods again without a model, in a few tens of kilobytes.

Endpoints that are means keep the value of every image (of every trajectory), so that two cells can be paired image by
image. Distances of whole sets keep their values on the joint resamples of `quest.metrics.intervals`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quest.metrics import METRICS, PER_IMAGE, Cell
from quest.report.cells import read_floors
from quest.report.settle import RECORDS, identity
from quest.runtime.files import dumps, one_line, read_json, write_text

STORE = Path(__file__).parents[3] / "results" / "settled"
DIGITS = 6  # of stored values
MEANS = ("agreement", "retrieval", "psnr", "log_latent_mse", "lite0_distance", "eps_error", "guided_eps_error")
SETS = ("kid_64w", "fid")  # distances of sets, of which a model has one
FIELDS = ("version", "model", "bits", "method", "seed", "draw", "isa", "identity", "images", "n", "values", "sets")


@dataclass(frozen=True, eq=False)
class Evidence:
    """One cell. values: {endpoint: [n]}. sets: {endpoint: (value, [R])}. about: machine, versions, hashes, seconds."""

    model: str
    bits: str
    method: str
    seed: int  # of the method
    draw: int  # of the calibration trajectories
    isa: str  # the instruction sets of the core and of torch
    identity: str  # hash of what all seeds share: weights, recipe, images
    images: str
    values: dict[str, np.ndarray]
    sets: dict[str, tuple[float, np.ndarray]]
    about: dict

    @property
    def key(self) -> tuple:
        """What two cells must share to be seeds of one row."""
        return (self.model, self.bits, self.method, self.identity)

    def value(self, endpoint: str) -> float:
        return self.sets[endpoint][0] if endpoint in self.sets else float(self.values[endpoint].mean())

    @property
    def diverged(self) -> bool:
        """Whether any value is not finite. Such a cell counts as diverged in all its endpoints."""
        return not all(np.isfinite(one).all() for one in (*self.values.values(), *(v for v, _ in self.sets.values())))

    @property
    def endpoints(self) -> list[str]:
        return [*self.values, *self.sets]


def per_image(cell: Cell, fp: Cell | None) -> dict[str, np.ndarray]:
    """The values of MEANS for every image of a cell (or trajectory), of those whose inputs it has.

    fp: the full-precision cell of the same seeds; None where `cell` is it.
    """
    return {name: values for name in MEANS if (values := PER_IMAGE[name](cell, fp)) is not None}


def content(cell: Cell, fp: Cell | None, measured: dict, seed: int, draw: int, told: dict, about: dict) -> dict:
    """The record of a cell, ready for JSON.

    measured: its metrics.json. told: what its identity is the hash of, such as weights, recipe and images.
    """
    machine = next((one["core"] for one in measured["sampled"] if one.get("core")), None) or {}
    rows = {row["metric"]: row["value"] for row in measured["rows"]}
    sets = {name: [rows[name], measured["resampled"][name]] for name in SETS if name in rows}
    return {
        "version": RECORDS,
        "model": measured["model"],
        "bits": measured["bits"],
        "method": measured["method"].partition("@")[0],
        "seed": seed,
        "draw": draw,
        "isa": "-".join(str(machine.get(name)) for name in ("isa", "torch")).lower(),  # it is part of the file's name
        "identity": identity(told),
        "images": measured["drawn"]["images"],
        "n": len(cell.index),
        "values": {name: _rounded(values) for name, values in per_image(cell, fp).items()},
        "sets": {name: [_rounded(value)[0], _rounded(resampled)] for name, (value, resampled) in sets.items()},
        "about": told | about,
    }


def _rounded(values) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in np.atleast_1d(np.asarray(values, np.float64)).tolist()]


def place(record: dict, store: Path) -> Path:
    """Where the record of a cell lies: model, bits, row with its draw and seed, instruction sets, identity."""
    name = f"{record['method']}@{record['draw']}.{record['seed']}-{record['isa']}-{record['identity']}.json"
    return store / record["model"] / record["bits"] / name


def write(record: dict, store: Path) -> Path:
    """Write a record to its place; one value to a line would make thousands of lines, so each array is one."""
    path = place(record, store)
    lines = [
        f" {dumps(key)}: {_nested(value) if key in ('values', 'sets') else dumps(value)}"
        for key, value in record.items()
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _nested(value: dict) -> str:
    return "{" + ",".join(f"\n  {dumps(name)}: {dumps(one)}" for name, one in value.items()) + "}"


def read(store: Path = STORE) -> list[Evidence]:
    """All records, sorted by place. Raises ValueError that names the file for one that is not as `content` makes it."""
    return [read_one(path) for path in sorted(store.glob("*/*/*.json"))]


def floors(store: Path = STORE) -> dict[str, dict[str, float]]:
    """{model: {endpoint: error}}: how far full precision is from itself. floors.csv is a nulls.csv (`snakemake nulls`).

    Raises ValueError, which names the file and the line, for a value that is no number.
    """
    return read_floors(store / "floors.csv")


def read_one(path: Path) -> Evidence:
    record = read_json(path)
    try:
        return _checked(record, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no record of a cell: {one_line(error)}") from None


def _checked(record: dict, path: Path) -> Evidence:
    if missing := [field for field in FIELDS if field not in record]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if record["version"] != RECORDS:
        raise ValueError(f"records of version {record['version']!r}; valid: {RECORDS}, see PROTOCOL.md")
    if path.name != place(record, Path()).name:
        raise ValueError(f"its name should be {place(record, Path()).name}")
    if unknown := [name for name in (*record["values"], *record["sets"]) if name not in METRICS]:
        raise ValueError(f"unknown endpoint {unknown[0]}")
    values = {name: _numbers(name, one) for name, one in record["values"].items()}
    for name, one in values.items():
        if not name.endswith("eps_error") and len(one) != record["n"]:
            raise ValueError(f"{name} has {len(one)} values for {record['n']} images")
    sets = {name: (float(value), _numbers(name, drawn)) for name, (value, drawn) in record["sets"].items()}
    names = ("model", "bits", "method", "seed", "draw", "isa", "identity", "images")
    return Evidence(*(record[name] for name in names), values, sets, record.get("about", {}))


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} is no list of numbers")
    return np.array(values, np.float64)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values [n]."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
