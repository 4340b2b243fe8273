"""Tables of ablations: each row changes one setting of a recipe and is compared with that recipe on the same seeds.

The differences are paired as in paired.csv: both cells start from the same noise and are resampled together.
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
from quest.report.cells import read_cells
from quest.report.rendering import MISSING, NONE, Cell, Table, columns, interval, number
from quest.report.tables import PROVENANCE, SHOWN, footprint_of, paired_rows, provenance_of

COLUMNS = ["model", "bits", "row", "changes", "metric", "value", "low", "high", "n"]
COLUMNS += ["versus", "difference", "difference_low", "difference_high", "better"]
COLUMNS += ["seconds", "seconds_before", "peak_memory", "iterations", "size_mb", "realizable", "note"]
COLUMNS += PROVENANCE


def write(paths: Sequence[str | Path], block: dict, csv: str | Path, text: str | Path) -> pd.DataFrame:
    """Write the csv and the Markdown table of the metrics.json files `paths`, and return the frame of the csv.

    The checkpoint of each cell is the file model.safetensors in the same folder. block: `ablations` of the config.
    """
    cells = read_cells(paths)
    efforts = [effort(Path(path).with_name("model.safetensors")) for path in paths]
    frame = ablations_frame(cells, efforts, block)
    rendering.write(csv, frame, form="csv")
    rendering.write(text, ablations_table(frame, block["against"]), form="md")
    return frame


def ablations_frame(cells: Sequence[dict], efforts: Sequence[dict], block: dict) -> pd.DataFrame:
    """Return one row for each cell, metric and `versus`, with columns COLUMNS, in the order of the cells.

    versus is block["against"] and the method named by `of` in the row's changes; it is empty for block["against"]
    itself. efforts: see `quest.quantization.header.effort`. better: see `Comparison.better`. Raises ValueError if a
    cell to compare with is missing.
    """
    of_name = {cell["method"]: cell for cell in cells}
    rows = []
    for cell, cost in zip(cells, efforts, strict=True):
        name = cell["method"]
        changes = block["rows"].get(name, {})
        others = [other for other in dict.fromkeys([block["against"], changes.get("of")]) if other not in (None, name)]
        if missing := [other for other in others if other not in of_name]:
            raise ValueError(f"{name}: nothing to compare with, there is no cell of {missing[0]}")
        common = {"model": cell["model"], "bits": cell["bits"], "row": name, "changes": in_words(changes)}
        common |= cost | footprint_of(cell)
        for other in others or [""]:
            pairs = {row["metric"]: row for row in paired_rows(cell, of_name[other])} if other else {}
            for row in cell["rows"]:
                pair = pairs.get(row["metric"], {"difference": math.nan, "low": math.nan, "high": math.nan})
                against = [of_name[other]] if other else []
                rows.append(
                    common
                    | {key: row[key] for key in ("metric", "value", "low", "high", "n", "note")}
                    | {"versus": other, "difference": pair["difference"], "better": pair.get("better", "")}
                    | {"difference_low": pair["low"], "difference_high": pair["high"]}
                    | provenance_of(row["metric"], cell, *against)
                )
    return pd.DataFrame(rows, columns=COLUMNS)


def in_words(changes: dict) -> str:
    """Return what a row changes as "key=value; key=value", `of` and `method` first."""
    order = sorted(changes, key=lambda key: key not in ("of", "method"))
    values = {key: v if isinstance(v := changes[key], str) else json.dumps(v) for key in order}
    return "; ".join(f"{key}={value}" for key, value in values.items())


def ablations_table(frame: pd.DataFrame, against: str) -> Table:
    """Return the table for readers: values and differences to `against` with 95 % intervals, and the cost of each row.

    frame: that of `ablations_frame`.
    """
    labels = {name: METRICS[name].label for name in (*SHOWN, "is", "fid") if name in set(frame["metric"])}
    heads = ["row", "changes"]
    for name, label in labels.items():
        heads += [label] + ([f"minus that of {against}"] if name in SHOWN else [])
    rows = []
    for name, of_row in frame[frame["versus"].isin(["", against])].groupby("row", sort=False):
        of_metric, cost = of_row.set_index("metric"), of_row.iloc[0]
        cells = [name, cost["changes"] or NONE]
        for metric in labels:
            if metric not in of_metric.index:
                cells += [MISSING] * (2 if metric in SHOWN else 1)
                continue
            row = of_metric.loc[metric]
            cells.append(interval(row["value"], row["low"], row["high"]))
            if metric in SHOWN:
                cells.append(difference(row))
        cells += [number(cost[column], ".0f") for column in ("seconds", "peak_memory")]
        rows.append([*cells, number(cost["realizable"], ".0%")])
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
    """Return the difference of a row with its interval and its verdict, or who diverged."""
    if not row["versus"]:
        return MISSING
    cell = interval(row["difference"], row["difference_low"], row["difference_high"])
    word = {"better": " better", "worse": " worse", "neither": ""}.get(outcome(row["better"], row["row"]))
    return Cell(row["better"] if word is None else cell.text + word, row["difference"])
