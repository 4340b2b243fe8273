"""What a run has found that the ten questions ask of: read from its files, as tidy tables, and judged.

"Better" and "worse" stand only where the paired 95 % interval of the difference excludes zero; else two rows are "not
told apart". Needs no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from quest.metrics import METRICS, compare
from quest.metrics.intervals import student
from quest.report import tables
from quest.report.effort import effort
from quest.report.properties import interval

SHOWN = ("latent_mse", "fid_to_fp", "eps_error")  # what sees most with few images
APART = "not told apart"


@dataclass
class Evidence:
    """What a run has found.

    cells: metrics.json of the rows of one model and bits, by row. made: what making each took, see quest.report.effort.
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
        json.loads(Path(taylor).read_text()),
        {Path(file).stem: json.loads(Path(file).read_text()) for file in tunings},
        json.loads(Path(inference).read_text()),
        json.loads(Path(signals).read_text()),
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
        difference = np.subtract(row["seconds"]["time groups"], row["seconds"]["one group"])
        spread = dict(zip(("difference", "low", "high"), student(difference), strict=True))
        names = {"model": evidence.inference["model"], "groups": evidence.inference["groups"]}
        rows.append(names | {key: row[key] for key in ("kernel", "rows", "same_output")} | medians | spread)
    return rows


def comparisons_rows(evidence: Evidence) -> list[dict]:
    """Every row of the model and bits against the preset, with the paired interval and the verdict."""
    rows = []
    for row in (name for name in evidence.cells if name != "quest" and "quest" in evidence.cells):
        for metric, (difference, half, word) in differences(evidence, row, "quest").items():
            values = {"difference": difference, "low": difference - half, "high": difference + half, "verdict": word}
            rows.append({"row": row, "against": "quest", "metric": metric} | values)
    return rows


def verdict(low: float, high: float, better: str = "lower") -> str:
    """ "better", "worse" or "not told apart" of a difference with this interval; better: "lower" or "higher"."""
    if not (low > 0 or high < 0):
        return APART
    return "better" if (high < 0) == (better == "lower") else "worse"


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, str]:
    """Mean difference of paired values, half of its 95 % interval, and the verdict where lower is better."""
    return judged(*student([a - b for a, b in zip(values, others, strict=True)]))


def judged(mean: float, low: float, high: float, better: str = "lower") -> tuple[float, float, str]:
    """A difference, half of its interval, and the verdict."""
    return mean, (high - low) / 2, verdict(low, high, better)


def differences(evidence: Evidence, row: str, versus: str) -> dict[str, tuple[float, float, str]] | None:
    """Of every metric in SHOWN: row minus versus, half of its interval, verdict; None where one of them has not run."""
    if row not in evidence.cells or versus not in evidence.cells:
        return None
    found = {r["metric"]: r for r in compare(evidence.cells[row], evidence.cells[versus])}
    return {
        name: judged(r["difference"], r["low"], r["high"], METRICS[name].better)
        for name in SHOWN
        if (r := found.get(name))
    }
