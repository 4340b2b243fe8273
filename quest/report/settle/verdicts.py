"""Judge pairs of methods by the records in results/settled, as PROTOCOL.md says. Needs no torch.

A comparison is a pair of methods on one model (or on all of them), bits and endpoint. Each seed gives one difference,
of two cells on the same images and the same instruction sets. `looks.settle` decides at which number of seeds it stops.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS
from quest.metrics.floors import apart
from quest.report import rendering
from quest.report.rendering import NONE, Column, Table, columns, interval, number
from quest.report.settle import FP, FP_BITS, LOOKS, SEEDS
from quest.report.settle.cells import Evidence, standard_error
from quest.report.settle.looks import Estimate, Settled, settle

ALL = "mean of all models"
# Endpoints that are judged, and the smallest difference that matters (PROTOCOL.md gives the reasons).
MARGINS = {"agreement": 0.02, "retrieval": 0.02, "kid_64w": 0.02, "fid": 10.0, "log_latent_mse": 0.05, "psnr": 0.5}
COLUMNS = ["family", "model", "bits", "endpoint", "method", "versus", "verdict", "value", "low", "high", "level"]
COLUMNS += ["seeds", "over_images", "over_seeds", "n", "margin", "full_precision", "needed", "isa", "images", "note"]


def frame(
    evidence: Sequence[Evidence],
    families: dict[str, dict],
    identities: dict | None = None,
    floors: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """Return a row for each comparison, columns COLUMNS. Pairs without records are left out.

    families: {name: {"bits": [...], "pairs": [[method, versus], ...]}}; each errs in 5 % at most, on each model, bits
    and endpoint. identities: {(model, bits, method): identity} of the recipes in question; by default that with the
    most seeds. floors: {model: {endpoint: error}}, of `cells.floors`; two methods that are nearer to each other in an
    endpoint than full precision is to itself stay "open" there, unless they are equivalent.

    value: method minus versus, the mean over `seeds` seeds, with the interval [low, high] that errs with probability
    `level` in this look. over_images, over_seeds: its standard error over images, and the deviation of a single seed.
    verdict: "better", "worse", "equivalent", "open", or "diverged" for the method (or "rival diverged"). needed: how
    many seeds would settle an open comparison if nothing moved; NaN where more than 100 would be needed.
    full_precision: the value of full precision itself.
    """
    cells = chosen(evidence, identities or {})
    models: dict[str, list[str]] = {}
    for model, bits in dict.fromkeys((model, bits) for model, bits, method in cells if method != FP):
        models.setdefault(bits, []).append(model)
    rows = []
    for (name, family), bits, (endpoint, margin) in itertools.product(families.items(), models, MARGINS.items()):
        if bits not in family["bits"]:
            continue
        by_pair = {
            tuple(pair): {
                model: one for model in models[bits] if (one := Pair.of(cells, model, bits, pair, endpoint)) is not None
            }
            for pair in family["pairs"]
        }
        places = {model: {pair: of[model] for pair, of in by_pair.items() if model in of} for model in models[bits]}
        places[ALL] = {pair: Pair.pooled(list(of.values())) for pair, of in by_pair.items() if len(of) > 1}
        for model, of_model in places.items():
            floor = (floors or {}).get(model, {}).get(endpoint, 0.0)
            rows += [{"family": name} | row for row in _judged(of_model, margin, floor)]
    return pd.DataFrame(rows, columns=COLUMNS)


def chosen(evidence: Sequence[Evidence], identities: dict) -> dict[tuple, dict[tuple, Evidence]]:
    """{(model, bits, method): {(seed, isa): cell}}, of one identity; a seed has the calibration draw of its number.

    Where identities do not say which, it is the images that most records of the model have, and then the identity with
    the most seeds.
    """
    counts: dict[str, Counter] = {}
    for cell in evidence:
        counts.setdefault(cell.model, Counter())[cell.images] += 1
    rows: dict[tuple, dict[str, dict]] = {}
    for cell in (cell for cell in evidence if cell.draw == cell.seed):
        row = (cell.model, cell.bits, cell.method)
        if row in identities or cell.images == max(counts[cell.model], key=lambda i: (counts[cell.model][i], i)):
            rows.setdefault(row, {}).setdefault(cell.identity, {})[cell.seed, cell.isa] = cell
    return {
        row: of_row.get(identities[row], {}) if row in identities else max(of_row.values(), key=len)
        for row, of_row in rows.items()
    }


def of_first_look(evidence: Sequence[Evidence]) -> Iterator[tuple[tuple, list[Evidence]]]:
    """(model, bits, method) with its cells, of full precision and of the methods with the seeds of the first look.

    A seed has one cell: where it ran on several instruction sets, that which was recorded first.
    """
    for row, cells in chosen(evidence, {}).items():
        of_seed = {cell.seed: cell for cell in sorted(cells.values(), key=_recorded, reverse=True)}
        if row[2] == FP or len(of_seed) >= LOOKS[0]:
            yield row, [of_seed[seed] for seed in sorted(of_seed)]


class Pair:
    """Two methods on one model, bits and endpoint: a difference for each seed, and what is told beside it."""

    def __init__(self, names: dict, values: np.ndarray, images, n: int, broken: tuple[bool, bool], told: dict):
        """values [seeds, 2]: of both methods. images(k): standard error over images of the mean of k seeds."""
        self.names, self.values, self.images, self.n = names, values, images, n
        self.differences = (values[:, 0] - values[:, 1]).tolist()
        self.broken, self.told = broken, told

    @classmethod
    def of(cls, cells, model: str, bits: str, pair: Sequence[str], endpoint: str) -> "Pair | None":
        """None where the two have no seed in common that has the endpoint: older records may lack one."""
        rows = [cells.get((model, FP_BITS if name == FP else bits, name), {}) for name in pair]
        first, second = ({at: cell for at, cell in row.items() if endpoint in cell.endpoints} for row in rows)
        # Up to the first seed that lacks one of the two.
        both = list(itertools.takewhile(bool, (couple_of(first, second, seed, pair[1]) for seed in SEEDS)))
        if not both:
            return None
        if len({cell.images for couple in both for cell in couple}) > 1:
            raise ValueError(f"{model} {bits} {pair[0]} and {pair[1]}: records of different images")
        names = {"model": model, "bits": bits, "endpoint": endpoint, "method": pair[0], "versus": pair[1]}
        exact = [
            cell.value(endpoint) for cell in cells.get((model, FP_BITS, FP), {}).values() if endpoint in cell.endpoints
        ]
        told = {"full_precision": float(np.mean(exact)) if exact else math.nan, "images": both[0][0].images}
        told["isa"] = ", ".join(sorted({one.isa for one, _ in both}))
        broken = tuple(any(couple[side].diverged for couple in both) for side in (0, 1))
        values = np.array([[cell.value(endpoint) for cell in couple] for couple in both])
        if endpoint in both[0][0].sets:
            drawn = np.array([a.sets[endpoint][1] - b.sets[endpoint][1] for a, b in both])
            return cls(names, values, lambda k: float(drawn[:k].mean(0).std(ddof=1)), 0, broken, told)
        paired = np.array([a.values[endpoint] - b.values[endpoint] for a, b in both])
        return cls(names, values, lambda k: standard_error(paired[:k].mean(0)), paired.shape[1], broken, told)

    @classmethod
    def pooled(cls, parts: Sequence["Pair"]) -> "Pair":
        """The mean over models, seed by seed. It is a statement about the mean of these models, not about others."""
        count = min(len(part.values) for part in parts)
        broken = tuple(any(part.broken[side] for part in parts) for side in (0, 1))
        told = {"full_precision": math.nan, "isa": ", ".join(dict.fromkeys(part.told["isa"] for part in parts))}
        told |= {"images": ", ".join(dict.fromkeys(part.told["images"] for part in parts))}
        return cls(
            parts[0].names | {"model": ALL},
            np.mean([part.values[:count] for part in parts], axis=0),
            lambda k: math.sqrt(sum(part.images(k) ** 2 for part in parts)) / len(parts),
            min(part.n for part in parts),
            broken,
            told,
        )

    def apart(self, count: int) -> float:
        """How far the two methods are from each other in the mean of `count` seeds, in the units of a floor."""
        return apart(self.names["endpoint"], *self.values[:count].mean(0).tolist())

    def estimates(self) -> list[Estimate]:
        """One for each look for which there are seeds."""
        counts = [count for count in LOOKS if count <= len(self.differences)]
        return [Estimate.of(self.differences[:k], self.images(k), self.n) for k in counts]


def couple_of(first: dict, second: dict, seed: int, versus: str) -> tuple[Evidence, Evidence] | None:
    """The two cells of a seed on equal instruction sets, of several the pair that was first complete.

    So cells that run later on another processor cannot change a verdict. first, second: by (seed, isa). Full precision
    has no seeds.
    """
    other = 0 if versus == FP else seed
    isas = {isa for of, isa in first if of == seed} & {isa for of, isa in second if of == other}
    couples = [(first[seed, isa], second[other, isa]) for isa in isas]
    return min(couples, key=lambda couple: max(map(_recorded, couple)), default=None)


def _recorded(cell: Evidence) -> tuple[str, str]:
    return cell.about.get("date", ""), cell.isa


def _judged(family: dict, margin: float, floor: float) -> list[dict]:
    """Rows of a family: all pairs on one model (or their mean), bits and endpoint."""
    sound = {pair: one.estimates() for pair, one in family.items() if not any(one.broken)}
    found = settle(sound, margin)
    return [_row(one, found.get(pair), margin, floor) for pair, one in family.items()]


def _row(pair: Pair, settled: Settled | None, margin: float, floor: float) -> dict:
    row = pair.names | {"margin": margin, "n": pair.n or math.nan, "needed": math.nan, "note": ""} | pair.told
    if settled is None:
        row |= dict.fromkeys(("value", "low", "high", "level", "over_images", "over_seeds"), math.nan)
        verdict = "open"
        if any(pair.broken):
            verdict = "diverged" if pair.broken[0] else "rival diverged"
        note = "" if any(pair.broken) else f"{len(pair.differences)} of the {LOOKS[0]} seeds of the first look"
        return row | {"seeds": len(pair.differences), "verdict": verdict, "note": note}
    estimate, direction = settled.estimate, METRICS[pair.names["endpoint"]].better
    half = estimate.half(settled.level)
    words = {"lower": "worse", "higher": "worse"} | {direction: "better"}
    row |= {"value": estimate.value, "low": estimate.value - half, "high": estimate.value + half}
    row |= {"level": settled.level, "over_images": estimate.images, "over_seeds": estimate.seeds}
    row |= {"seeds": settled.look, "verdict": words.get(settled.verdict, settled.verdict)}
    if settled.verdict == "open":
        needed = estimate.seeds_needed(margin, settled.level)
        row["needed"] = math.nan if needed is None else needed
        if needed is None:
            row["note"] = "more than 100 seeds, or more images"
        elif needed > LOOKS[-1]:
            row["note"] = f"{needed} seeds would do; the protocol ends at {LOOKS[-1]}"
    if row["verdict"] in ("better", "worse") and pair.apart(settled.look) < floor:
        row |= {"verdict": "open", "note": "below the floor: full precision is as far from itself"}
    if row["verdict"] == "better" and pair.names["versus"] == FP:
        row["note"] = "better than full precision: a flag, not a success"
    return row


def table(verdicts: pd.DataFrame) -> Table:
    """The verdicts for readers."""
    heads = columns(
        "family", "model", "bits", "endpoint", "method", "versus", "verdict", "seeds", "difference", texts=7
    )
    heads += columns("over images", "over seeds", "full precision")
    rows = []
    for row in verdicts.itertuples():
        names = [row.family, row.model, row.bits, METRICS[row.endpoint].label, row.method, row.versus]
        names += [row.verdict, str(row.seeds)]
        difference = NONE if math.isnan(row.value) else interval(row.value, row.low, row.high)
        spreads = [number(one, ".2g") for one in (row.over_images, row.over_seeds)]
        rows.append([*names, difference, *spreads, number(row.full_precision), row.note])
    note = (
        "± is half of the interval that errs with the level of this look, so that all looks and all pairs of a family "
        "together err in 5 %. over images: standard error; over seeds: deviation of one seed. Rules: PROTOCOL.md."
    )
    return Table([*heads, Column("note", "text")], rows, notes=[note])


def write(verdicts: pd.DataFrame, folder: Path) -> None:
    """Write settled.csv and settled.md."""
    rendering.write(folder / "settled.csv", verdicts)
    rendering.write(folder / "settled.md", table(verdicts))
