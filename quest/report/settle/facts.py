"""Claims that are not about a pair of methods, answered from records and from tables of runs. Needs no torch.

A fact is (word, lines): the word of docs/claims.md ("holds", "refuted", "mixed" or "open"), which only records decide,
and the lines that say why. Lines in italics come from tables of a run with one seed, and decide nothing.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report import rankings
from quest.report.settle import FP
from quest.report.settle.cells import Evidence
from quest.report.settle.verdicts import ALL, of_first_look

Fact = tuple[str, list[str]]
Tables = Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]  # name: main.csv and paired.csv of a run
SHOWN = ("log_latent_mse", "psnr")  # of the distances that docs/claims.md shows
TO_REAL = ("kid_64w", "fd_64w", "fid", "sfid", "is", "precision", "agreement", "retrieval", "clip")


def of(evidence: Sequence[Evidence], settled: pd.DataFrame, runs: Tables, layers: pd.DataFrame) -> dict[str, Fact]:
    """All facts by the name that `Claim.measured` has. layers: rows of workflow.scripts.layer_errors."""
    main, seeds = means(evidence), _layers(evidence, layers)
    return {
        "distances": distances(main, runs),
        "layer errors": layer_errors(main, seeds),
        "beyond": beyond(settled, runs),
    }


def means(evidence: Sequence[Evidence]) -> pd.DataFrame:
    """The records of methods with the seeds of the first look as main.csv: the mean over seeds of each endpoint."""
    rows = []
    for (model, bits, method), cells in of_first_look(evidence):
        for endpoint in {name: None for cell in cells for name in cell.endpoints}:
            values = [cell.value(endpoint) for cell in cells if endpoint in cell.endpoints]
            rows.append((model, method, bits, endpoint, sum(values) / len(values)))
    return pd.DataFrame(rows, columns=["model", "method", "bits", "metric", "value"]).astype({"value": float})


def _layers(evidence: Sequence[Evidence], layers: pd.DataFrame) -> pd.DataFrame:
    """The layer errors of the records' checkpoints, columns model, method, bits, median."""
    medians = dict(zip(layers["checkpoint"], layers["median"], strict=True))
    rows = [
        (cell.model, cell.method, cell.bits, medians[cell.about["checkpoint"]])
        for cell in evidence
        if cell.about.get("checkpoint") in medians
    ]
    return pd.DataFrame(rows, columns=["model", "method", "bits", "median"])


def distances(main: pd.DataFrame, runs: Tables) -> Fact:
    """Do distances to full precision at the same seed rank methods as endpoints do?"""
    found = rankings.frame(main)
    found = found[found["measure"].isin(SHOWN)]
    lines = [f"{_correlation(row)}, means over seeds" for row in found.itertuples()]
    if not lines:
        for name, (table, paired) in runs.items():
            one = rankings.frame(table, paired)
            one = one[one["measure"].isin(SHOWN)]
            widest = one.groupby(["bits", "measure", "endpoint"])["cells"].transform("max")  # of all models, if pooled
            one = one[one["cells"] == widest]
            lines += [f"*{_correlation(row)} ({name})*" for row in one.itertuples()]
    lines += ["[figure](assets/rankings.png), [every measure, endpoint and model](assets/rankings.csv)"] if runs else []
    return _word(found), lines


def layer_errors(main: pd.DataFrame, layers: pd.DataFrame) -> Fact:
    """Does the median error of the layers say which model is broken? It takes cells on both sides to say so."""
    broken = rankings.breakage(main, layers)
    if broken.empty:
        return "open", []
    counted = rankings.counts(broken)
    lines = [f"median layer error {zone}: {bad} of {bad + good} rows broken" for zone, (bad, good) in counted.items()]
    found = rankings.frame(main, None, layers)
    found = found[found["measure"] == rankings.LAYER_ERROR]
    lines += [f"{_correlation(row)}, means over seeds" for row in found.itertuples()]
    below, above = (counted[zone] for zone in (f"below {rankings.FINE_BELOW}", f"above {rankings.BROKEN_ABOVE}"))
    if below[0] or above[1]:
        return "refuted", lines
    return ("holds" if sum(below) and sum(above) else "open"), lines


def beyond(settled: pd.DataFrame, runs: Tables) -> Fact:
    """How often does a quantized model seem better than full precision?

    Always open: that it is better is a flag, and that some models are not does not say that none can be.
    """
    rows = settled[(settled["versus"] == FP) & (settled["verdict"] != "open") & (settled["model"] != ALL)]
    flags = int((rows["verdict"] == "better").sum())
    lines = [f"{flags} of {len(rows)} settled comparisons with full precision seem better than it"] if len(rows) else []
    for name, (_, paired) in runs.items():
        chosen_rows = paired[(paired["versus"] == FP) & paired["metric"].isin(TO_REAL)]
        said = [outcome(row.better, row.method) for row in chosen_rows.itertuples()]
        flagged = chosen_rows[[one in ("better", "flag") for one in said]]
        where = ", ".join(f"{METRICS[m].label} {count}" for m, count in flagged["metric"].value_counts().items())
        lines.append(
            f"*{len(flagged)} of {len(chosen_rows)} comparisons of one checkpoint with full precision exclude 0 on the "
            f"better side{f' ({where})' if where else ''} ({name})*"
        )
    return "open", lines


def _word(found: pd.DataFrame) -> str:
    if found.empty:
        return "open"
    if (found["low"] > 0).all():
        return "holds"
    return "refuted" if (found["high"] < 0).any() else "open"


def _correlation(row) -> str:
    names = f"{row.model}, {row.bits.upper()}: {rankings.LABELS[row.measure]} and {rankings.LABELS[row.endpoint]}"
    pairs = ""
    if row.agree == row.agree:  # a table without intervals of pairs has none
        pairs = f"; of {row.agree + row.disagree:.0f} pairs that both tell apart, {row.agree:.0f} alike"
    return f"{names} have rank correlation {row.rho:.2f} [{row.low:.2f}, {row.high:.2f}] over {row.cells} cells{pairs}"
