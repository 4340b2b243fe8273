"""Tidy tables (csv) and tables for readers (Markdown, LaTeX), made of every cell's metrics.json. Needs no torch."""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS, OF_TRAJECTORIES, compare
from quest.metrics.floors import both_beyond
from quest.report import ledger
from quest.report.cells import read_cells
from quest.report.rendering import MISSING, Cell, Column, Table, columns, interval, number
from quest.report.rendering import write as write_table

# The metrics that need the fewest images to tell methods apart. Models of pictures have KID-64w, models of scenes FID.
SHOWN = ("log_latent_mse", "kid_64w", "fid_to_fp", "eps_error")
PROVENANCE = ["seeds", "versions", "commit", "machine"]
MAIN = ["model", "method", "bits", "metric", "value", "low", "high", "published", "n", "extractor", "protocol"]
# Size and work of the denoiser, as quest.quantization.cost defines them. size_mb: bytes of the packed file over 1e6.
# bops: bit operations of one call on one sample. effective_bits: stored bits per parameter. BESIDE: what the call costs
# beside products of codes (quest.quantization.overhead). latency_ms: median wall time of a denoiser call while the
# first shard was sampled, whatever else the machine did; latency_at: batch, threads.
BESIDE = ["scale_bits", "float_fmas", "float_additions", "weight_scale_bits", "static_scale_bits"]
BESIDE += ["branch_macs", "branch_bops"]
FOOTPRINT = ["size_mb", "bops", "effective_bits", *BESIDE, "kernel", "realizable", "latency_ms", "latency_at"]
MAIN += ["reference", "note", *FOOTPRINT, *PROVENANCE]
PAIRED = ["model", "bits", "metric", "method", "versus", "difference", "low", "high", "n", "better", *PROVENANCE]
EPS_ERROR = ["model", "method", "bits", "call", "timestep", "value", "low", "high", "n", *PROVENANCE]


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write main, ledger (.csv, .md, .tex), paired.csv and eps_error.csv of metrics.json files into `folder`.

    Models and methods keep the order of the files. If several commits or sets of packages produced the cells, stderr
    and the notes below the tables say so.
    """
    cells = read_cells(paths)
    folder, main, paired = Path(folder), main_frame(cells), paired_frame(cells)
    for line in mixture(main):
        print(line, file=sys.stderr)
    verdicts = ledger.ledger(cells, ledger.published())
    frames = {"main": main, "paired": paired, "eps_error": eps_error_frame(cells), "ledger": verdicts}
    for name, frame in frames.items():
        write_table(folder / f"{name}.csv", frame)
    for kind, below in (("md", [LEDGER_FOOTER]), ("tex", [])):
        write_table(folder / f"main.{kind}", *main_tables(main, paired))
        write_table(folder / f"ledger.{kind}", *ledger_tables(verdicts), *below)


def main_frame(cells: list[dict]) -> pd.DataFrame:
    """Return one row per cell and metric, columns MAIN; `published` is the paper's number, which ledger.csv judges."""
    numbers = ledger.beside(ledger.published())
    rows = [
        _name(cell)
        | row
        | {"published": numbers.get((cell["model"], cell["method"], cell["bits"], row["metric"]), math.nan)}
        | footprint_of(cell)
        | provenance_of(row["metric"], cell)
        for cell in cells
        for row in cell["rows"]
    ]
    return pd.DataFrame(rows, columns=MAIN)


def paired_frame(cells: list[dict]) -> pd.DataFrame:
    """Return the differences "method minus versus", columns PAIRED.

    They compare every two methods of the same model and bits, and every method with full precision (`bits` are those of
    the method). `better` is the entry of `Comparison.better`. Raises ValueError if two cells differ in images or
    protocol.
    """
    rows = []
    full_precision = {cell["model"]: cell for cell in cells if cell["method"] == "fp"}
    for model in dict.fromkeys(cell["model"] for cell in cells):
        quantized = [cell for cell in cells if cell["model"] == model and cell["method"] != "fp"]
        for bits in dict.fromkeys(cell["bits"] for cell in quantized):
            of_bits = [cell for cell in quantized if cell["bits"] == bits]
            # `method` is the later one in the configuration, `versus` the earlier one.
            pairs = [(b, a) for a, b in itertools.combinations(of_bits, 2)]
            pairs += [(cell, full_precision[model]) for cell in of_bits if model in full_precision]
            for a, b in pairs:
                names = {"model": model, "bits": bits, "method": a["method"], "versus": b["method"]}
                found = paired_rows(a, b, full_precision.get(model))
                rows += [names | row | provenance_of(row["metric"], a, b) for row in found]
    return pd.DataFrame(rows, columns=PAIRED)


