"""Tables of measured speed, results/kernels/{machine}.csv: what the columns mean, and tables for people. No torch."""

import math
import re
from pathlib import Path

import pandas as pd

from quest.report import rendering
from quest.report.rendering import NONE, Table, columns
from quest.runtime.files import atomic
from quest.runtime.provenance import provenance

KEY = ["part", "model", "layer", "batch", "threads", "kernel"]
# part: "peak", "layer" or "step" (a whole denoiser call). count: layers of the denoiser that are alike. ms, speedup:
# medians, with quartiles; speedup is over fp32 in eager mode, of the same rounds. gops: 1e9 operations a second, two to
# a multiply-accumulate. intensity: operations per byte that must be moved. in_*: shares of a step. others: processors
# that other processes kept busy meanwhile. load: the machine's average when the run began.
COLUMNS = [*KEY, "count", "ms", "ms_low", "ms_high", "speedup", "speedup_low", "speedup_high", "rounds", "gops", "gbs"]
COLUMNS += ["intensity", "in_layers", "in_attention", "in_norms", "in_rest", "note", "others", "load"]
COLUMNS += ["isa", "machine", "versions", "commit", "date"]
BUSY = 0.1  # processors that others keep busy: from here on a row was timed under load
HALF = ("bf16", "bf16 compiled", "bf16 prepacked")


def machine() -> str:
    """This machine in a row: processor and cores."""
    made = provenance()["machine"]
    return f"{made['cpu']}, {made['cores']} cores"


def slug(name: str, isa: str) -> str:
    """A file's name for a machine's rows. Processors of one name can differ in what they compute with."""
    return re.sub("[^a-z0-9]+", "-", f"{name} {isa}".lower()).strip("-")


def key(row: dict) -> tuple:
    """What tells a row from the others of its machine."""
    given = {"model": "", "layer": "", "batch": 0} | row
    return tuple("" if given[name] is None else given[name] for name in KEY)


def read(path: str | Path) -> pd.DataFrame:
    """Rows of a machine. Raises ValueError, naming the file, for other columns than COLUMNS."""
    frame = pd.read_csv(path, keep_default_na=False, na_values=["nan"])
    if list(frame.columns) != COLUMNS:
        raise ValueError(f"{path}: columns are {', '.join(frame.columns)}; needed: {', '.join(COLUMNS)}")
    return frame


def merge(old: pd.DataFrame | None, rows: list[dict]) -> pd.DataFrame:
    """New rows in place of old ones of the same key; one that was not measured leaves a measured one alone.

    A peak is what the machine allows at best: a lower one was measured while it was busy, and is left out.
    """
    new = pd.DataFrame(rows, columns=COLUMNS)
    for column in ("model", "layer", "note"):
        new[column] = new[column].fillna("")
    if old is None:
        return new
    measured = {key(row): row for row in old.to_dict("records") if not left_out(row)}

    def counts(row):
        before = measured.get(key(row))
        if before is None or row["part"] != "peak":
            return before is None or not left_out(row)
        return any(row[unit] > before[unit] for unit in ("gops", "gbs"))

    new = new[[counts(row) for row in new.to_dict("records")]]
    replaced = {key(row) for row in new.to_dict("records")}
    old = old[[key(row) not in replaced for row in old.to_dict("records")]]
    return pd.concat([frame for frame in (old, new) if len(frame)], ignore_index=True)


def left_out(row) -> bool:
    """Whether a row says why something was not measured."""
    return row["note"].startswith("not measured")


