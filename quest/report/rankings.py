"""Do cheap measures rank methods as endpoints do? Over the cells of a run, or the records in results/settled. No torch.

Cheap measures are same-seed distances to full precision, errors of the noise prediction, and the median error of the
layers (`quest.properties.layer_errors`). Endpoints say what a set of images is worth: distances to real pictures, and
whether an image shows what was asked for. Both are ordered so that larger is worse, and compared by Spearman's rank
correlation.

Its interval is that of Bonett and Wright (Psychometrika 2000), by Fisher's z with standard error
sqrt((1 + rho^2 / 2) / (m - 3)) for m cells. It speaks of other methods like these, so with six methods it is wide.

Rows of all models pool models as if each had methods of its own. They have the same ones, so where methods behave alike
on all models the pooled interval is too narrow: simulated with six methods and three models, it held the truth in 85 of
100 cases.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report import rendering
from quest.report.rendering import NONE, Column, Table, columns, number
from quest.report.style import INK, log_axis, look, plain, save, subplots
from quest.report.style import legend as draw_legend
from quest.report.tables import by_bits

LAYER_ERROR = "layer_error"  # median over layers, no metric of a cell
LABELS = {name: metric.label for name, metric in METRICS.items()} | {LAYER_ERROR: "median layer error"}
MEASURES = ("log_latent_mse", "psnr", "lite0_distance", "fd_64w_to_fp", "fid_to_fp", "guided_eps_error", "eps_error")
MEASURES += (LAYER_ERROR,)
ENDPOINTS = ("kid_64w", "fid", "agreement", "retrieval")
ASKED = ("agreement", "retrieval")  # shares of images that show what was asked for
LEAST = 4  # methods that a rank correlation needs
BROKEN = 0.5  # a cell is broken if it shows what was asked for less than half as often as full precision
FINE_BELOW, BROKEN_ABOVE = 0.15, 0.21  # what JoaoZaokk/comfy-quant-bench says of median layer errors
ALL = "all models"
COLUMNS = ["model", "bits", "measure", "endpoint", "rho", "low", "high", "cells", "agree", "disagree"]


def frame(main: pd.DataFrame, paired: pd.DataFrame | None = None, layers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a row for each model, bits, measure and endpoint with LEAST methods or more, columns COLUMNS.

    main: columns model, method, bits, metric, value of finite values. paired: those of paired.csv; with it, agree and
    disagree count the pairs of methods that the measure and the endpoint both tell apart. layers: columns model,
    method, bits, median (`layer_errors`). Rows of model ALL pool the models of equal bits, each by m - 3.
    """
    values = table_of(main, layers)
    quantized = values[values.index.get_level_values("method") != "fp"]
    rows = []
    for (model, bits), cells in quantized.groupby(level=["model", "bits"], sort=False):
        for measure, endpoint in _couples(cells):
            both = cells[[measure, endpoint]].dropna()
            if len(both) < LEAST:
                continue
            if (both.nunique() == 1).any():  # such as that all images show what was asked for
                continue
            rho = both[measure].corr(both[endpoint], method="spearman") * _sign(measure) * _sign(endpoint)
            rho = round(float(rho), 12)  # 1 where both orders are the same
            low, high = interval(rho, len(both))
            agree, disagree = _pairs(paired, model, bits, measure, endpoint)
            names = {"model": model, "bits": bits, "measure": measure, "endpoint": endpoint}
            found = {"rho": rho, "low": low, "high": high, "cells": len(both)}
            rows.append(names | found | {"agree": agree, "disagree": disagree})
    return pd.DataFrame([*rows, *_pooled(rows)], columns=COLUMNS)


def table_of(main: pd.DataFrame, layers: pd.DataFrame | None) -> pd.DataFrame:
    """Values by cell (index model, bits, method) and metric (columns), with the layer error where there is one."""
    finite = main[np.isfinite(main["value"])]
    values = finite.pivot_table(index=["model", "bits", "method"], columns="metric", values="value", sort=False)
    if layers is not None and len(layers):
        values[LAYER_ERROR] = layers.groupby(["model", "bits", "method"])["median"].mean()
    return values


def _couples(cells: pd.DataFrame) -> Iterable[tuple[str, str]]:
    there = [name for name in cells if cells[name].notna().any()]
    return ((m, e) for e in ENDPOINTS if e in there for m in MEASURES if m in there)


