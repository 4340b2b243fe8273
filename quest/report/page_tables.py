"""Tables of the page, which sort and filter: main, paired, ledger, cost, speed, and any csv file.

Each is {"columns": [...], "rows": [[{"text", "value", "mark", "note"}]]}, `value` what a column is sorted by.
"""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open

from quest.metrics import METRICS
from quest.report import markup, tables

PROVENANCE = ("commit", "machine", "versions", "seeds")


def read(path: Path) -> pd.DataFrame:
    """A csv file of a run, in which an empty cell is an empty text."""
    return pd.read_csv(path, keep_default_na=False, na_values=["nan"])


def column(label: str, kind: str = "number", better: str = "", choose: bool = False, title: str = "") -> dict:
    """A column: kind "text" or "number", better "lower", "higher" or "", choose for a menu of its values."""
    return {"label": label, "kind": kind, "better": better, "choose": choose, "title": title}


def entry(text: str, value: object = None, mark: str = "", note: str = "") -> dict:
    """A cell of a table: what it says, what it is sorted by (a number as the csv has it), how it is marked."""
    return {"text": text, "value": text if value is None else value, "mark": mark, "note": note}


def number(value: float, form: str = ".4g") -> dict:
    """A cell with a number, or a dash where there is none."""
    missing = value == "" or (isinstance(value, float) and math.isnan(value))
    return entry("–", "") if missing else entry(format(value, form), value)


def interval(value: float, low: float, high: float, mark: str = "", note: str = "") -> dict:
    """A cell with a value ± half of its interval, sorted by the value."""
    if math.isnan(value):
        return entry("–", "")
    return entry(markup.plus_minus(value, low, high), value, mark, note)


def main_table(main: pd.DataFrame, paired: pd.DataFrame, verdicts: pd.DataFrame) -> dict:
    """main.csv with a row for each cell, fewest bits first; the paper's number stands below ours."""
    names = [name for name in METRICS if name in set(main["metric"])]
    columns = [column("model", "text", choose=True), column("method", "text", choose=True)]
    columns += [column("bits", "text", choose=True)]
    columns += [column(tables.column_label(name, main), better=METRICS[name].better) for name in names]
    extra = ["latency_ms"] if "latency_ms" in main else []  # tables of older runs lack it
    columns += [column("size [MB]", better="lower"), column("TBOPs", better="lower")]
    columns += [column("bits per parameter"), column("share on integers", better="higher")]
    columns += [column("latency [ms]", better="lower") for _ in extra]
    judged = verdicts.set_index(["model", "method", "bits", "metric"])["verdict"].to_dict()
    rows = []
    for model, of_model in main.groupby("model", sort=False):
        best = tables.best_values(of_model, paired[paired["model"] == model])
        cells = of_model.groupby(["method", "bits"], sort=False)
        for method, bits in sorted(
            cells.groups, key=lambda run: (run[0] != "fp", [-b for b in tables.by_bits(run[1])])
        ):
            cell = cells.get_group((method, bits)).set_index("metric")
            row = [entry(model), entry(method), entry(bits.upper())]
            for name in names:
                if name not in cell.index:
                    row.append(entry("–", ""))
                    continue
                found, note = cell.loc[name], ""
                if not math.isnan(found["published"]):
                    note = f"paper {found['published']:g}: {judged.get((model, method, bits, name), 'see ledger')}"
                mark = "best" if (method, bits, name) in best else ""
                row.append(interval(found["value"], found["low"], found["high"], mark, note))
            first = cell.iloc[0]
            row += [
                number(first["size_mb"]),
                number(first["bops"] / 1e12, ".3g"),
                number(first["effective_bits"], ".3g"),
            ]
            row += [
                number(first["realizable"], ".0%"),
                *(number(first[name]) | {"note": first["latency_at"]} for name in extra),
            ]
            rows.append(row)
    return {"columns": columns, "rows": rows}


def paired_table(paired: pd.DataFrame) -> dict:
    """paired.csv, with the verdict in words."""
    columns = [column(name, "text", choose=True) for name in ("model", "bits", "metric", "method", "versus")]
    columns += [column("method minus versus"), column("better", "text", choose=True), column("n")]
    rows = []
    for row in paired.itertuples():
        names = [row.model, row.bits.upper(), METRICS[row.metric].label, row.method, row.versus]
        mark = {row.method: "better", row.versus: "worse"}.get(row.better, "")
        difference = interval(row.difference, row.low, row.high, mark)
        rows.append([*map(entry, names), difference, entry(row.better), number(row.n, "d")])
    return {"columns": columns, "rows": rows}


def ledger_table(verdicts: pd.DataFrame) -> dict:
    """ledger.csv: every published number, and ours where there is one that may stand beside it."""
    names = ["model", "method", "bits", "metric"]
    columns = [column(name, "text", choose=True) for name in names]
    columns += [column("published"), column("ours"), column("verdict", "text", choose=True), column("why", "text")]
    columns += [column("source", "text"), column("not stated there", "text"), column("note", "text")]
    rows = []
    for row in verdicts.itertuples():
        cells = [row.model, row.method, row.bits.upper(), METRICS[row.metric].label]
        ours = interval(row.ours, row.low, row.high)
        mark = row.verdict.lower().replace(" ", "-")
        told = [row.why, f"{row.source}, {row.table}", row.not_stated, row.note]
        rows.append([*map(entry, cells), number(row.published), ours, entry(row.verdict, mark=mark), *map(entry, told)])
    return {"columns": columns, "rows": rows}


