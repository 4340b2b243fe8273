"""One model with one thing changed at a time: every row against the recipe that it changes, on the same seeds.

A row's difference is paired as in paired.csv: both cells were drawn from the same noise and are resampled together.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.quantization.header import effort
from quest.report import rendering
from quest.report.rendering import MISSING, NONE, Cell, Table, columns, interval, number
from quest.report.tables import footprint_of, paired_rows, provenance_of, read

SHOWN = ("latent_mse", "fid_to_fp", "eps_error")  # with differences, in Markdown
COLUMNS = ["model", "bits", "row", "changes", "metric", "value", "low", "high", "n"]
COLUMNS += ["versus", "difference", "difference_low", "difference_high", "better"]
COLUMNS += ["seconds", "seconds_before", "peak_memory", "iterations", "size_mb", "realizable", "note"]
COLUMNS += ["seeds", "versions", "commit", "machine"]


def write(paths: Sequence[str | Path], block: dict, csv: str | Path, text: str | Path) -> pd.DataFrame:
    """Write both tables of the rows' metrics.json files; each checkpoint, model.safetensors, lies beside its own.

    block: `ablations` of the config. Returns the frame of the csv.
    """
    cells = read(paths)
    spent = [effort(Path(path).with_name("model.safetensors")) for path in paths]
    frame = ablations_frame(cells, spent, block)
    rendering.write(csv, frame, form="csv")
    rendering.write(text, ablations_table(frame, block["against"]), form="md")
    return frame


def ablations_frame(cells: Sequence[dict], spent: Sequence[dict], block: dict) -> pd.DataFrame:
    """One row for each cell, metric and `versus`, columns COLUMNS, in the order of the cells.

    versus: block["against"], and the method that a row is `of`; empty for the cell itself. better: see
    `Comparison.better`. Raises ValueError where a cell to compare with is missing.
    """
    of_name = {cell["method"]: cell for cell in cells}
    rows = []
    for cell, took in zip(cells, spent, strict=True):
        name = cell["method"]
        changes = block["rows"].get(name, {})
        others = [other for other in dict.fromkeys([block["against"], changes.get("of")]) if other not in (None, name)]
        if missing := [other for other in others if other not in of_name]:
            raise ValueError(f"{name}: nothing to compare with, there is no cell of {missing[0]}")
        common = {"model": cell["model"], "bits": cell["bits"], "row": name, "changes": told(changes)}
        common |= took | footprint_of(cell)
        for other in others or [""]:
            found = {row["metric"]: row for row in paired_rows(cell, of_name[other])} if other else {}
            for own in cell["rows"]:
                pair = found.get(own["metric"], {"difference": math.nan, "low": math.nan, "high": math.nan})
                against = [of_name[other]] if other else []
                rows.append(
                    common
                    | {key: own[key] for key in ("metric", "value", "low", "high", "n", "note")}
                    | {"versus": other, "difference": pair["difference"], "better": pair.get("better", "")}
                    | {"difference_low": pair["low"], "difference_high": pair["high"]}
                    | provenance_of(own["metric"], cell, *against)
                )
    return pd.DataFrame(rows, columns=COLUMNS)


def told(changes: dict) -> str:
    """What a row changes, as "key=value; key=value"; the method it is of comes first."""
    order = sorted(changes, key=lambda key: key not in ("of", "method"))
    values = {key: v if isinstance(v := changes[key], str) else json.dumps(v) for key in order}
    return "; ".join(f"{key}={value}" for key, value in values.items())


def ablations_table(frame: pd.DataFrame, against: str) -> Table:
    """For people: values and differences to `against`, each ± half of a 95 % interval, and what making the row took."""
    labels = {name: METRICS[name].label for name in (*SHOWN, "is", "fid") if name in set(frame["metric"])}
    heads = ["row", "changes"]
    for name, label in labels.items():
        heads += [label] + ([f"minus that of {against}"] if name in SHOWN else [])
    rows = []
    for name, of_row in frame[frame["versus"].isin(["", against])].groupby("row", sort=False):
        of_metric, took = of_row.set_index("metric"), of_row.iloc[0]
        cells = [name, took["changes"] or NONE]
        for metric in labels:
            if metric not in of_metric.index:
                cells += [MISSING] * (2 if metric in SHOWN else 1)
                continue
            row = of_metric.loc[metric]
            cells.append(interval(row["value"], row["low"], row["high"]))
            if metric in SHOWN:
                cells.append(difference(row))
        took = [number(took["seconds"], ".0f"), number(took["peak_memory"], ".0f"), number(took["realizable"], ".0%")]
        rows.append([*cells, *took])
    model, bits, n, seeds = (frame[column].iloc[0] for column in ("model", "bits", "n", "seeds"))
    footer = (
        f"{model} at {bits.upper()}, n = {n}, seeds {seeds}. ± is half of a 95 % interval, of a difference paired on "
        f"the same seeds; better and worse where it excludes 0. The rows are {len(set(frame['row'])) - 1} comparisons "
        "with one cell: about one in twenty of those without any effect excludes 0 by chance. Seconds, MB: of the "
        "quantize job, without the weights it starts from. On integers: share of the multiply-accumulates that a "
        "kernel on integers computes."
    )
    return Table(columns(*heads, "seconds", "MB", "on integers", texts=2), rows, notes=[footer])


def difference(row) -> Cell:
    """A difference with its interval, and the verdict where it has one."""
    if not row["versus"]:
        return MISSING
    cell, found = interval(row["difference"], row["difference_low"], row["difference_high"]), row["better"]
    word = {"better": " better", "worse": " worse", "neither": ""}.get(outcome(found, row["row"]))
    return Cell(found if word is None else cell.text + word, row["difference"])
