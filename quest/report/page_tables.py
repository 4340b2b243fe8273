"""The tables of the page, which readers can sort and filter: main, paired, ledger, cost, speed, and any csv file."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.quantization.header import read as read_header
from quest.report import tables
from quest.report.rendering import MISSING, NONE, Cell, Column, Table, columns, interval, number, read_csv
from quest.runtime.files import loads, read_arrays


def main_table(main: pd.DataFrame, paired: pd.DataFrame, verdicts: pd.DataFrame) -> Table:
    """Return main.csv as a table with a row for each cell, fewest bits first; the paper's number is a note below ours.

    The frames are those of main.csv, paired.csv and ledger.csv.
    """
    names = [name for name in METRICS if name in set(main["metric"])]
    heads = columns("model", "method", "bits", texts=3, choose=True)
    heads += [Column(tables.column_label(name, main), direction=METRICS[name].better) for name in names]
    heads += [Column("size [MB]", direction="lower"), Column("TBOPs", direction="lower")]
    heads += [Column("bits per parameter"), Column("share on integers", direction="higher")]
    timed = "latency_ms" in main  # tables of older runs lack this column
    heads += [Column("latency [ms]", direction="lower")] if timed else []
    judged = verdicts.set_index(["model", "method", "bits", "metric"])["verdict"].to_dict()
    rows = []
    for model, of_model in main.groupby("model", sort=False):
        best = tables.best_values(of_model, paired[paired["model"] == model])
        for (method, bits), cell in tables.cells_of(of_model, lambda run: _fewest_bits_first(*run)):
            notes = {
                row.metric: f"paper {row.published:g}: {judged.get((model, method, bits, row.metric), 'see ledger')}"
                for row in cell[cell["published"].notna()].itertuples()
            }
            row = [model, method, bits.upper(), *tables.metric_cells(cell, names, best, notes)]
            first = cell.iloc[0]
            row += [number(first["size_mb"]), number(first["bops"] / 1e12, ".3g")]
            row += [number(first["effective_bits"], ".3g"), number(first["realizable"], ".0%")]
            row += [number(first["latency_ms"], note=first["latency_at"])] if timed else []
            rows.append(row)
    return Table(heads, rows)


def paired_table(paired: pd.DataFrame) -> Table:
    """Return paired.csv as a table, with the verdict in words."""
    heads = columns("model", "bits", "metric", "method", "versus", texts=5, choose=True)
    heads += [Column("method minus versus"), Column("better", "text", choose=True), Column("n")]
    marks = {"better": "better", "worse": "worse", "diverged": "worse", "rival diverged": "better"}
    rows = []
    for row in paired.itertuples():
        names = [row.model, row.bits.upper(), METRICS[row.metric].label, row.method, row.versus]
        mark = marks.get(outcome(row.better, row.method), "")
        difference = interval(row.difference, row.low, row.high, mark)
        rows.append([*names, difference, row.better, number(row.n, "d")])
    return Table(heads, rows)


def ledger_table(verdicts: pd.DataFrame) -> Table:
    """Return ledger.csv as a table: every published number, and ours if it was measured."""
    heads = columns("model", "method", "bits", "metric", texts=4, choose=True) + columns("published", "ours")
    heads += [Column("verdict", "text", choose=True), *columns("why", "source", "not stated there", "note", texts=4)]
    rows = []
    for row in verdicts.itertuples():
        names = [row.model, row.method, row.bits.upper(), METRICS[row.metric].label]
        ours = MISSING if row.verdict == "NOT RUN" else interval(row.ours, row.low, row.high)
        verdict = Cell(row.verdict, mark=row.verdict.lower().replace(" ", "-"))
        texts = [row.why, f"{row.source}, {row.table}", row.not_stated, row.note]
        rows.append([*names, number(row.published), ours, verdict, *texts])
    return Table(heads, rows)


def csv_table(path: str | Path, part: str | None = None) -> Table:
    """Return a csv file as a table without its columns of provenance; part: show only rows of this part."""
    frame = read_csv(path)
    if part and "part" in frame:
        frame = frame[frame["part"] == part]
    table = Table.of_frame(frame[[name for name in frame if name not in (*tables.PROVENANCE, "evaluation")]])
    table.columns = [replace(column, label=column.label.replace("_", " ")) for column in table.columns]
    if "speedup" in frame:  # a kernel that is slower than fp32 is marked
        table.rows = [
            [replace(cell, mark="slower") for cell in row] if speedup < 1 else row
            for row, speedup in zip(table.rows, frame["speedup"], strict=True)
        ]
    return table


def cost_table(run: Path, main: pd.DataFrame) -> Table:
    """Return the time and memory of quantizing each cell and its starting point, from the headers of checkpoints."""
    heads = columns("model", "method", "bits", texts=3, choose=True)
    heads += [Column("quantizing [s]", direction="lower"), Column("peak memory [MB]", direction="lower")]
    heads += [Column("starts from", "text"), Column("that took [s]"), Column("iterations", "text")]
    rows = []
    for model, method, bits in _quantized(main):
        file = run / model / method / bits / "model.safetensors"
        if not file.is_file():
            continue
        header = read_header(file, diverged=True)
        start = header.get("init") or {}
        stages = [f"{stage['stage']} {stage['iterations']}" for stage in header.get("cost", {}).get("stages", [])]
        name = f"{start['method']} {start['bits'].upper()}" if start.get("method") else NONE
        row = [model, method, bits.upper(), number(header.get("seconds", math.nan), ".1f")]
        row += [number(header.get("peak_memory", math.nan), ".0f"), name]
        made = f"diverged: {header['diverged']}" if "diverged" in header else _shortened(stages)
        rows.append([*row, number(start.get("seconds", math.nan), ".1f"), made])
    return Table(heads, rows)


def _shortened(stages):
    return ", ".join(stages) if len(stages) <= 3 else f"{', '.join(stages[:2])}, … ({len(stages)} units)"


def speed_table(run: Path, main: pd.DataFrame) -> Table:
    """Return where the layers of each cell ran, and its sampling time relative to full precision of the model."""
    heads = columns("model", "method", "bits", "kernel", texts=4, choose=True)
    heads += [Column("share on integers", direction="higher"), Column("sampling [s per 100 images]", direction="lower")]
    heads += [Column("times full precision", direction="higher"), *columns("layers refused", "deviation")]
    rows, full_precision = [], {}
    for model, method, bits in _quantized(main, fp=True):
        metadata = [*_metadata(run / model / method / bits, "samples").values()]
        if not metadata or not all("seconds" in shard for shard in metadata):
            continue
        timed = [shard for shard in metadata if shard.get("drawn")]  # older files do not say of how many images
        spent = sum(shard["seconds"] for shard in timed)
        seconds = 100 * spent / sum(shard["drawn"] for shard in timed) if spent else math.nan
        kernel = metadata[0].get("kernel") or {}
        if method == "fp":
            full_precision[model] = seconds
        ratio = full_precision[model] / seconds if model in full_precision and method != "fp" else math.nan
        row = [model, method, bits.upper(), kernel.get("kernel") or "float32"]
        row += [number(metadata[0].get("footprint", {}).get("realizable", math.nan), ".0%"), number(seconds, ".1f")]
        row += [number(ratio, ".2f", "slower" if ratio < 1 else "")]
        row += [number(len(kernel["refused"]), "d") if "refused" in kernel else MISSING]
        rows.append([*row, number(kernel.get("deviation", math.nan), ".1e")])
    return Table(heads, rows)


def _quantized(main, fp=False):
    """Return (model, method, bits) of the cells, fewest bits first; fp: include full precision, as the first ones."""
    cells = dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    cells = [cell for cell in cells if fp or cell[1] != "fp"]
    models = list(dict.fromkeys(main["model"]))
    return sorted(cells, key=lambda cell: (models.index(cell[0]), _fewest_bits_first(*cell[1:])))


def _fewest_bits_first(method, bits):
    return method != "fp", [-width for width in tables.by_bits(bits)]


def shards(folder: Path, kind: str) -> list[Path]:
    """Return the files of a cell; kind: "samples" or "features"."""
    return list(_metadata(folder, kind))


def _metadata(folder, kind):
    """{file: metadata} of a cell. A file of another number of shards than the first one's is left of an earlier run."""
    told = {
        file: loads(str(read_arrays(file, ["metadata"]).get("metadata", "{}")), file)
        for file in sorted(folder.glob(f"{kind}-*.npz"))
    }
    numbers = [one.get("seeds", {}).get("shard", "").partition("/")[2] for one in told.values()]
    return {file: one for (file, one), number in zip(told.items(), numbers, strict=True) if number == numbers[0]}
