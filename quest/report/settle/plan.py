"""Which cells the next look needs, and which of them fit into the hours that are left. Needs no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from quest.report.settle import FP, FP_BITS, LOOKS, SEEDS
from quest.report.settle.cells import Evidence
from quest.report.settle.verdicts import ALL, chosen, couple_of


class Next(NamedTuple):
    """wanted: "model/row@seed/bits" of the cells to make. left_out: pairs that do not fit into the hours left."""

    wanted: list[str]
    left_out: list[str]
    seconds: float  # estimated, of one process


def next_look(
    evidence: Sequence[Evidence],
    verdicts: pd.DataFrame,
    families: dict[str, dict],
    identities: dict[tuple, str],
    look: int,
    seconds_left: float | None,
) -> Next:
    """The cells that look number `look` (from 0) needs.

    A pair needs them on a model while one of its comparisons there is open, or where it has none yet: both cells of
    each seed that have no instruction sets in common. (Snakemake does not make those again that were made in this
    folder.) Pairs that need the fewest further seeds come first. seconds_left: None for no limit.
    """
    if look >= len(LOOKS):
        return Next([], [], 0.0)
    cells = chosen(evidence, identities)
    wanted: dict[str, float] = {}
    order = _in_order(verdicts, families, identities)
    for model in dict.fromkeys(model for model, _, _ in order):  # full precision stands beside every difference
        if not cells.get((model, FP_BITS, FP)):
            wanted[f"{model}/{FP}/{FP_BITS}"] = 0.0
    left_out, total = [], 0.0
    for model, bits, pair in order:
        new = {}
        for seed in SEEDS[: LOOKS[look]]:
            rows = [(model, FP_BITS if name == FP else bits, name) for name in pair]
            first, second = (cells.get(row, {}) for row in rows)
            if couple_of(first, second, seed, pair[1]) is not None:
                continue
            for row, name in zip(rows, pair, strict=True):
                path = f"{model}/{name}/{FP_BITS}" if name == FP else f"{model}/{name}@{seed}/{bits}"
                if path not in wanted:
                    new[path] = _seconds(evidence, row)
        spend = sum(new.values())
        if new and seconds_left is not None and total + spend > seconds_left:
            left_out.append(f"{model} {bits}: {pair[0]} against {pair[1]}")
            continue
        wanted |= new
        total += spend
    return Next(list(wanted), left_out, total)


def _in_order(verdicts: pd.DataFrame, families, identities):
    """(model, bits, pair) with an open comparison, those that need the fewest seeds first."""
    places = dict.fromkeys((model, bits) for model, bits, row in identities if row != FP)
    order = []
    for model, bits in places:
        pairs = [tuple(pair) for family in families.values() if bits in family["bits"] for pair in family["pairs"]]
        for pair in dict.fromkeys(pairs):
            rows = verdicts[(verdicts["model"] == model) & (verdicts["bits"] == bits)]
            rows = rows[(rows["method"] == pair[0]) & (rows["versus"] == pair[1])]
            open_rows = rows[rows["verdict"] == "open"]
            if len(rows) and not len(open_rows):
                continue
            needed = open_rows["needed"].fillna(math.inf).min() if len(open_rows) else 0
            order.append((needed, (model, bits, pair)))
    return [place for _, place in sorted(order, key=lambda one: one[0])]  # a stable sort


def _seconds(evidence: Sequence[Evidence], row: tuple) -> float:
    """What a cell of this row took so far, on average; of another row of the model where it never ran; else 0."""
    model, _, method = row
    of_model = [cell for cell in evidence if cell.model == model and cell.about.get("seconds")]
    same = [cell.about["seconds"] for cell in of_model if cell.method == method]
    return float(np.mean(same or [cell.about["seconds"] for cell in of_model] or [0.0]))


def lines(verdicts: pd.DataFrame, following: Next, look: int) -> list[str]:
    """What a reader of the log wants to know."""
    single = verdicts[verdicts["model"] != ALL]
    counts = single["verdict"].value_counts()
    found = [", ".join(f"{name} {count}" for name, count in counts.items()) or "no comparison yet"]
    for row in single[single["verdict"] == "open"].itertuples():
        more = row.needed - row.seeds
        what = row.note if math.isnan(more) else f"{more:.0f} more seeds at the present mean and spread"
        found.append(f"open: {row.model} {row.bits} {row.endpoint}, {row.method} against {row.versus}: {what}")
    found += [f"out of budget: {line}" for line in following.left_out]
    if look < len(LOOKS):
        hours = f", about {following.seconds / 3600:.1f} hours of one process" if following.seconds else ""
        found.append(f"look at {LOOKS[look]} seeds: {len(following.wanted)} cells to make{hours}")
    return found
