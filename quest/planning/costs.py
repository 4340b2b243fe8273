"""The table of measured costs, `resources/costs.csv`: seconds and memory of the steps of a run, by model and machine.

`python -m quest measure` and `rehearse` add rows; `python -m quest plan` multiplies them by how often a config takes
each step. On a CPU, seconds are processor time of one thread, which other processes hardly change.
"""

import math
from collections import Counter
from pathlib import Path

from baselines import METHODS
from quest.runtime.files import one_line, read_rows, write_rows

COSTS = Path(__file__).parents[2] / "resources" / "costs.csv"
# Steps that only some methods take.
STEPS = {what: step for method in METHODS.values() for what, step in method.steps.items()}
ONE_THREAD = ", one thread"  # the end of a processor's name
COLUMNS = ["model", "machine", "what", "value", "unit", "batch", "weights", "how", "date"]
# How a value was found, as a row says.
MEASURED = "measured"
SCALED = "of the unit with the most work; scaled to all by weights and multiply-accumulates"
SAMPLED = "of every 16th layer by size; scaled to all by weights"
# What costs seconds. A step is a fixed cost and, under "... row", a cost per row of the calibration set or mini-batch.
SECONDS = {
    "call": "seconds per sample of one denoiser call, full precision",
    "quantized call": "the same with fake quantization",
    "weight ranges": "seconds of the MSE search of every weight's range",
    "ranges": "seconds of the MSE search of every activation's range, of one time group",
    "ranges row": "seconds",
    "threshold search": "seconds of the released PTQ4DM",
    "threshold search row": "seconds",
    "gptq": "seconds of weight ranges and of rounding every layer by GPTQ",
    "gptq row": "seconds of one row through full precision and in every Hessian",
    "svdquant": "seconds of one candidate of SVDQuant in every layer",
    "svdquant row": "seconds",
    "rounding": "seconds of one AdaRound iteration in every unit",
    "rounding row": "seconds",
    "step learning": "seconds of one iteration in every unit that learns activation steps",
    "step learning row": "seconds",
    **{what: "seconds of one iteration" for what in STEPS},
    **{f"{what} row": "seconds" for what, step in STEPS.items() if step.rows is None},
    "decode": "seconds per image",
    "features": "seconds per image",
    "start": "seconds until a process has imported and loaded what it needs",
    "copy": "seconds to copy 1 GB of memory",
}
HELD = [what for what in SECONDS if what not in ("start", "copy") and not what.endswith(" row")]
WHAT = SECONDS | {f"memory of {what}": "MB at most beside its rows, of the GPU or else resident" for what in HELD}
FIXED = {"weight ranges"} | {what for what, step in STEPS.items() if step.rows is not None}  # whose rows never change
WHAT |= {f"memory of {what} row": "MB per row, sample or image" for what in HELD if what not in FIXED}
WHAT |= {"memory": "MB at most that were in use while all this was measured"}


def read(path: Path = COSTS) -> list[dict]:
    """Rows of the measured costs. Raises ValueError, naming file and line, for one that is malformed."""
    rows = read_rows(path, COLUMNS)
    for line, row in enumerate(rows, start=2):
        if row["what"] not in WHAT:
            raise ValueError(f"{path}, line {line}: {one_line(repr(row['what']))} is not one of {', '.join(WHAT)}")
        if empty := [column for column in COLUMNS if not row[column]]:
            raise ValueError(f"{path}, line {line}: {empty[0]} is missing")
        try:
            row["value"], _ = float(row["value"]), int(row["batch"])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {one_line(error)}") from None
        if not 0 <= row["value"] < math.inf:
            raise ValueError(f"{path}, line {line}: value {row['value']}; needed: a finite number from 0 on")
    return rows


def record(rows: list[dict], path: Path = COSTS) -> None:
    """Add rows to the measured costs. They replace rows of the same model, machine and kind."""

    def key(row):
        return row["model"], row["machine"], row["what"]

    new = {key(row) for row in rows}
    kept = [row for row in read(path) if key(row) not in new] if path.is_file() else []
    write_rows(path, kept + rows, COLUMNS)


def with_stand_ins(rows: list[dict], machine: str) -> list[dict]:
    """The rows, and for what was not measured on a processor those of another one, as rows of it.

    machine: a name as `machine` gives it; for a GPU no other machine stands in. Of several others the one with the most
    rows of the model comes first. A row that stands in has the other's name under "elsewhere".
    """
    if not machine.endswith(ONE_THREAD):
        return rows
    others = [row for row in rows if row["machine"].endswith(ONE_THREAD) and row["machine"] != machine]
    number = Counter((row["model"], row["machine"]) for row in others)
    here = {(row["model"], row["what"]): row for row in rows if row["machine"] == machine}
    for row in sorted(others, key=lambda row: -number[row["model"], row["machine"]]):
        here.setdefault((row["model"], row["what"]), row | {"machine": machine, "elsewhere": row["machine"]})
    return [row for row in rows if row["machine"] != machine] + list(here.values())


def machine(device: str) -> str:
    """Name of the GPU or processor, as in `resources/costs.csv`. Jobs on a CPU have one thread."""
    import torch

    from quest.runtime.provenance import provenance

    if device == "cuda":
        return torch.cuda.get_device_name()
    return provenance()["machine"]["cpu"] + ONE_THREAD
