"""The quantization lottery: how far each source of chance moves an endpoint of one quantized model. Needs no torch.

Sources are the images, the calibration draw, the quantization seed and the processor. Each is estimated from cells that
differ in nothing else; draw and seed together from cells that differ in both, as seeds of a row do.
"""

import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from quest.report.settle.cells import Evidence, standard_error
from quest.report.settle.verdicts import MARGINS

COLUMNS = ["source", "model", "bits", "method", "endpoint", "deviation", "noise_gap", "cells", "from"]
SOURCES = ("images", "calibration draw", "quantization seed", "draw and seed", "processor")
FIELDS = ("seed", "draw", "isa")  # of a cell, in which cells of one recipe and the same images can differ


def frame(evidence: Sequence[Evidence], before: dict[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Return a row for each source, model, bits, method and endpoint that can be estimated, columns COLUMNS.

    deviation: standard deviation of the value of one cell that this source causes. noise_gap: 1.96 sqrt(2) of them; two
    cells of equal methods are further apart in one case of twenty. cells: their number. before: tables over seeds
    (seeds.csv) by name, which are not of this protocol; their intervals are turned back into deviations.
    """
    found = list(_images(evidence))
    # Which fields differ within a group; all others are equal.
    for source, differs in (("calibration draw", {"draw"}), ("quantization seed", {"seed"}), ("processor", {"isa"})):
        found += _grouped(evidence, source, differs)
    found += _grouped([cell for cell in evidence if cell.draw == cell.seed], "draw and seed", {"draw", "seed"})
    for name, seeds in (before or {}).items():
        found += _of_table(seeds, name)
    rows = [row | {"noise_gap": 1.96 * math.sqrt(2) * row["deviation"]} for row in found]
    return pd.DataFrame(rows, columns=COLUMNS)


def _images(evidence: Sequence[Evidence]) -> Iterable[dict]:
    cells: dict[tuple, list[Evidence]] = {}
    for cell in evidence:
        cells.setdefault(cell.key, []).append(cell)
    for group in cells.values():
        for endpoint in (name for name in group[0].endpoints if name in MARGINS):
            errors = [error_over_images(cell, endpoint) for cell in group if endpoint in cell.endpoints]
            yield _row("images", group, endpoint, math.sqrt(np.mean(np.square(errors))))


def error_over_images(cell: Evidence, endpoint: str) -> float:
    """The standard error over images of a cell's endpoint."""
    if endpoint in cell.sets:
        return float(np.std(cell.sets[endpoint][1], ddof=1))
    return standard_error(cell.values[endpoint])


def _grouped(evidence: Sequence[Evidence], source: str, differs: set[str]) -> Iterable[dict]:
    """Deviations within groups of cells that are equal in all but the fields `differs`, and differ in each of these."""
    groups: dict[tuple, list[Evidence]] = {}
    for cell in evidence:
        equal = [getattr(cell, name) for name in FIELDS if name not in differs]
        groups.setdefault((cell.model, cell.bits, _recipes(cell), cell.images, *equal), []).append(cell)
    rows: dict[tuple, list[tuple[float, list[Evidence]]]] = {}
    for group in groups.values():
        varied = {tuple(getattr(cell, name) for name in FIELDS if name in differs): cell for cell in group}
        if len(varied) < 2:
            continue
        cells = list(varied.values())
        for endpoint in (name for name in cells[0].endpoints if name in MARGINS):
            if all(endpoint in cell.endpoints for cell in cells):
                variance = float(np.var([cell.value(endpoint) for cell in cells], ddof=1))
                key = cells[0].model, cells[0].bits, _recipes(cells[0]), endpoint
                rows.setdefault(key, []).append((variance, cells))
    for (*_, endpoint), parts in rows.items():
        weights = [len(cells) - 1 for _, cells in parts]
        deviation = math.sqrt(np.average([variance for variance, _ in parts], weights=weights))
        yield _row(source, [cell for _, cells in parts for cell in cells], endpoint, deviation)


def _recipes(cell: Evidence) -> str:
    """The recipes of a cell as text, without their seed, which is a field of its own."""
    chain = cell.about.get("recipes", [])
    return json.dumps([[name, {k: v for k, v in recipe.items() if k != "seed"}, bits] for name, recipe, bits in chain])


def _row(source: str, cells: list[Evidence], endpoint: str, deviation: float) -> dict:
    names = {"source": source, "model": cells[0].model, "bits": cells[0].bits, "method": cells[0].method}
    return names | {"endpoint": endpoint, "deviation": deviation, "cells": len(cells), "from": "settled"}


def _of_table(seeds: pd.DataFrame, name: str) -> Iterable[dict]:
    for row in seeds[seeds["versus"].fillna("") == ""].itertuples():
        if row.metric not in MARGINS:
            continue
        count = len(str(row.seeds).split(","))
        told = {"model": row.model, "bits": row.bits, "method": row.method, "endpoint": row.metric, "from": name}
        yield {"source": "images", "deviation": row.over_images / 1.96, "cells": count} | told
        seed = row.over_seeds * math.sqrt(count) / stdtrit(count - 1, 0.975)
        yield {"source": "draw and seed", "deviation": seed, "cells": count} | told


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """For each endpoint, bits and source: the median and the largest deviation of a cell over models and methods.

    Full precision is left out. A source that no cells can tell has no row.
    """
    rows = []
    for (bits, endpoint), of_endpoint in found[found["method"] != "fp"].groupby(["bits", "endpoint"], sort=False):
        for source in SOURCES:
            one = of_endpoint[of_endpoint["source"] == source]
            if len(one):
                told = {"bits": bits, "endpoint": endpoint, "source": source, "rows": len(one)}
                told |= {"median": one["deviation"].median(), "largest": one["deviation"].max()}
                rows.append(
                    told | {"noise_gap": one["noise_gap"].median(), "models": ", ".join(dict.fromkeys(one["model"]))}
                )
    return pd.DataFrame(
        rows, columns=["bits", "endpoint", "source", "median", "largest", "noise_gap", "rows", "models"]
    )