def paired_rows(a: dict, b: dict, fp: dict | None = None) -> list[dict]:
    """Return the differences "a minus b", one row per metric; `better` is the entry of `Comparison.better`.

    fp: the full-precision cell. Where a and b are both better than it, neither counts as the better one. Raises
    ValueError, which names both cells, if they differ in images or protocol.
    """
    method, versus = a["method"], b["method"]
    try:
        compared = compare(a, b)
    except ValueError as error:
        raise ValueError(f"{a['model']} {a['bits']}: {method} against {versus}: {error}") from None
    values = [{row["metric"]: row["value"] for row in cell["rows"]} for cell in filter(None, (a, b, fp))]
    for metric in compared.keys() & values[2] if fp is not None else ():
        compared[metric] = both_beyond(compared[metric], (values[0][metric], values[1][metric]), values[2][metric])
    return [
        {"metric": metric} | one.columns | {"n": one.n, "better": one.better(method, versus)}
        for metric, one in compared.items()
    ]


def eps_error_frame(cells: list[dict]) -> pd.DataFrame:
    """Return the noise-prediction error of every denoiser call, columns EPS_ERROR."""
    rows = [_name(cell) | row | provenance_of("eps_error", cell) for cell in cells for row in cell["eps_error"]]
    return pd.DataFrame(rows, columns=EPS_ERROR)


def _name(cell):
    return {key: cell[key] for key in ("model", "method", "bits")}


def footprint_of(cell: dict) -> dict:
    """Return the columns FOOTPRINT of a cell; values that its samples do not state are NaN or empty."""
    unknown = dict.fromkeys(("bytes", "bops", "effective_bits", *BESIDE, "realizable", "latency_ms"), math.nan)
    footprint = unknown | {"kernel": "", "latency_at": ""} | cell["footprint"]
    if threads := footprint.get("threads"):
        footprint["latency_at"] = f"batch {footprint['batch']}, {threads} thread{'s' if threads > 1 else ''}"
    return {"size_mb": footprint["bytes"] / 1e6} | {name: footprint[name] for name in FOOTPRINT[1:]}


def provenance_of(metric: str, *cells: dict) -> dict[str, str]:
    """Return the columns PROVENANCE; different values of sampling, metrics and cells are joined by " / "."""
    records = [record for cell in cells for record in (*cell.get("sampled", []), cell["provenance"])]

    def joined(describe):
        return " / ".join(dict.fromkeys(filter(None, map(describe, records))))

    drawn = cells[0]["drawn"]
    images = f"0-{drawn['trajectories'] - 1}" if metric in OF_TRAJECTORIES else drawn["images"]
    return {
        "seeds": f"evaluation {images}",
        "versions": joined(lambda p: ", ".join(f"{name} {v}" for name, v in p.get("versions", {}).items() if v)),
        "commit": joined(lambda p: p.get("commit") and p["commit"] + ("-dirty" if p.get("dirty") else "")),
        "machine": joined(lambda p: ", ".join(f"{key} {v}" for key, v in p.get("machine", {}).items() if v)),
    }


def mixture(main: pd.DataFrame) -> list[str]:
    """Return a warning if several commits made the rows, and one if several sets of package versions did."""
    lines = []
    for column, label, width in (("commit", "commits", 12), ("versions", "sets of package versions", None)):
        values = dict.fromkeys(part or "unknown" for row in main[column] for part in row.split(" / "))
        if len(values) < 2:
            continue
        names = [value[:width] + ("-dirty" if value.endswith("-dirty") else "") for value in values] if width else []
        listed = f" ({', '.join(names)})" if names else ""
        lines.append(
            f"Made by {len(values)} {label}{listed}, which need not agree: column `{column}` of main.csv says which "
            "made a row; `snakemake --forceall` makes all of them again."
        )
    return lines


