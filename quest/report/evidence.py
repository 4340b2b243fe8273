"""The results of a run that answer the ten questions: read from its files, and turned into tidy rows with verdicts.

The verdicts are those of `quest.metrics.comparison`. This module needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import compare
from quest.metrics.comparison import Comparison
from quest.quantization.header import effort
from quest.report import tables
from quest.report.cells import read_cells
from quest.report.properties import interval
from quest.runtime.files import read_json

# What `workflow.scripts.tuning` measures of each variant, and what it is called.
TUNED = {
    "to_full_precision": "error against full precision",
    "to_noise": "error against the true noise",
    "log_latent_mse": "log10 latent MSE to FP",
}
# Training on data is compared with finetuning without: by the same loss, with losses of layers too, and by QuEST.
QAT_PAIRS = (("qat", "full-finetune-global"), ("qat", "full-finetune"), ("qat", "quest-suite"))


@dataclass
class Evidence:
    """The results of a run.

    cells: the content of metrics.json by row, for one model and bits. efforts: what quantizing each row took, see
    `quest.quantization.header.effort`. properties: the frames of quest.report.properties by name. tunings: the results
    of finetuning by variant.
    """

    model: str
    bits: str
    cells: dict[str, dict]
    efforts: dict[str, dict]
    properties: dict[str, pd.DataFrame]
    taylor: dict
    tunings: dict[str, dict]
    inference: dict
    signals: dict


def read(
    cells: Sequence[Path],
    properties: Sequence[Path] = (),
    taylor: Path | None = None,
    tunings: Sequence[Path] = (),
    inference: Path | None = None,
    signals: Path | None = None,
) -> Evidence:
    """Read the files that `snakemake questions` writes; the checkpoint in the folder of a cell tells its cost.

    `questions.findings` needs the cells alone.

    Raises ValueError for cells of several models or bits.
    """
    cell_of = {cell["method"]: cell for cell in read_cells(cells)}
    models = {(cell["model"], cell["bits"]) for cell in cell_of.values()}
    if len(models) != 1:
        raise ValueError(f"cells: of one model and bits, got {sorted(models)}")
    checkpoints = {row: Path(path).with_name("model.safetensors") for row, path in zip(cell_of, cells, strict=True)}
    return Evidence(
        *models.pop(),
        cell_of,
        {row: effort(checkpoint) for row, checkpoint in checkpoints.items() if checkpoint.exists()},
        {Path(file).stem: pd.read_csv(file) for file in properties},
        read_json(taylor) if taylor else {},
        {Path(file).stem: read_json(file) for file in tunings},
        read_json(inference) if inference else {},
        read_json(signals) if signals else {},
    )


def taylor_rows(evidence: Evidence) -> list[dict]:
    """Return tidy rows of taylor.json, with intervals over trajectories."""
    return [
        {"model": evidence.taylor["model"], "bits": row["bits"], "what": row["what"]} | interval(row["values"])
        for row in evidence.taylor["rows"]
    ]


def tunings_rows(evidence: Evidence) -> list[dict]:
    """Return tidy rows of every variant of finetuning: errors with intervals, and seconds."""
    return [
        {"model": tuning["model"], "bits": tuning["bits"], "variant": variant, "data": tuning["data"]}
        | {"recipe": json.dumps(tuning["recipe"]), "error": error, "seconds": tuning["seconds"]}
        | interval(tuning[error])
        | {"note": f"diverged; {tuning['diverged']}" if tuning.get("diverged") else ""}
        for variant, tuning in evidence.tunings.items()
        for error in TUNED
        if error in tuning
    ]


def qat_rows(evidence: Evidence) -> list[dict]:
    """Return the paired differences of QAT_PAIRS, for each quantization seed and error that was measured."""
    rows = []
    for at in dict.fromkeys("".join(variant.partition("@")[1:]) for variant in evidence.tunings):
        for method, versus in QAT_PAIRS:
            one, other = (evidence.tunings.get(name + at) for name in (method, versus))
            for error in TUNED if one and other else ():
                comparison = Comparison.of_pairs(one[error], other[error])
                names = {"model": one["model"], "bits": one["bits"], "seed": int(at[1:] or 0), "error": error}
                pair = {"method": method, "versus": versus, "value": float(np.mean(one[error]))}
                shown = {"n": comparison.n, "verdict": comparison.in_words(versus)}
                rows.append(names | pair | comparison.columns | shown)
    return rows


def inference_rows(evidence: Evidence) -> list[dict]:
    """Return rows with median seconds: of a call with all time groups, of a call with one group, and of the lookup.

    Each row also holds the paired difference of the two calls. If the method diverged, one row says why.
    """
    if reason := evidence.inference.get("diverged"):
        return [{"model": evidence.inference["model"], "groups": 0, "note": f"diverged; {reason}"}]
    rows = []
    for row in evidence.inference["rows"]:
        medians = {name: float(np.median(values)) for name, values in row["seconds"].items()}
        comparison = Comparison.of_pairs(row["seconds"]["time groups"], row["seconds"]["one group"])
        names = {"model": evidence.inference["model"], "groups": evidence.inference["groups"]}
        rows.append(names | {key: row[key] for key in ("kernel", "rows", "same_output")} | medians | comparison.columns)
    return rows


def comparisons_rows(evidence: Evidence) -> list[dict]:
    """Return the comparison of every row with the row "quest-suite", by metric: paired interval and verdict."""
    rows = []
    for row in (name for name in evidence.cells if name != "quest-suite" and "quest-suite" in evidence.cells):
        for metric, comparison in differences(evidence, row, "quest-suite").items():
            names = {"row": row, "against": "quest-suite", "metric": metric}
            rows.append(names | comparison.columns | {"verdict": comparison.in_words("quest-suite")})
    return rows


def differences(evidence: Evidence, row: str, versus: str) -> dict[str, Comparison] | None:
    """Return the comparison "row minus versus" for every metric of SHOWN, or None if one of the two has not run."""
    if row not in evidence.cells or versus not in evidence.cells:
        return None
    compared = compare(evidence.cells[row], evidence.cells[versus])
    return {name: compared[name] for name in tables.SHOWN if name in compared}