def _sign(name: str) -> int:
    """1 where larger is worse."""
    return 1 if name == LAYER_ERROR or METRICS[name].better == "lower" else -1


def interval(rho: float, cells: int) -> tuple[float, float]:
    """The 95 % interval of a rank correlation of this many cells; NaN for fewer than LEAST.

    Fisher's z of 1 is infinite; in its place stands that of the next lower value, where two neighbours change places.
    """
    if cells < LEAST or math.isnan(rho):
        return math.nan, math.nan
    z, error = _fisher(rho, cells)
    return min(rho, math.tanh(z - 1.96 * error)), max(rho, math.tanh(z + 1.96 * error))


def _fisher(rho: float, cells: int) -> tuple[float, float]:
    most = 1 - 12 / (cells * (cells**2 - 1))
    rho = min(max(rho, -most), most)
    return math.atanh(rho), math.sqrt((1 + rho**2 / 2) / (cells - 3))


def _pooled(rows: Sequence[dict]) -> Iterable[dict]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bits"], row["measure"], row["endpoint"]), []).append(row)
    for (bits, measure, endpoint), of in groups.items():
        if len(of) < 2:
            continue
        parts = [_fisher(row["rho"], row["cells"]) for row in of]
        weights = [1 / error**2 for _, error in parts]
        z, error = float(np.average([z for z, _ in parts], weights=weights)), 1 / math.sqrt(sum(weights))
        found = {"rho": math.tanh(z), "low": math.tanh(z - 1.96 * error), "high": math.tanh(z + 1.96 * error)}
        found |= {name: sum(row[name] for row in of) for name in ("cells", "agree", "disagree")}
        yield {"model": ALL, "bits": bits, "measure": measure, "endpoint": endpoint} | found


def _pairs(paired: pd.DataFrame | None, model: str, bits: str, measure: str, endpoint: str) -> tuple[float, float]:
    """How often the two name the same better method, and how often not; NaN without the intervals of pairs."""
    if paired is None or measure == LAYER_ERROR:
        return math.nan, math.nan
    rows = paired[(paired["model"] == model) & (paired["bits"] == bits) & (paired["versus"] != "fp")]
    said = {}
    for row in rows[rows["metric"].isin((measure, endpoint))].itertuples():
        said.setdefault((row.method, row.versus), {})[row.metric] = outcome(row.better, row.method)
    both = [one for one in said.values() if {one.get(measure), one.get(endpoint)} <= {"better", "worse"}]
    agree = sum(one[measure] == one[endpoint] for one in both)
    return agree, len(both) - agree


def breakage(main: pd.DataFrame, layers: pd.DataFrame | None) -> pd.DataFrame:
    """Return a row {model, bits, method, layer_error, endpoint, share, broken} for each cell that shows what was asked.

    share: how often, as a share of how often full precision does. broken: whether it is below BROKEN.
    """
    values = table_of(main, layers)
    rows = []
    for (model, bits, method), cell in values.iterrows():
        endpoint = next((name for name in ASKED if name in values and not math.isnan(cell[name])), None)
        exact = (model, "w32a32", "fp")
        if method == "fp" or endpoint is None or exact not in values.index:
            continue
        if math.isnan(cell.get(LAYER_ERROR, math.nan)):
            continue
        share = cell[endpoint] / values.loc[exact, endpoint]
        names = {"model": model, "bits": bits, "method": method, LAYER_ERROR: cell[LAYER_ERROR], "endpoint": endpoint}
        rows.append(names | {"share": share, "broken": share < BROKEN})
    return pd.DataFrame(rows, columns=["model", "bits", "method", LAYER_ERROR, "endpoint", "share", "broken"])