def main_tables(main: pd.DataFrame, paired: pd.DataFrame) -> list[Table]:
    """Return one table per model for readers: a row per method and bits, most bits first."""
    tables = []
    for model, of_model in main.groupby("model", sort=False):
        names = [name for name in METRICS if name in set(of_model["metric"])]
        heads = {name: column_label(name, of_model) for name in names}
        best = best_values(of_model, paired[paired["model"] == model])
        rows = []
        for (method, bits), cell in cells_of(of_model, lambda run: by_bits(run[1])):
            size, bops = cell[["size_mb", "bops"]].iloc[0]
            published = {row.metric: f"{row.published:g}" for row in cell[cell["published"].notna()].itertuples()}
            measured = metric_cells(cell, names, best, published)
            rows.append([method, bits, number(size), number(bops / 1e12, ".3g"), *measured])
        measured = [Column(heads[name], direction=METRICS[name].better) for name in names]
        heads_of_cell = columns("method", "bits", "size [MB]", "TBOPs", texts=2)
        tables.append(Table([*heads_of_cell, *measured], rows, model, footer(of_model, heads)))
    return tables


def cells_of(main: pd.DataFrame, key) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Return ((method, bits), rows) of every cell of one model, sorted by `key((method, bits))`."""
    return sorted(main.groupby(["method", "bits"], sort=False), key=lambda item: key(item[0]))


def metric_cells(cell: pd.DataFrame, names: Sequence[str], best: set, notes: dict[str, str]) -> list[Cell]:
    """Return the table cells of the metrics `names` for one cell; those in `best` (see `best_values`) are bold.

    notes: by metric, the text in parentheses behind the number.
    """
    rows = {row.metric: row for row in cell.itertuples()}
    return [
        interval(r.value, r.low, r.high, "best" if (r.method, r.bits, name) in best else "", notes.get(name, ""))
        if (r := rows.get(name))
        else MISSING
        for name in names
    ]


def ledger_tables(verdicts: pd.DataFrame) -> list[Table]:
    """Return a table of the verdicts by model, and for each model one of the published numbers that were measured."""
    counts = pd.crosstab(verdicts["model"], verdicts["verdict"]).reindex(columns=ledger.VERDICTS, fill_value=0)
    rows = [[model, *map(str, counts.loc[model])] for model in dict.fromkeys(verdicts["model"])]
    heads, title = columns("model", *ledger.VERDICTS, texts=1), "Published and measured"
    tables = [Table(heads, rows, title, caption=f"{title}. {LEDGER_FOOTER}")]
    heads = ["method", "bits", "metric", "published", "ours", "verdict", "why", "source", "not stated there"]
    for model, of_model in verdicts[verdicts["verdict"] != "NOT RUN"].groupby("model", sort=False):
        rows = [
            [row.method, row.bits, METRICS[row.metric].label, number(row.published, "g")]
            + [interval(row.ours, row.low, row.high), row.verdict, row.why, f"{row.source}, {row.table}"]
            + [row.not_stated]
            for row in of_model.itertuples()
        ]
        tables.append(Table(columns(*heads, texts=len(heads)), rows, model, caption=f"Ledger of {model}."))
    return tables


LEDGER_FOOTER = (
    "PASS: within 2 % of the published number (CLIP score: 0.2 %), or it lies in our interval. DRIFT: neither. "
    "NOT COMPARABLE: the protocols differ. INCONCLUSIVE: our interval is too wide to tell. NOT RUN: nothing measured. "
    "Every number with its note: ledger.csv."
)


def by_bits(bits: str) -> tuple[int, int]:
    """Return a sort key for "w8a8", "w4a8", ... that puts most bits first."""
    weight, activation = (int(part) for part in bits[1:].split("a"))
    return (-weight, -activation)


def column_label(name: str, of_model: pd.DataFrame) -> str:
    """Return the label of a metric with its network, because numbers of different networks cannot be compared."""
    metric = METRICS[name]
    if metric.network is None:
        return metric.label
    networks = of_model.loc[of_model["metric"] == name, "extractor"].unique()
    suffix = " net" if metric.network == "extractor" else ""
    return f"{metric.label} ({', '.join(networks)}{suffix})"


def best_values(of_model: pd.DataFrame, paired: pd.DataFrame) -> set[tuple[str, str, str]]:
    """Return (method, bits, metric) of every best value whose paired difference to the second best excludes 0.

    No value is the best if one of its column is better than full precision's (a lower FID, say): quantizing cannot
    improve the model, so an error then happens to point towards the reference. A method that diverged in one metric is
    left out of all.
    """
    best = set()
    full = of_model[of_model["method"] == "fp"].set_index("metric")["value"]
    diverged = of_model.loc[~np.isfinite(of_model["value"]), ["method", "bits"]]
    broken = set(diverged.itertuples(index=False, name=None)) | {("fp", bits) for bits in of_model["bits"]}
    quantized = of_model[[run not in broken for run in zip(of_model["method"], of_model["bits"], strict=True)]]
    for (bits, name), rows in quantized.groupby(["bits", "metric"]):
        ranked = rows.sort_values("value", ascending=METRICS[name].better == "lower")["method"].tolist()
        if len(ranked) < 2:
            continue
        sign = 1 if METRICS[name].better == "lower" else -1
        if name in full and (sign * rows["value"]).min() < sign * full[name]:
            continue
        pair = paired[(paired["bits"] == bits) & (paired["metric"] == name)]
        pair = pair[pair[["method", "versus"]].isin(ranked[:2]).all(axis=1)]
        if (pair["better"] == ranked[0]).any():
            best.add((ranked[0], bits, name))
    return best


def footer(of_model: pd.DataFrame, heads: dict[str, str]) -> list[str]:
    """Return the notes below the table of one model: protocol, n, seeds, the meaning of ± and bold, notes of rows."""
    protocols = of_model.groupby("metric", sort=False)["protocol"].first()
    common = min(protocols, key=len)
    others = [f"{heads[name]}: {p.removeprefix(common).lstrip('; ')}" for name, p in protocols.items() if p != common]
    sizes = {}
    for (n, seeds), rows in of_model.groupby(["n", "seeds"], sort=False):
        sizes[f"n = {n}, seeds {seeds}"] = [heads[name] for name in rows["metric"].unique()]
    counts = list(sizes)[:1] + [f"{', '.join(labels)}: {size}" for size, labels in list(sizes.items())[1:]]
    lines = [
        f"Protocol: {'; '.join([common, *others])}. {'; '.join(counts)}. "
        "± is half of a 95 % interval: 1.96 bootstrap standard deviations over images (noise-prediction error: over "
        "trajectories, with Student's factor). Only equal n compares. Bold: better than the runner-up at the same "
        "bits, by the paired interval of their difference on the same seeds, not beyond full precision, and by no less "
        "than the floor where `snakemake nulls` measured one. Size: the denoiser as packed, scales and what stays "
        "float included (1e6 bytes). TBOPs: 1e12 bit operations of one denoiser call on one image, "
        "multiply-accumulates times the bits of both operands (float: 32)."
    ]
    if of_model["published"].notna().any():
        lines.append(f"In parentheses: the number of {ledger.PAPER}; the ledger says whether the two may be compared.")
    notes = of_model[of_model["note"] != ""]
    if len(notes):
        texts = []
        for note, rows in notes.groupby("note", sort=False):
            metrics = list(rows["metric"].unique())
            labels = ", ".join(heads[name] for name in metrics)
            cells = [f"{r.method} {r.bits}" for r in rows.drop_duplicates(["method", "bits"]).itertuples()]
            whole = len(rows) == of_model["metric"].isin(metrics).sum()
            texts.append(f"{labels}: {note}" if whole else f"{', '.join(cells)} {labels}: {note}")
        lines.append(f"Notes: {'; '.join(texts)}.")
    return lines + mixture(of_model)
