"""The style that all figures share: colours, markers, error bars, axes, legend and file format. Needs no display."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from quest.runtime.files import atomic

# Okabe and Ito's palette, which readers with any colour vision can distinguish; markers repeat the distinction. Full
# precision is black.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
GLYPHS = "●■◆▲▼✚✖"  # the markers as characters, for a line of text
DPI = 150
INK = "#333333"
RULE = "#dddddd"


def subplots(rows: int, columns: int, size: tuple[float, float], **sharing) -> tuple[Figure, np.ndarray]:
    """Return a figure of this size in inches and its axes [rows, columns]; `sharing` are arguments such as sharey."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def look(place: int) -> dict[str, str]:
    """Return the colour and the marker of the method with this number."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def error_bars(axes: Axes, at, points: pd.DataFrame, *, horizontal: bool = False, floor: bool = False, **style) -> None:
    """Draw the column `value` of `points` with its interval, the columns `low` and `high`, at the positions `at`.

    horizontal: values are on the x axis. floor: an interval ends at a tenth of the value, so that a logarithmic axis
    can show one that reaches below zero.
    """
    low = points["low"].clip(lower=points["value"] / 10) if floor else points["low"]
    error = [points["value"] - low, points["high"] - points["value"]]
    style = {"ms": 4, "lw": 0, "ls": "none", "elinewidth": 1.3, "capsize": 2} | style
    if horizontal:
        axes.errorbar(points["value"], at, xerr=error, **style)
    else:
        axes.errorbar(at, points["value"], yerr=error, **style)


def log_axis(axes: Axes, values: pd.Series) -> None:
    """Make the y axis logarithmic, with ticks that suit the positive ones of these values."""
    values = values[np.isfinite(values) & (values > 0)]
    decades = np.log10(values.max() / values.min()) if len(values) else 0
    axes.set_yscale("log")
    log_ticks(axes.yaxis, (1, 2, 5) if decades < 2.5 else (1,))


def log_ticks(axis: Axis, digits: Sequence[int]) -> None:
    """Put ticks at these digits of every decade and label them with plain numbers."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plain(axes: Axes) -> None:
    """Remove the frame above and on the right, and draw thin horizontal lines and small labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)


def legend(figure: Figure, panels: Iterable[Axes], columns: int = 6) -> None:
    """Draw one legend above all panels, with every label that occurs in one of them."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    style = dict(loc="outside upper center", ncols=min(len(handles), columns), fontsize=8, frameon=False)
    figure.legend(handles.values(), handles, **style)


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure; the suffix of the path chooses the format."""
    with atomic(path) as file:
        figure.savefig(file, dpi=DPI, facecolor="white")