def counts(cells: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """{zone of layer errors: (broken, not broken)} of the frame of `breakage`."""
    error, broken = cells[LAYER_ERROR], cells["broken"].astype(bool)
    zones = {f"below {FINE_BELOW}": error < FINE_BELOW, f"above {BROKEN_ABOVE}": error > BROKEN_ABOVE}
    zones["between"] = error.between(FINE_BELOW, BROKEN_ABOVE)
    return {name: (int((chosen & broken).sum()), int((chosen & ~broken).sum())) for name, chosen in zones.items()}


def table(found: pd.DataFrame, broken: pd.DataFrame) -> Table:
    """The correlations for readers, with what layer errors say of broken cells below."""
    heads = columns("model", "bits", "measure", "endpoint", texts=4) + columns("rank correlation", "cells")
    rows = []
    for row in found.itertuples():
        said = NONE if math.isnan(row.agree) else f"{row.agree:.0f} of {row.agree + row.disagree:.0f}"
        text = f"{row.rho:.2f} [{row.low:.2f}, {row.high:.2f}]"
        names = [row.model, row.bits, LABELS[row.measure], LABELS[row.endpoint]]
        rows.append([*names, rendering.Cell(text, row.rho), number(row.cells, "d"), said])
    notes = [
        "Spearman's rank correlation over the methods of one model and bits, 1 if both order them alike, with its 95 % "
        "interval for other methods like these. Pairs: those that both tell apart, and of which both name the same "
        "better method. Rows of all models pool models as if each had methods of its own; their intervals may be too "
        "narrow."
    ]
    if len(broken):
        parts = [f"{name}: {bad} of {bad + good} cells broken" for name, (bad, good) in counts(broken).items()]
        notes.append(
            f"Median layer error and breakage (what was asked is shown less than half as often as by full precision): "
            f"{'; '.join(parts)}."
        )
    return Table([*heads, Column("pairs alike")], rows, notes=notes)


def figure(main: pd.DataFrame, layers: pd.DataFrame | None, path: Path) -> None:
    """Draw endpoints against measures: a point for each cell, a colour for each model, larger points for fewer bits.

    Dotted lines show full precision. Raises ValueError where no model has an endpoint.
    """
    values = table_of(main, layers).dropna(axis="columns", how="all")
    rows = [name for name in ENDPOINTS if name in values]
    drawn = [name for name in ("log_latent_mse", "psnr", "eps_error", LAYER_ERROR) if name in values]
    if not rows or not drawn:
        raise ValueError("no cell has both an endpoint and a measure")
    models = list(dict.fromkeys(values.index.get_level_values("model")))
    widths = sorted({bits for _, bits, method in values.index if method != "fp"}, key=by_bits, reverse=True)
    size = (2.6 * len(drawn), 0.6 + 2.2 * len(rows))
    sheet, panels = subplots(len(rows), len(drawn), size, sharey="row", sharex="col")
    for endpoint, line in zip(rows, panels, strict=True):
        for measure, axes in zip(drawn, line, strict=True):
            for place, model in enumerate(models):
                of_model = values.loc[model]
                for size, bits in enumerate(widths):
                    if bits in of_model.index.get_level_values("bits"):
                        points = of_model.loc[bits]
                        style = look(place) | {"ls": "none", "ms": 6 - 1.5 * size, "alpha": 0.9}
                        axes.plot(points[measure], points[endpoint], label=f"{model} {bits.upper()}", **style)
                if ("w32a32", "fp") in of_model.index:
                    axes.axhline(of_model.loc[("w32a32", "fp"), endpoint], color=look(place)["color"], lw=0.8, ls=":")
            plain(axes)
            if measure in (LAYER_ERROR, "eps_error") and (values[measure].dropna() > 0).all():
                axes.set_xscale("log")
            if endpoint not in ASKED and (values[endpoint].dropna() > 0).all():  # a kernel distance may be negative
                log_axis(axes, values[endpoint])
        line[0].set_ylabel(LABELS[endpoint], fontsize=8, color=INK)
    for measure, axes in zip(drawn, panels[-1], strict=True):
        axes.set_xlabel(LABELS[measure], fontsize=8, color=INK)
    draw_legend(sheet, panels.flat, 4)
    save(sheet, path)


def write(main: pd.DataFrame, paired: pd.DataFrame | None, layers: pd.DataFrame | None, folder: Path) -> None:
    """Write tables/rankings.csv and .md, tables/breakage.csv and figures/rankings.png into the folder of a run."""
    found = frame(main, paired, layers)
    broken = breakage(main, layers)
    rendering.write(folder / "tables" / "rankings.csv", found)
    rendering.write(folder / "tables" / "rankings.md", table(found, broken))
    rendering.write(folder / "tables" / "breakage.csv", broken)
    figure(main, layers, folder / "figures" / "rankings.png")
