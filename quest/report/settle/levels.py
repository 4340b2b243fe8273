"""What each row of the records reaches by itself, against the bits that it stores. Needs no torch.

Differences are judged in `verdicts`, where equal images cancel. Here a reader sees where the rows stand.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS
from quest.report import style
from quest.report.rendering import Table, columns, interval, number
from quest.report.settle import FP
from quest.report.settle.cells import Evidence
from quest.report.settle.looks import ALPHA, Estimate
from quest.report.settle.lottery import error_over_images
from quest.report.settle.verdicts import MARGINS, of_first_look

# The table at equal granularity: rows by what is done to the layers before they are rounded, columns by what shares a
# scale of an activation. A cell is the row NAME-COLUMN of workflow/config/settle.yaml.
BEFORE_ROUNDING = {
    "mse": "nothing but ranges of least error",
    "smooth": "smoothing",
    "hadamard": "rotation of 16 channels",
    "gptq": "GPTQ",
    "lowrank": "low-rank branch",
    "adaround": "AdaRound",
    "quest": "AdaRound and QuEST's finetuning",
}
GRANULARITIES = {
    "tensor": "tensor, static",
    "step": "tensor and step, static",
    "sample": "sample",
    "token": "token",
    "group-16": "16 channels of a token",
}
ELSEWHERE = {"quest-tensor": "quest-groups-1", "quest-step": "quest-suite"}  # rows with another name
COLUMNS = ["model", "bits", "method", "endpoint", "value", "low", "high", "seeds", "effective_bits", "realizable"]


def frame(evidence: Sequence[Evidence]) -> pd.DataFrame:
    """Return a row for each model, bits, method and endpoint with the seeds of the first look, columns COLUMNS.

    value: mean over seeds, with a 95 % interval over seeds (Student's t) and images, added in squares; full precision
    has one over images alone. effective_bits: stored bits per parameter, scales and branches included. realizable: the
    share of the products that the integer kernel computed when the row was last sampled, by newer code maybe.
    """
    footprints = {
        (cell.model, cell.bits, cell.method): cell.about["footprint"]
        for cell in sorted(evidence, key=lambda cell: cell.about.get("date", ""))
        if "footprint" in cell.about
    }
    rows = []
    for endpoint in MARGINS:  # older records may lack one that later records of the row have
        for (model, bits, method), cells in of_first_look([cell for cell in evidence if endpoint in cell.endpoints]):
            if any(cell.diverged for cell in cells):
                continue
            footprint = footprints.get((model, bits, method), {})
            stored = [footprint.get(name, math.nan) for name in ("effective_bits", "realizable")]
            values = [cell.value(endpoint) for cell in cells]
            images = math.sqrt(np.mean([error_over_images(cell, endpoint) ** 2 for cell in cells]))
            half = 1.96 * images if method == FP else Estimate.of(values, images).half(ALPHA)
            value = float(np.mean(values))
            rows.append([model, bits, method, endpoint, value, value - half, value + half, len(cells), *stored])
    rows.sort(key=lambda row: row[:3])
    # A record has null where its cell has no such number, as full precision's products.
    return pd.DataFrame(rows, columns=COLUMNS).astype({"effective_bits": float, "realizable": float})


def tables(found: pd.DataFrame) -> list[Table]:
    """A table for each model: a row per method, nearest to full precision's latents first."""
    made = []
    for model, of_model in found.groupby("model", sort=False):
        endpoints = [name for name in MARGINS if name in set(of_model["endpoint"])]
        heads = columns("method", "bits", texts=2) + columns("seeds", "stored bits", "on integers")
        heads += columns(*(METRICS[name].label for name in endpoints))
        rows = []
        for (method, bits), of_row in of_model.groupby(["method", "bits"], sort=False):
            first, at = next(of_row.itertuples()), {row.endpoint: row for row in of_row.itertuples()}
            seeds = "-".join(map(str, sorted(set(of_row["seeds"])))) if method != FP else number(math.nan)
            told = [seeds, number(first.effective_bits, ".3g")]
            told.append(number(first.realizable, ".0%"))
            shown = [interval(at[e].value, at[e].low, at[e].high) if e in at else number(math.nan) for e in endpoints]
            nearness = at["log_latent_mse"].value if "log_latent_mse" in at else -math.inf
            rows.append((nearness, [method, bits.upper(), *told, *shown]))
        made.append(Table(heads, [row for _, row in sorted(rows, key=lambda one: one[0])], title=str(model)))
    return made


def _matched(found: pd.DataFrame, endpoint: str) -> Iterator[tuple[str, list[str], dict[str, list]]]:
    """Yield a model with more than two granularities at W4A4, these, and the row of each by what was done before."""
    chosen = found[(found["endpoint"] == endpoint) & (found["bits"] == "w4a4")]
    for model, of_model in chosen.groupby("model", sort=False):
        at = {row.method: row for row in of_model.itertuples()}
        cells = {b: {g: at.get(ELSEWHERE.get(f"{b}-{g}", f"{b}-{g}")) for g in GRANULARITIES} for b in BEFORE_ROUNDING}
        shown = [g for g in GRANULARITIES if sum(of[g] is not None for of in cells.values()) > 1]
        if len(shown) > 2:
            yield str(model), shown, {before: [of[g] for g in shown] for before, of in cells.items()}


def by_granularity(found: pd.DataFrame, endpoint: str) -> list[Table]:
    """A table for each model at W4A4 with more than two granularities: an endpoint by what was done and granularity."""
    made = []
    for model, shown, cells in _matched(found, endpoint):
        heads = columns("before rounding", texts=1) + columns(*(GRANULARITIES[g] for g in shown))
        rows = [
            [BEFORE_ROUNDING[before], *(interval(c.value, c.low, c.high) if c else number(math.nan) for c in of)]
            for before, of in cells.items()
        ]
        made.append(Table(heads, rows, title=f"{model}: {METRICS[endpoint].label}"))
    return made


def _point(axes, at: float, row, **look) -> None:
    """Draw one row of `frame`, hollow where not all of its products ran on integers."""
    fill = {} if row.realizable == 1 else {"mfc": "white"}
    style.error_bars(axes, [at], pd.DataFrame([row._asdict()]), ms=6, **fill, **look)


def granularity_figure(found: pd.DataFrame, endpoint: str, path: str | Path) -> None:
    """Draw `by_granularity` as a panel for each of its models, a line for each row; hollow: not all on integers.

    The dotted line is W4A8 with nearest codes and one static scale (`mse-tensor`).
    """
    models = list(_matched(found, endpoint))
    drawing, panels = style.subplots(1, max(1, len(models)), (7 * max(1, len(models)), 4.4))
    for axes, (model, shown, cells) in zip(panels[0], models, strict=False):
        for place, (before, of) in enumerate(cells.items()):
            there = {i + 0.06 * (place - len(cells) / 2): cell for i, cell in enumerate(of) if cell}
            look = style.look(place)
            axes.plot([*there], [cell.value for cell in there.values()], color=look["color"], lw=1, alpha=0.6)
            axes.plot([], [], **look, ls="none", label=BEFORE_ROUNDING[before])
            for x, cell in there.items():
                _point(axes, x, cell, **look)
        nearest = (found["model"] == model) & (found["endpoint"] == endpoint) & (found["method"] == "mse-tensor")
        for row in found[nearest & (found["bits"] == "w4a8")].itertuples():
            axes.axhline(row.value, color=style.INK, ls=":", lw=1)
            axes.text(0, row.value, "W4A8: nearest codes, one static scale", va="bottom", fontsize=8, color=style.INK)
        style.plain(axes)
        axes.set_xticks(range(len(shown)), [GRANULARITIES[g] for g in shown])
        axes.set_xlabel("what shares a scale of an activation")
        axes.set_ylabel(METRICS[endpoint].label)
        seeds = sorted({cell.seeds for of in cells.values() for cell in of if cell})
        axes.set_title(f"{model}, W4A4, means and 95 % intervals over {'-'.join(map(str, seeds))} seeds", fontsize=10)
    style.legend(drawing, panels[0], columns=3)
    style.save(drawing, path)


def figure(found: pd.DataFrame, endpoint: str, path: str | Path) -> None:
    """Draw an endpoint of every row, named with its stored bits, a panel per model; hollow: not all on integers."""
    found = found[(found["endpoint"] == endpoint) & (found["method"] != FP)]
    models = list(dict.fromkeys(found["model"]))
    most = max((len(rows) for _, rows in found.groupby("model")), default=1)
    drawing, panels = style.subplots(1, max(1, len(models)), (5.6 * max(1, len(models)), 1 + 0.24 * most))
    for axes, model in zip(panels[0], models, strict=False):
        of_model = found[found["model"] == model].sort_values("value", ascending=False)
        for place, row in enumerate(of_model.itertuples()):
            _point(axes, place, row, horizontal=True, **style.look(0))
        bits = [f"{row.method} {row.bits.upper()} ({row.effective_bits:.2f} bits)" for row in of_model.itertuples()]
        style.plain(axes)
        axes.set_yticks(range(len(bits)), bits)
        axes.set_ylim(len(bits) - most - 0.5, len(bits) - 0.5)  # rows of equal height in all panels, the best on top
        axes.set_title(model)
        axes.set_xlabel(METRICS[endpoint].label)
    style.save(drawing, path)
