"""What a run has found that the ten questions ask of: read from its files, as tidy tables, and judged.

Verdicts are those of `quest.metrics.comparison`. Needs no torch.
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
from quest.report.properties import interval
from quest.runtime.files import read_json

SHOWN = ("latent_mse", "fid_to_fp", "eps_error")  # what sees most with few images


@dataclass
class Evidence:
    """What a run has found.

    cells: metrics.json of the rows of one model and bits, by row. made: what making each took, see `Effort`.
    properties: frames of quest.properties by name. tunings: by variant.
    """

    model: str
    bits: str
    cells: dict[str, dict]
    made: dict[str, dict]
    properties: dict[str, pd.DataFrame]
    taylor: dict
    tunings: dict[str, dict]
    inference: dict
    signals: dict


def read(
    properties: Sequence[Path],
    cells: Sequence[Path],
    taylor: Path,
    tunings: Sequence[Path],
    inference: Path,
    signals: Path,
) -> Evidence:
    """Evidence from the files that the rules of `snakemake questions` write; a checkpoint beside a cell tells its cost.

    Raises ValueError for cells of several models or bits.
    """
    found = {cell["method"]: cell for cell in tables.read(cells)}
    about = {(cell["model"], cell["bits"]) for cell in found.values()}
    if len(about) != 1:
        raise ValueError(f"cells: of one model and bits, got {sorted(about)}")
    ((model, bits),) = about
    checkpoints = {row: Path(path).with_name("model.safetensors") for row, path in zip(found, cells, strict=True)}
    made = {row: effort(checkpoint) for row, checkpoint in checkpoints.items() if checkpoint.exists()}
    return Evidence(
        model,
        bits,
        found,
        made,
        {Path(file).stem: pd.read_csv(file) for file in properties},
        read_json(taylor),
        {Path(file).stem: read_json(file) for file in tunings},
        read_json(inference),
        read_json(signals),
    )


def taylor_rows(evidence: Evidence) -> list[dict]:
    """Tidy rows of taylor.json, with intervals over trajectories."""
    return [
        {"model": evidence.taylor["model"], "bits": row["bits"], "what": row["what"]} | interval(row["values"])
        for row in evidence.taylor["rows"]
    ]


def tunings_rows(evidence: Evidence) -> list[dict]:
    """Tidy rows of every variant of finetuning: errors with intervals, seconds."""
    return [
        {"model": found["model"], "bits": found["bits"], "variant": variant, "data": found["data"]}
        | {"recipe": json.dumps(found["recipe"]), "error": error, "seconds": found["seconds"]}
        | interval(found[error])
        for variant, found in evidence.tunings.items()
        for error in ("to_full_precision", "to_noise")
    ]


def inference_rows(evidence: Evidence) -> list[dict]:
    """Median seconds of a call with all time groups, with one, and of the lookup; the paired difference of the two."""
    rows = []
    for row in evidence.inference["rows"]:
        medians = {name: float(np.median(values)) for name, values in row["seconds"].items()}
        found = Comparison.of_pairs(row["seconds"]["time groups"], row["seconds"]["one group"])
        names = {"model": evidence.inference["model"], "groups": evidence.inference["groups"]}
        rows.append(names | {key: row[key] for key in ("kernel", "rows", "same_output")} | medians | found.columns)
    return rows


def comparisons_rows(evidence: Evidence) -> list[dict]:
    """Every row of the model and bits against the preset, with the paired interval and the verdict."""
    rows = []
    for row in (name for name in evidence.cells if name != "quest" and "quest" in evidence.cells):
        for metric, found in differences(evidence, row, "quest").items():
            names = {"row": row, "against": "quest", "metric": metric}
            rows.append(names | found.columns | {"verdict": found.told("quest")})
    return rows


def differences(evidence: Evidence, row: str, versus: str) -> dict[str, Comparison] | None:
    """Row minus versus in every metric of SHOWN; None where one of the two has not run."""
    if row not in evidence.cells or versus not in evidence.cells:
        return None
    compared = compare(evidence.cells[row], evidence.cells[versus])
    return {name: compared[name] for name in SHOWN if name in compared}