def csv_table(path: str | Path, part: str | None = None) -> dict:
    """Any csv file as a table; columns that say where a row comes from are left out. part: of rows that have one."""
    frame = read(Path(path))
    if part and "part" in frame:
        frame = frame[frame["part"] == part]
    frame = frame[[name for name in frame if name not in (*PROVENANCE, "evaluation")]]
    columns, kinds = [], {name: pd.api.types.is_numeric_dtype(frame[name]) for name in frame}
    for name, numeric in kinds.items():
        few = not numeric and frame[name].nunique() <= 12
        columns.append(column(name.replace("_", " "), "number" if numeric else "text", choose=few))
    rows = []
    for record in frame.to_dict("records"):
        row = [
            number(value, "d" if isinstance(value, int) else ".4g") if kinds[name] else entry(str(value))
            for name, value in record.items()
        ]
        if record.get("speedup", 1) < 1:  # a speed that is none has to catch the eye
            row = [cell | {"mark": "slower"} for cell in row]
        rows.append(row)
    return {"columns": columns, "rows": rows}


def cost_table(run: Path, main: pd.DataFrame) -> dict:
    """What quantizing took, as the checkpoints tell, and what their starting points took."""
    columns = [column(name, "text", choose=True) for name in ("model", "method", "bits")]
    columns += [column("quantizing [s]", better="lower"), column("peak memory [MB]", better="lower")]
    columns += [column("starts from", "text"), column("that took [s]"), column("iterations", "text")]
    rows = []
    for model, method, bits in _quantized(main):
        file = run / model / method / bits / "model.safetensors"
        if not file.is_file():
            continue
        with safe_open(file, framework="numpy") as opened:
            header = json.loads(opened.metadata()["quest"])
        start = header.get("init") or {}
        stages = [f"{stage['stage']} {stage['iterations']}" for stage in header.get("cost", {}).get("stages", [])]
        name = f"{start['method']} {start['bits'].upper()}" if start.get("method") else "–"
        row = [entry(model), entry(method), entry(bits.upper()), number(header.get("seconds", math.nan), ".1f")]
        row += [number(header.get("peak_memory", math.nan), ".0f"), entry(name)]
        rows.append([*row, number(start.get("seconds", math.nan), ".1f"), entry(_shortened(stages))])
    return {"columns": columns, "rows": rows}


def _shortened(stages):
    return ", ".join(stages) if len(stages) <= 3 else f"{', '.join(stages[:2])}, … ({len(stages)} units)"


def speed_table(run: Path, main: pd.DataFrame) -> dict:
    """Where the layers of a cell ran, and how long it sampled, set against full precision of the same model."""
    columns = [column(name, "text", choose=True) for name in ("model", "method", "bits", "kernel")]
    columns += [column("share on integers", better="higher"), column("sampling [s per 100 images]", better="lower")]
    columns += [column("times full precision", better="higher"), column("layers refused"), column("deviation")]
    rows, plain = [], {}
    for model, method, bits in _quantized(main, fp=True):
        taken = [_metadata(file) for file in shards(run / model / method / bits, "samples")]
        if not taken or not all("seconds" in one for one in taken):
            continue
        each = 100 * sum(one["seconds"] for one in taken) / sum(one["seeds"]["n"] for one in taken)
        placed = taken[0].get("kernel") or {}
        if method == "fp":
            plain[model] = each
        ratio = plain[model] / each if model in plain and method != "fp" else math.nan
        row = [entry(model), entry(method), entry(bits.upper()), entry(placed.get("kernel") or "float32")]
        row += [number(taken[0].get("footprint", {}).get("realizable", math.nan), ".0%"), number(each, ".1f")]
        row += [number(ratio, ".2f") | {"mark": "slower" if ratio < 1 else ""}]
        row += [number(len(placed["refused"]), "d") if "refused" in placed else number(math.nan)]
        rows.append([*row, number(placed.get("deviation", math.nan), ".1e")])
    return {"columns": columns, "rows": rows}


def _quantized(main, fp=False):
    """(model, method, bits) of the cells, full precision first if at all."""
    cells = dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    cells = [cell for cell in cells if fp or cell[1] != "fp"]
    models = list(dict.fromkeys(main["model"]))
    return sorted(cells, key=lambda c: (models.index(c[0]), c[1] != "fp", [-b for b in tables.by_bits(c[2])]))


def shards(folder: Path, kind: str) -> list[Path]:
    """Files of a cell: kind "samples" or "features"."""
    return sorted(folder.glob(f"{kind}-*.npz"))


def _metadata(file):
    with np.load(file) as arrays:
        return json.loads(str(arrays["metadata"])) if "metadata" in arrays.files else {}
