"""Tables of measured speed, results/kernels/{machine}.csv, and their Markdown for readers. Needs no torch."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from quest.report import rendering
from quest.report.rendering import NONE, Table, columns, number
from quest.runtime.files import atomic
from quest.runtime.provenance import provenance

KEY = ["part", "model", "layer", "batch", "threads", "kernel"]
# part: "peak", "layer" or "step" (a whole denoiser call). count: number of equal layers in the denoiser. ms, speedup:
# medians with quartiles, of one thread in processor time (rows up to 2026-11-28: in wall time); speedup is relative to
# fp32 in eager mode in the same rounds. gops: 1e9 operations per second; a multiply-accumulate is two. error: of a
# whole step's noise prediction against full precision, relative and squared. ours: how many times as long as
# integer w8a8 a rival's step takes in the same rounds. intensity: operations per byte that must
# be moved. in_*: shares of a step. others: the number of processors that other processes kept busy meanwhile. load:
# load average at the start of the run.
COLUMNS = [*KEY, "count", "ms", "ms_low", "ms_high", "speedup", "speedup_low", "speedup_high", "rounds", "gops", "gbs"]
COLUMNS += ["error", "ours", "intensity", "in_layers", "in_attention", "in_norms", "in_rest", "note", "others", "load"]
COLUMNS += ["isa", "machine", "versions", "commit", "date"]
BUSY = 0.1  # a row with a larger value of `others` was timed under load
HALF = ("bf16", "bf16 compiled", "bf16 prepacked")


def machine() -> str:
    """Return the column `machine` for this machine: its processor and number of cores."""
    record = provenance()["machine"]
    return f"{record['cpu']}, {record['cores']} cores"


def slug(name: str, isa: str) -> str:
    """Return a file name for a machine; processors of one name can differ in their instruction set `isa`."""
    return re.sub("[^a-z0-9]+", "-", f"{name} {isa}".lower()).strip("-")


def key(row: dict) -> tuple:
    """Return the columns KEY of a row, which identify it among the rows of its machine."""
    values = {"model": "", "layer": "", "batch": 0} | row
    return tuple("" if values[name] is None else values[name] for name in KEY)


def read(path: str | Path) -> pd.DataFrame:
    """Read the rows of a machine. Raises ValueError, which names the file, for other columns than COLUMNS."""
    return rendering.read_csv(path, COLUMNS)


def merge(old: pd.DataFrame | None, rows: list[dict]) -> pd.DataFrame:
    """Replace old rows by new rows of the same key, except where the new row was not measured and the old one was.

    A peak is the limit of the machine, so a new peak that is lower was measured under load and is left out.
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
    """Return whether a row states a reason for a missing measurement."""
    return row["note"].startswith("not measured")


def write(frame: pd.DataFrame, path: str | Path) -> None:
    """Write the rows of a machine (.csv), and the same for readers in the same folder (.md)."""
    path = Path(path)
    with atomic(path) as file:
        frame.to_csv(file, index=False, na_rep="nan", float_format="%.5g")
    rendering.write(path.with_suffix(".md"), markdown(frame))


def markdown(frame: pd.DataFrame) -> str:
    """Return the measurements of a machine in Markdown: limits, steps, layers, and what is slow or missing."""
    first = frame.iloc[-1]
    blocks = [
        f"# Speed on {first['machine']}",
        f"Instruction set: {first['isa'] or 'no compiled core'}. {first['versions']}. "
        "Median [quartiles] of rounds in which every contender runs once; times as fast as fp32 in eager mode, "
        "channels innermost, of the same rounds. One thread is timed by processor time, several by wall time. "
        "Weights are random except where an error is given. * timed while other processes kept more than "
        f"{BUSY:g} processors busy. Prepacked: what torch.compile calls for a single layer. A single layer of OpenVINO "
        "pays for the call from Python. oneDNN's sums saturate on processors without VNNI; ours are exact.",
    ]
    measured = frame[[not left_out(row) for row in frame.to_dict("records")]]
    for title, block in (
        ("What the machine allows", _peaks(measured)),
        ("Whole denoiser steps", _steps(measured)),
        ("Speed and error", _errors(measured)),
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
    for threads, of_threads in measured[measured["part"] == "peak"].groupby("threads"):
        peaks = of_threads.set_index("kernel")
        gops = [f"{peaks.loc[name, 'gops']:.0f}" if name in peaks.index else NONE for name in ("integer", "fp32")]
        memory = f"{peaks.loc['memory', 'gbs']:.1f}" if "memory" in peaks.index else NONE
        rows.append([str(threads), peaks.iloc[0]["isa"], *gops, memory])
    note = "On registers alone: the multiply-accumulates of the integer kernel, and those of fp32; a copy in memory."
    heads = ["threads", "", "integer GOP/s", "fp32 GFLOP/s", "memory GB/s"]
    return rows and f"{note}\n\n{Table(columns(*heads, texts=2), rows).markdown()}"


def speedup(row) -> str:
    """Write a speedup with its quartiles, "1.85 [1.80, 1.91]"; a star says that it was timed under load."""
    star = "*" if row["others"] > BUSY else ""
    return f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]{star}"


