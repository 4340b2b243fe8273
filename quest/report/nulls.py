"""Null controls: the distances of full precision to itself, and the floors below which no difference is a verdict.

A null control samples full precision in another way (`quest.diffusion.nulls`). What it then has in a paired metric, as
an error, or how far another metric moves on the same images, would be zero on paper. Needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from quest.diffusion.nulls import KINDS
from quest.metrics import METRICS
from quest.metrics.floors import linear
from quest.report import rendering
from quest.report.cells import NULLS, read_cells
from quest.report.rendering import MISSING, Column, Table, columns, number
from quest.report.tables import provenance_of


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write nulls.csv and nulls.md into `folder`; the cells `paths` have methods such as "fp-bf16"."""
    found = frame(read_cells(paths))
    rendering.write(Path(folder, "nulls.csv"), found)
    rendering.write(Path(folder, "nulls.md"), *tables(found))


def frame(cells: Sequence[dict]) -> pd.DataFrame:
    """Return a row for each model, null control and metric, columns NULLS of `quest.report.cells`.

    apart: the value of a paired metric as an error (`quest.metrics.floors.linear`); otherwise how far the value is from
    that of full precision on the same images. isa: instruction sets of the core and of torch.
    """
    rows = []
    for cell in cells:
        exact = cell["full_precision"]
        names = {"model": cell["model"], "null": cell["method"].removeprefix("fp-")}
        core = next((one["core"] for one in cell["sampled"] if one.get("core")), {})
        isa = " ".join(str(core[name]) for name in ("isa", "torch") if core.get(name))
        for row in cell["rows"]:
            name, value = row["metric"], row["value"]
            apart = linear(name, value) if METRICS[name].paired else abs(value - exact[name])
            told = {"metric": name, "value": value, "full_precision": exact.get(name), "apart": apart}
            rows.append(names | told | {"n": row["n"], "isa": isa} | provenance_of(name, cell))
    return pd.DataFrame(rows, columns=list(NULLS))


def tables(found: pd.DataFrame) -> list[Table]:
    """Return a table for each model: null controls, their values in paired metrics and their changes in the others."""
    made = []
    for model, of_model in found.groupby("model", sort=False):
        names = [name for name in METRICS if name in set(of_model["metric"])]
        heads = [METRICS[name].label if METRICS[name].paired else f"change of {METRICS[name].label}" for name in names]
        rows = []
        for null, of_null in of_model.groupby("null", sort=False):
            shown = {row.metric: number(_shown(row), ".2g") for row in of_null.itertuples()}
            rows.append([KINDS[null], *(shown.get(name, MISSING) for name in names)])
        note = (
            f"n = {of_model['n'].max()}, seeds {of_model['seeds'].iloc[0]}. Full precision against itself. The largest "
            "error of the rows is the floor of a metric; decibels and logarithms are turned back into errors for that. "
            "Where two methods differ by less, neither is called better."
        )
        made.append(Table([*columns("full precision in", texts=1), *map(Column, heads)], rows, model, [note]))
    return made


def _shown(row) -> float:
    return row.value if METRICS[row.metric].paired else row.value - row.full_precision
