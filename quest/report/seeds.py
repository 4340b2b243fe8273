"""Compare methods that were quantized with several seeds, to separate a method from one draw of its calibration set.

A quantization seed chooses the calibration trajectories, the rows taken from them and the mini-batches; the evaluation
seeds of the images stay the same. A mean over quantization seeds therefore varies in two ways: over images, which a
joint bootstrap of all seeds measures, and over seeds, whose small number needs Student's factor. An interval contains
both. With half widths of 3 over images and 4 over seeds, for example, its half width is sqrt(3^2 + 4^2) = 5.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from quest.metrics import METRICS, compare
from quest.metrics.comparison import Comparison, has_diverged
from quest.metrics.floors import FULL_PRECISION, both_beyond, doubted
from quest.metrics.intervals import half_width
from quest.report import rendering
from quest.report.cells import read_cells
from quest.report.rendering import NONE, Column, Table, columns, interval, number
from quest.report.tables import SHOWN, provenance_of

COLUMNS = ["model", "bits", "metric", "method", "versus", "value", "low", "high", "over_images", "over_seeds"]
COLUMNS += ["seeds", "better", "n", "evaluation", "versions", "commit", "machine"]


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write seeds.csv and seeds.md into `folder`; the cells `paths` have methods such as "rtn" and "rtn@1"."""
    frame = seeds_frame(read_cells(paths))
    rendering.write(Path(folder, "seeds.csv"), frame)
    rendering.write(Path(folder, "seeds.md"), seeds_table(frame))


def seeds_frame(cells: list[dict]) -> pd.DataFrame:
    """Return a row for each model, bits, metric and method, and for each pair of methods, columns COLUMNS.

    value: the mean over seeds; for a pair (`versus` is not empty), the mean of the differences seed by seed.
    over_images, over_seeds: half widths of the two 95 % intervals, which low and high combine. better: see
    `Comparison.better`. A cell of full precision has no row: no method that is beyond it is better than another that
    is. Raises ValueError if methods have different seeds or only one, if the draw of a cell is not its seed,
    or if cells differ in images.
    """
    full = {cell["model"]: cell for cell in cells if cell["method"] == FULL_PRECISION}
    groups: dict[tuple, dict[str, dict[int, dict]]] = {}
    for cell in (cell for cell in cells if cell["method"] != FULL_PRECISION):
        method, _, seed = cell["method"].partition("@")
        if "." in seed:
            valid = f"{method}@{seed.rpartition('.')[2]}"
            raise ValueError(f"{cell['method']}: its draw is not its seed; valid: cells such as {valid}")
        groups.setdefault((cell["model"], cell["bits"]), {}).setdefault(method, {})[int(seed or 0)] = cell
    rows = []
    for (model, bits), methods in groups.items():
        seeds = sorted(next(iter(methods.values())))
        for method, of_method in methods.items():
            if sorted(of_method) != seeds or len(seeds) < 2:
                raise ValueError(f"{model} {bits}: {method} has seeds {sorted(of_method)}; at least two, here {seeds}")
        pairs = [(b, a) for a, b in itertools.combinations(methods, 2)]  # the later method minus the earlier one
        for method, versus in [(method, "") for method in methods] + pairs:
            ours = [methods[method][seed] for seed in seeds]
            theirs = [methods[versus][seed] for seed in seeds] if versus else []
            try:
                of_metrics = _rows(ours, theirs, method, versus, full.get(model))
            except ValueError as error:
                raise ValueError(f"{model} {bits}: {method}{versus and f' against {versus}'}: {error}") from error
            for row in of_metrics:
                names = {"model": model, "bits": bits, "method": method, "versus": versus}
                origin = provenance_of(row["metric"], *ours, *theirs)
                evaluation = origin["seeds"].removeprefix("evaluation ")
                rows.append(names | row | origin | {"seeds": ",".join(map(str, seeds)), "evaluation": evaluation})
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(ours: list[dict], theirs: list[dict], method: str, versus: str, full: dict | None) -> list[dict]:
    """Return the mean over seeds and its half widths for each metric; of differences, if there are cells `theirs`."""
    for a, b in zip(ours, theirs, strict=False):
        compare(a, b)  # raises ValueError if the two differ in images
    for other in [*ours[1:], *([full] if full else [])]:
        compare(other, ours[0])
    exact = {row["metric"]: row["value"] for row in full["rows"]} if full else {}
    rows, diverged = [], tuple(any(map(has_diverged, cells)) for cells in (ours, theirs))
    for name, metric in METRICS.items():
        if not all(name in cell["resampled"] for cell in (*ours, *theirs)):
            continue
        values, resampled, n = _of(ours, name)
        means = (float(values.mean()), 0.0)
        if theirs:
            values_b, resampled_b, _ = _of(theirs, name)
            means = (float(values.mean()), float(values_b.mean()))
            values, resampled = values - values_b, resampled - resampled_b
        images = half_width(resampled.mean(0), n if metric.is_mean else None)
        seeds = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values))
        value, half = float(values.mean()), math.hypot(images, seeds)
        comparison = Comparison(value, value - half, value + half, n, metric.better, diverged)
        if theirs:
            comparison = doubted(comparison, name, means, (ours[0], theirs[0]))
            comparison = both_beyond(comparison, means, exact.get(name, math.nan))
        rows.append(
            {"metric": name, "value": value, "low": comparison.low, "high": comparison.high, "n": n}
            | {"over_images": float(images), "over_seeds": float(seeds)}
            | {"better": comparison.better(method, versus) if versus else ""}
        )
    return rows


def _of(cells, name):
    """Return values [seeds], resampled values [seeds, R] and n of one metric."""
    rows = [next(row for row in cell["rows"] if row["metric"] == name) for cell in cells]
    values = np.array([row["value"] for row in rows])
    return values, np.array([cell["resampled"][name] for cell in cells]), rows[0]["n"]


def seeds_table(frame: pd.DataFrame) -> Table:
    """Return the table for readers: means over seeds and differences of methods, with their intervals."""
    seeds, n, evaluation = frame["seeds"].iloc[0], frame["n"].max(), frame["evaluation"].iloc[0]
    heads = columns("model", "bits", "metric", "method", "versus", "mean", "over images", "over seeds", texts=5)
    rows = []
    for row in frame[frame["metric"].isin(SHOWN)].itertuples():
        names = [row.model, row.bits, METRICS[row.metric].label, row.method, row.versus or NONE]
        spreads = [number(row.over_images, ".2g"), number(row.over_seeds, ".2g")]
        rows.append([*names, interval(row.value, row.low, row.high), *spreads, row.better])
    footer = (
        f"Quantization seeds {seeds} (calibration trajectories, rows and mini-batches); n = {n}, evaluation seeds "
        f"{evaluation}. ± is half of a 95 % interval that holds both spreads; those alone stand beside it. With a "
        "method under versus: the difference, method minus versus, seed by seed."
    )
    return Table([*heads, Column("better", "text")], rows, notes=[footer])