def _pivot(rows, names, labels):
    """Return a table with the milliseconds of fp32 and the speedup of every other kernel, a column for each."""
    kernels = [name for name in dict.fromkeys(rows["kernel"]) if name != "fp32"]
    lines = []
    for _, group in rows.groupby(names, sort=False):
        row_of = {row["kernel"]: row for row in group.to_dict("records")}
        if fp32 := row_of.get("fp32"):
            speedups = [speedup(row_of[name]) if name in row_of else NONE for name in kernels]
            lines.append([*(str(fp32[name]) for name in names), f"{fp32['ms']:.4g}", *speedups])
    return Table(columns(*labels, "fp32 ms", *kernels, texts=2), lines).markdown()


def _steps(measured):
    rows = measured[measured["part"] == "step"]
    return len(rows) and _pivot(rows, ["model", "batch", "threads"], ["model", "batch", "threads"])


def _errors(measured):
    lines = []
    for row in measured[measured["error"].notna() | measured["ours"].notna()].to_dict("records"):
        names = [row["model"], row["kernel"], str(row["batch"]), str(row["threads"])]
        beside = [number(row["ours"], ".2f"), number(row["error"], ".2g")]
        lines.append([*names, f"{row['ms']:.4g}", speedup(row), *beside])
    note = (
        "Models that ship, with their weights: the relative squared error of the noise prediction against full "
        "precision, over held-out trajectories. The suite's rows and those with w8a8 in their names are one method, "
        "rtn-mse; OpenVINO int8 is quantized by NNCF from the same calibration set. A rival is also compared with "
        "integer w8a8 in the same rounds (times as long as ours)."
    )
    heads = ["model", "kernel", "batch", "threads", "ms", "times fp32", "times as long as ours", "error"]
    return lines and f"{note}\n\n{Table(columns(*heads, texts=2), lines).markdown()}"


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
    """List the integer kernels that take longer than the best one in half precision, for steps and layers."""
    lines, compared = [], 0
    for names, group in frame.groupby(["part", "model", "layer", "batch", "threads"], sort=False):
        rows = {row["kernel"]: row for row in group.to_dict("records") if row["part"] != "peak" and row["ms"] > 0}
        half = min((rows[name]["ms"] for name in HALF if name in rows), default=math.nan)
        compared += not math.isnan(half)
        for kernel, row in rows.items():
            if kernel.startswith("integer") and row["ms"] > half:
                where = ", ".join(map(str, filter(None, names[1:3])))
                where += f", batch {names[3]}, {names[4]} threads, {kernel}"
                lines.append(f"- {where}: {row['ms']:.4g} ms, {half:.4g} in bf16")
    if not compared:
        return "Half precision was not measured; why not stands below."
    return "\n".join(lines) or "Nothing."


def _left_out(frame):
    reasons = defaultdict(Counter)  # reason -> rows of each kernel that it concerns
    for row in frame.to_dict("records"):
        if left_out(row):
            kernel = f"{row['kernel']} ({row['part']}s)" if row["part"] != "peak" else f"peak of {row['kernel']}"
            reasons[str(row["note"]).removeprefix("not measured: ")][kernel] += 1
    counts = {why: ", ".join(f"{name}: {count}" for name, count in kernels.items()) for why, kernels in reasons.items()}
    return "\n".join(f"- {kernels} — {why}" for why, kernels in counts.items())
