"""Does the lead of a method grow with outliers? No torch.

A model has cells with the dial at 1, 4 and 16, as NAME, NAME-x4 and NAME-x16 (`quest.diffusion.outliers`). The same
images are sampled at each setting, from the same noise, and full precision gives the same ones. So the lead at two
settings is compared image by image: all cells resample the same images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS, compare, intervals
from quest.metrics.comparison import Comparison
from quest.report import rendering
from quest.report.cells import read_cells
from quest.report.rendering import NONE, Column, Table, columns, interval
from quest.report.verdicts import HEADLINE

COLUMNS = ["model", "factor", "bits", "metric", "method", "versus", "lead", "low", "high", "better", "n"]
COLUMNS += ["growth", "growth_low", "growth_high", "grows"]


def write(paths: Sequence[str | Path], folder: Path) -> None:
    """Write outliers.csv and outliers.md of metrics.json files; the last method is compared with all others."""
    found = frame(read_cells(paths))
    rendering.write(folder / "outliers.csv", found)
    rendering.write(folder / "outliers.md", table(found))


def frame(cells: Sequence[dict]) -> pd.DataFrame:
    """Return a row for each model, factor, bits, metric and rival of the last method, columns COLUMNS.

    lead: the last method minus the rival at this factor. growth: this lead minus that at factor 1; grows: "grows" or
    "shrinks" where its interval excludes 0, else "neither"; both empty at factor 1. Raises ValueError where a model has
    no cell at factor 1.
    """
    quantized = [cell for cell in cells if cell["method"] != "fp"]
    focus = quantized[-1]["method"] if quantized else ""
    by_key = {(*split(cell["model"]), cell["bits"], cell["method"]): cell for cell in quantized}
    rows = []
    for (model, factor, bits, versus), rival in by_key.items():
        if versus == focus or (model, factor, bits, focus) not in by_key:
            continue
        at_one = [by_key.get((model, 1, bits, method)) for method in (focus, versus)]
        if None in at_one:
            raise ValueError(f"{model} {bits}: no cell of {focus} and {versus} without outliers to compare with")
        ours = by_key[model, factor, bits, focus]
        leads, before = compare(ours, rival), compare(*at_one)
        names = {"model": model, "factor": factor, "bits": bits, "method": focus, "versus": versus}
        for metric in (name for name in HEADLINE if name in leads):
            lead = leads[metric]
            told = {"lead": lead.estimate, "low": lead.low, "high": lead.high, "n": lead.n}
            told |= {"metric": metric, "better": lead.better(focus, versus)}
            rows.append(
                names | told | (_growth(metric, lead, before[metric], (ours, rival), at_one) if factor > 1 else {})
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def split(model: str) -> tuple[str, int]:
    """("photos-class", 4) of "photos-class-x4"; the factor of other names is 1."""
    base, _, factor = model.rpartition("-x")
    return (base, int(factor)) if base and factor.isdecimal() else (model, 1)


def _growth(metric: str, lead: Comparison, before: Comparison, now: Sequence[dict], then: Sequence[dict]) -> dict:
    drawn = [np.subtract(*(np.array(cell["resampled"][metric]) for cell in pair)) for pair in (now, then)]
    value = lead.estimate - before.estimate
    low, high = intervals.interval(value, drawn[0] - drawn[1], lead.n if METRICS[metric].is_mean else None)
    found = Comparison(value, float(low), float(high), lead.n, METRICS[metric].better)
    diverged = any(lead.diverged) or any(before.diverged)
    words = {"better": "grows", "worse": "shrinks"}
    said = "diverged" if diverged else words.get(found.verdict, "neither")
    return {"growth": value, "growth_low": found.low, "growth_high": found.high, "grows": said}


def table(found: pd.DataFrame) -> Table:
    """The leads for readers."""
    heads = columns("model", "outliers", "bits", "metric", "method", "versus", texts=6)
    rows = []
    for row in found.itertuples():
        names = [row.model, f"x{row.factor}", row.bits, METRICS[row.metric].label, row.method, row.versus]
        growth = NONE if row.factor == 1 else interval(row.growth, row.growth_low, row.growth_high)
        rows.append(
            [*names, interval(row.lead, row.low, row.high), row.better, growth, row.grows if row.factor > 1 else NONE]
        )
    note = (
        "lead: method minus versus; growth: that minus the lead without outliers. ± is half of a paired 95 % interval "
        "over images. The lead grows where the difference excludes 0 in favour of the method. One calibration draw and "
        "one quantization seed: these are statements on checkpoints."
    )
    heads = [*heads, Column("lead"), Column("better", "text"), Column("growth"), Column("the lead", "text")]
    return Table(heads, rows, notes=[note])
