"""Read the metrics.json of cells and check their content against a schema. Needs no torch.

Tables compute with these values. Without the check, a text in place of a number would fail far from its file.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from jsonschema import Draft202012Validator

from quest.metrics import METRICS
from quest.runtime.files import one_line, read_json, read_rows

# The columns of nulls.csv, see `quest.report.nulls`.
NULLS = ("model", "null", "metric", "value", "full_precision", "apart", "n", "isa")
NULLS += ("seeds", "versions", "commit", "machine")
TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}


def _mapping(needed: dict, **optional: dict) -> dict:
    return {"type": "object", "required": list(needed), "properties": needed | optional}


_INTERVAL = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": {"type": "integer", "minimum": 1}}
_TEXTS = dict.fromkeys(("extractor", "protocol", "note"), TEXT)
_ROW = _mapping({"metric": {"enum": list(METRICS)}} | _INTERVAL | _TEXTS, reference=TEXT)
_PROVENANCE = _mapping(
    {},
    commit={"type": ["string", "null"]},
    dirty={"type": ["boolean", "null"]},
    versions={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    machine={"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
)
# The result of `quest.metrics.measure`, with the keys that `workflow.scripts.metrics` adds.
CELL = _mapping(
    {
        "model": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,99}$"},
        "method": {"type": "string", "pattern": r"^[a-z0-9][a-z0-9-]{0,99}(@[0-9]{1,9}(\.[0-9]{1,9})?)?$"},
        "bits": {"type": "string", "pattern": r"^w\d{1,2}a\d{1,2}$"},
        "rows": {"type": "array", "items": _ROW},
        "eps_error": {"type": "array", "items": _mapping({"call": COUNT, "timestep": NUMBER} | _INTERVAL)},
        "resampled": {"type": "object", "additionalProperties": {"type": "array", "minItems": 2}},
        "drawn": _mapping({"images": TEXT, "trajectories": COUNT, "timesteps": {"type": "array", "items": NUMBER}}),
        "footprint": {
            **_mapping({}, kernel=TEXT, batch=COUNT, threads=COUNT),
            "additionalProperties": {"type": ["number", "null", "array", "object"]},
        },
        "provenance": _PROVENANCE,
    },
    sampled={"type": "array", "items": _PROVENANCE},
    fingerprint={"type": "object"},
)


def read_cells(paths: Sequence[str | Path]) -> list[dict]:
    """Read cells: the results of quest.metrics.measure, each with model, method, bits and provenance.

    A cell of a run for which `snakemake nulls` has measured floors also gets `floors`, {metric: error}.

    Raises ValueError, which names the file and the field, if the content is invalid or two files hold the same cell.
    """
    cells, seen, floors, validator = [], {}, {}, Draft202012Validator(CELL)
    for path in paths:
        cell = read_json(path)
        for error in itertools.islice(validator.iter_errors(cell), 1):
            steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path]
            message = error.message
            if error.validator == "required":
                message = f"lacks {', '.join(name for name in error.validator_value if name not in error.instance)}"
            field = "".join(steps).removeprefix(".")
            raise ValueError(f"{path}: {one_line(': '.join(filter(None, [field, message])))}")
        _check_resampled(cell, path)
        key = " ".join(cell[name] for name in ("model", "method", "bits"))
        if key in seen:
            raise ValueError(f"{path}: {key} is also in {seen[key]}")
        seen[key] = path
        run = Path(*Path(path).parts[:-4])  # results/NAME of results/NAME/MODEL/METHOD/BITS/metrics.json
        if run not in floors:
            floors[run] = read_floors(run / "tables" / "nulls.csv")
        if cell["model"] in floors[run]:
            cell["floors"] = floors[run][cell["model"]]
        cells.append(cell)
    return cells


def read_floors(path: Path) -> dict[str, dict[str, float]]:
    """{model: {metric: floor}} of nulls.csv: the largest error of all null controls. Empty if there is no such file.

    A control without an error, NaN, counts for nothing, wherever it stands in the file.

    Raises ValueError, which names the file and the line, for a value that is no number.
    """
    floors: dict[str, dict[str, float]] = {}
    for line, row in enumerate(read_rows(path, NULLS) if path.is_file() else [], start=2):
        try:
            apart = float(row["apart"])
        except ValueError:
            raise ValueError(f"{path}: line {line}: apart: {row['apart']!r} is no number") from None
        if not math.isnan(apart):
            of_model = floors.setdefault(row["model"], {})
            of_model[row["metric"]] = max(apart, of_model.get(row["metric"], 0.0))
    return floors


def _check_resampled(cell: dict, path) -> None:
    """Raise ValueError unless each metric has one row and resampled values, as many as the other metrics have."""
    names, resampled = [row["metric"] for row in cell["rows"]], cell["resampled"]
    if sorted(names) != sorted(resampled):
        raise ValueError(
            f"{path}: rows are of {', '.join(names)}, resampled values of {one_line(', '.join(resampled))}"
        )
    for name, values in resampled.items():
        if not all(type(value) in (int, float) for value in values) or len(values) != len(resampled[names[0]]):
            raise ValueError(f"{path}: resampled.{name} is no list of numbers, as many as those of {names[0]}")
