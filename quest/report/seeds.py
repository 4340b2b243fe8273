"""Does a method win, or one draw of its calibration set? Methods quantized with several seeds, side by side.

A quantization seed draws the calibration trajectories, the rows taken from them and the mini-batches; the images that
are compared keep their evaluation seeds. So a mean over quantization seeds has two spreads: over images, bootstrapped
jointly for all seeds, and over seeds, with Student's factor for their small number. An interval here holds both: its
half is the root of the sum of their squares.
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
from quest.report import rendering
from quest.report.rendering import NONE, Column, Table, columns, interval, number
from quest.report.tables import provenance_of, read

SHOWN = ("latent_mse", "fid_to_fp", "eps_error")  # in Markdown
COLUMNS = ["model", "bits", "metric", "method", "versus", "value", "low", "high", "over_images", "over_seeds"]
COLUMNS += ["seeds", "better", "n", "evaluation", "versions", "commit", "machine"]


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write seeds.csv and seeds.md of cells whose methods are named "quest", "quest@1", ... into `folder`."""
    frame = seeds_frame(read(paths))
    rendering.write(Path(folder, "seeds.csv"), frame)
    rendering.write(Path(folder, "seeds.md"), seeds_table(frame))


def seeds_frame(cells: list[dict]) -> pd.DataFrame:
    """One row for each model, bits, metric and method, and for each two methods (`versus`), columns COLUMNS.

    value: mean over seeds, of two methods that of their differences seed by seed. over_images, over_seeds: half widths
    of the two 95 % intervals that low and high hold together. better: see `Comparison.better`.
    Raises ValueError where a method lacks a seed that another has, or two cells are not of the same images.
    """
    groups: dict[tuple, dict[str, dict[int, dict]]] = {}
    for cell in cells:
        method, _, seed = cell["method"].partition("@")
        groups.setdefault((cell["model"], cell["bits"]), {}).setdefault(method, {})[int(seed or 0)] = cell
    rows = []
    for (model, bits), methods in groups.items():
        seeds = sorted(next(iter(methods.values())))
        for method, of_method in methods.items():
            if sorted(of_method) != seeds or len(seeds) < 2:
                raise ValueError(f"{model} {bits}: {method} has seeds {sorted(of_method)}; at least two, here {seeds}")
        pairs = [(b, a) for a, b in itertools.combinations(methods, 2)]  # the later one against the earlier
        for method, versus in [(method, "") for method in methods] + pairs:
            ours = [methods[method][seed] for seed in seeds]
            theirs = [methods[versus][seed] for seed in seeds] if versus else []
            for row in _rows(ours, theirs, method, versus):
                names = {"model": model, "bits": bits, "method": method, "versus": versus}
                made = provenance_of(row["metric"], *ours, *theirs)
                drawn = {"seeds": ",".join(map(str, seeds)), "evaluation": made["seeds"].removeprefix("evaluation ")}
                rows.append(names | row | made | drawn)
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(ours: list[dict], theirs: list[dict], method: str, versus: str) -> list[dict]:
    """Per metric the mean over seeds, of the differences to `theirs` if given, and its two half widths."""
    for a, b in zip(ours, theirs, strict=False):
        compare(a, b)  # raises where the two are not of the same images
    for other in ours[1:]:
        compare(other, ours[0])
    rows, diverged = [], tuple(any(map(has_diverged, cells)) for cells in (ours, theirs))
    for name, metric in METRICS.items():
        if not all(name in cell["resampled"] for cell in (*ours, *theirs)):
            continue
        values, resampled, n = _of(ours, name)
        if theirs:
            values_b, resampled_b, _ = _of(theirs, name)
            values, resampled = values - values_b, resampled - resampled_b
        factor = stdtrit(n - 1, 0.975) * math.sqrt(n / (n - 1)) if metric.is_mean else 1.96
        images = factor * np.std(resampled.mean(0), ddof=1)
        seeds = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(len(values))
        value, half = float(values.mean()), math.hypot(images, seeds)
        found = Comparison(value, value - half, value + half, n, metric.better, diverged)
        rows.append(
            {"metric": name, "value": value, "low": found.low, "high": found.high, "n": n}
            | {"over_images": float(images), "over_seeds": float(seeds)}
            | {"better": found.better(method, versus) if versus else ""}
        )
    return rows


def _of(cells, name):
    """Values [seeds], resampled values [seeds, R] and n of one metric."""
    found = [next(row for row in cell["rows"] if row["metric"] == name) for cell in cells]
    values = np.array([row["value"] for row in found])
    return values, np.array([cell["resampled"][name] for cell in cells]), found[0]["n"]


def seeds_table(frame: pd.DataFrame) -> Table:
    """Means over seeds and differences of methods, for people: value ± both spreads, and each alone."""
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
