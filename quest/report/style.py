"""How every figure looks: colours, markers, axes, legend, and how it is written. Needs no display."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from quest.runtime.files import atomic

# Okabe and Ito's palette, told apart with any colour vision; shapes say it a second time. Full precision is black.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
GLYPHS = "●■◆▲▼✚✖"  # the same in a line of text
DPI = 150
INK = "#333333"
RULE = "#dddddd"


def log_axis(axes: Axes, values: pd.Series) -> None:
    """A logarithmic y axis with labels that suit these values, of which those above zero count."""
    values = values[np.isfinite(values) & (values > 0)]
    decades = np.log10(values.max() / values.min()) if len(values) else 0
    axes.set_yscale("log")
    log_ticks(axes.yaxis, (1, 2, 5) if decades < 2.5 else (1,))


def log_ticks(axis: Axis, digits: Sequence[int]) -> None:
    """Ticks at these digits of every decade, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def plain(axes: Axes) -> None:
    """No frame above and right, thin horizontal lines, small labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)


def legend(figure: Figure, panels: Iterable[Axes], columns: int = 6) -> None:
    """One legend above all panels, with what any of them shows."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found, loc="outside upper center", ncols=min(len(found), columns), fontsize=8, frameon=False
    )


def save(figure: Figure, path: str | Path) -> None:
    with atomic(path) as file:
        figure.savefig(file, dpi=DPI, facecolor="white")