def write(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a machine's rows, and beside them what people read (.md)."""
    path = Path(path)
    with atomic(path) as file:
        frame.to_csv(file, index=False, na_rep="nan", float_format="%.5g")
    rendering.write(path.with_suffix(".md"), markdown(frame))


def markdown(frame: pd.DataFrame) -> str:
    """What was measured on a machine, for people."""
    first = frame.iloc[-1]
    blocks = [
        f"# Speed on {first['machine']}",
        f"Instruction set: {first['isa'] or 'no compiled core'}. {first['versions']}. Random weights. "
        "Median [quartiles] of rounds in which every contender runs once; times as fast as fp32 in eager mode, "
        "channels innermost, of the same rounds. * timed while other processes kept more than "
        f"{BUSY:g} processors busy. Prepacked: what torch.compile calls for a single layer. A single layer of OpenVINO "
        "pays for the call from Python. oneDNN's sums saturate on processors without VNNI; ours are exact.",
    ]
    measured = frame[[not left_out(row) for row in frame.to_dict("records")]]
    for title, block in (
        ("What the machine allows", _peaks(measured)),
        ("Whole denoiser steps", _steps(measured)),
        ("Where a step's time goes", _shares(measured)),
        ("Layers", _layers(measured)),
        ("Slower than half precision", _slower(frame)),
        ("Not measured", _left_out(frame)),
    ):
        if block:
            blocks += [f"## {title}", block]
    return "\n\n".join(blocks)


def _peaks(measured):
    rows = []
    for threads, of in measured[measured["part"] == "peak"].groupby("threads"):
        found = of.set_index("kernel")
        gops = [f"{found.loc[name, 'gops']:.0f}" if name in found.index else NONE for name in ("integer", "fp32")]
        memory = f"{found.loc['memory', 'gbs']:.1f}" if "memory" in found.index else NONE
        rows.append([str(threads), found.iloc[0]["isa"], *gops, memory])
    note = "On registers alone: the multiply-accumulates of the integer kernel, and those of fp32; a copy in memory."
    heads = ["threads", "", "integer GOP/s", "fp32 GFLOP/s", "memory GB/s"]
    return rows and f"{note}\n\n{Table(columns(*heads, texts=2), rows).markdown()}"


def speedup(row) -> str:
    """ "1.85 [1.80, 1.91]", with a star where it was timed under load."""
    star = "*" if row["others"] > BUSY else ""
    return f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]{star}"


def _pivot(rows, names, labels):
    """A table with a column for each contender: the milliseconds of fp32, and speedups of the others."""
    kernels = [name for name in dict.fromkeys(rows["kernel"]) if name != "fp32"]
    lines = []
    for _, of in rows.groupby(names, sort=False):
        found = {row["kernel"]: row for row in of.to_dict("records")}
        if "fp32" not in found:
            continue
        texts = [str(found["fp32"][name]) for name in names]
        texts.append(f"{found['fp32']['ms']:.4g}")
        lines.append(texts + [speedup(found[name]) if name in found else NONE for name in kernels])
    return Table(columns(*labels, "fp32 ms", *kernels, texts=2), lines).markdown()


def _steps(measured):
    rows = measured[measured["part"] == "step"]
    return len(rows) and _pivot(rows, ["model", "batch", "threads"], ["model", "batch", "threads"])


def _shares(measured):
    rows = []
    for row in measured[measured["in_rest"].notna()].to_dict("records"):
        parts = [f"{100 * row[f'in_{kind}']:.0f}" for kind in ("layers", "attention", "norms", "rest")]
        rows.append([row["model"], row["kernel"], str(row["batch"]), str(row["threads"]), f"{row['ms']:.4g}", *parts])
    note = "Per cent. Norms and the rest (additions, interpolation, activations, Python) are not quantized."
    heads = ["model", "kernel", "batch", "threads", "ms", "layers", "attention", "norms", "rest"]
    return rows and f"{note}\n\n{Table(columns(*heads, texts=2), rows).markdown()}"


def _layers(measured):
    tables = []
    for (model, threads), rows in measured[measured["part"] == "layer"].groupby(["model", "threads"], sort=False):
        title = f"### {model}, {threads} thread{'s' if threads > 1 else ''}"
        tables += [title, _pivot(rows, ["layer", "batch"], ["layer", "batch"])]
    return "\n\n".join(tables)


def _slower(frame):
    """Integer rows that take longer than the best in half precision, of steps and layers."""
    lines, compared = [], 0
    for names, of in frame.groupby(["part", "model", "layer", "batch", "threads"], sort=False):
        rows = {row["kernel"]: row for row in of.to_dict("records") if row["part"] != "peak" and row["ms"] > 0}
        half = min((rows[name]["ms"] for name in HALF if name in rows), default=math.nan)
        compared += not math.isnan(half)
        for kernel, row in rows.items():
            if kernel.startswith("integer") and row["ms"] > half:
                where = ", ".join(map(str, filter(None, names[1:3])))
                lines.append(
                    f"- {where}, batch {names[3]}, {names[4]} threads, {kernel}: {row['ms']:.4g} ms, {half:.4g} in bf16"
                )
    if not compared:
        return "Half precision was not measured; why not stands below."
    return "\n".join(lines) or "Nothing."


def _left_out(frame):
    reasons = {}
    for row in frame.to_dict("records"):
        if left_out(row):
            what = f"{row['kernel']} ({row['part']}s)" if row["part"] != "peak" else f"peak of {row['kernel']}"
            found = reasons.setdefault(str(row["note"]).removeprefix("not measured: "), {})
            found[what] = found.get(what, 0) + 1
    return "\n".join(
        f"- {', '.join(f'{what}: {count}' for what, count in found.items())} — {why}" for why, found in reasons.items()
    )
