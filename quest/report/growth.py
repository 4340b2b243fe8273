"""How processor time and memory of jobs grow with images, rows, parameters, iterations and cells. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from scipy.special import fdtri

from quest.report import rendering
from quest.report.rendering import NONE, Column, Table, columns
from quest.report.style import log_axis, log_ticks, look, plain, save, subplots

# One line per measured job. seconds: of the processor, without imports. memory_mb: most anonymous memory beyond that of
# the start. others: the average number of processors that other processes kept busy meanwhile.
COLUMNS = ["axis", "job", "size", "seconds", "memory_mb", "others", "versions", "commit", "machine", "date"]
AXES = {
    "images": "images",
    "rows": "calibration rows",
    "parameters": "parameters of the denoiser",
    "iterations": "iterations of each unit or stage",
    "cells": "cells of all quantization seeds",
}
EXPONENTS = np.linspace(0, 3, 301)
LINEAR = 1.1  # an exponent that is surely no larger counts as linear


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The exponent p of seconds = a + b size^p with its 95 % interval (low, high); a and b are not negative.

    a is what a job costs at any size, so p is the slope of the rest in a log-log plot. By least squares of relative
    errors; the interval has all p whose sum of squares an F test does not refuse. Where the size explains too little,
    it spans all of EXPONENTS. Raises ValueError for fewer than four measurements.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if len(x) < 4:
        raise ValueError(f"an exponent needs four measurements, got {len(x)}")
    ones, share = np.ones(len(y)), x / x.max()
    squares = np.array([nnls(np.stack([1 / y, share**p / y], 1), ones)[1] ** 2 for p in EXPONENTS])
    allowed = squares.min() * (1 + fdtri(1, len(x) - 3, 0.95) / (len(x) - 3)) + 1e-12
    inside = EXPONENTS[squares <= allowed]
    return float(EXPONENTS[squares.argmin()]), float(inside.min()), float(inside.max())


def table(frame: pd.DataFrame) -> Table:
    """A row per job: medians at its smallest and largest size, and the exponent of its processor time."""
    heads = [*columns("grows with", "job", texts=2), Column("sizes"), Column("processor s"), Column("exponent")]
    heads += [Column("memory MB"), Column("faster than linearly?", "text")]
    rows = []
    for (axis, job), of_job in frame.groupby(["axis", "job"], sort=False):
        medians = of_job.groupby("size")[["seconds", "memory_mb"]].median()
        first, last = medians.iloc[0], medians.iloc[-1]
        ends = [f"{first[name]:.3g} to {last[name]:.3g}" for name in ("seconds", "memory_mb")]
        value, low, high = exponent(of_job["size"], of_job["seconds"])
        known = high - low < EXPONENTS[-1] / 2
        said = f"{value:.2f} [{low:.2f}, {high:.2f}]" if known else NONE
        faster = "yes" if known and low > 1 else "no" if known and high <= LINEAR else "not told"
        sizes = f"{medians.index[0]:.4g} to {medians.index[-1]:.4g}"
        rows.append([AXES[axis], job, sizes, ends[0], said, ends[1], faster])
    note = (
        "Medians at the smallest and the largest size. exponent: p of seconds = a + b size^p, with its 95 % interval; "
        f"{NONE}: these measurements leave it open. no: surely at most {LINEAR}. Memory: anonymous, beyond the imports."
    )
    return Table(heads, rows, notes=[note])


def figure(frame: pd.DataFrame, path: str | Path) -> None:
    """Draw processor seconds (above) and memory (below) of every job against its size, a column for each axis."""
    axes = [axis for axis in AXES if axis in set(frame["axis"])]
    drawing, panels = subplots(2, len(axes), (1 + 2.4 * len(axes), 5.4))
    for column, axis in enumerate(axes):
        of_axis = frame[frame["axis"] == axis]
        for upper, name in ((True, "seconds"), (False, "memory_mb")):
            panel = panels[0 if upper else 1, column]
            for place, (job, of_job) in enumerate(of_axis.groupby("job", sort=False)):
                medians = of_job.groupby("size")[name].median()
                panel.plot(of_job["size"], of_job[name], ls="none", ms=4, label=job, **look(place))
                panel.plot(medians.index, medians, lw=1, color=look(place)["color"])
            panel.set_xscale("log")
            log_ticks(panel.xaxis, (1, 3))
            if upper:
                log_axis(panel, of_axis[name])
                panel.legend(fontsize=7, frameon=False)
            else:
                panel.set_ylim(0, 1.1 * of_axis[name].max() + 1)
                panel.set_xlabel(AXES[axis], fontsize=8)
            plain(panel)
    panels[0, 0].set_ylabel("processor time [s]", fontsize=9)
    panels[1, 0].set_ylabel("memory beyond imports [MB]", fontsize=9)
    save(drawing, path)


def write(frame: pd.DataFrame, folder: Path) -> None:
    """Write growth.csv, and growth.md and growth.png of the jobs that were measured four times or more."""
    rendering.write(folder / "growth.csv", frame)
    counts = frame.groupby(["axis", "job"])["size"].transform("count")
    whole = frame[counts >= 4]
    if len(whole):
        rendering.write(folder / "growth.md", table(whole))
        figure(whole, folder / "growth.png")


def read(path: Path) -> pd.DataFrame:
    """Rows that were measured before; none where there is no file. Raises ValueError for other columns than COLUMNS."""
    return rendering.read_csv(path, COLUMNS) if path.is_file() else pd.DataFrame(columns=COLUMNS)
