"""The ledger: every published number beside ours, and whether the two may be compared at all.

`resources/published.csv` has one row per number. Its `protocol` says what the source says of how it was measured, as
"key=value; key=value"; what the source does not say is not there. A measured cell carries the same keys, its
fingerprint.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from quest.diffusion.models import MODELS, PREPARED, ZOO, Model
from quest.metrics import METRICS, weights
from quest.runtime.files import one_line, read_json, read_rows

PUBLISHED = Path(__file__).parents[2] / "resources" / "published.csv"
COLUMNS = ["source", "table", "model", "method", "bits", "metric", "value", "protocol", "note"]
LEDGER = ["source", "table", "model", "method", "bits", "metric", "published", "ours", "low", "high", "n"]
LEDGER += ["verdict", "why", "not_stated", "note"]
VERDICTS = ("PASS", "DRIFT", "NOT COMPARABLE", "INCONCLUSIVE", "NOT RUN")
PAPER = "arXiv:2402.03666v6"

# Relative difference within which a number counts as reproduced: CLIP scores of whole methods differ by less than 1 %.
TOLERANCE = {"clip": 0.002}
DEFAULT_TOLERANCE = 0.02
WIDE = 5  # an interval of more than this many tolerances to either side tells neither agreement nor drift

# What a metric depends on, beyond how images are made.
KEYS = ("weights", "sampler", "steps", "eta", "guidance", "n")
OF_METRIC = {
    "fid": ("extractor", "reference"),
    "sfid": ("extractor", "reference"),
    "is": ("extractor",),
    "clip": ("clip", "prompts"),
    "precision": ("extractor", "reference"),
    "fid_to_fp": ("extractor",),
}
# Distances of `adm` and `torch-fidelity` have the same pixels and the same network; only their Inception scores differ.
SAME_DISTANCE = {"adm": "inception, TensorFlow bilinear", "torch-fidelity": "inception, TensorFlow bilinear"}


def fingerprint(model: Model, images: str, n: int, reference_sha256: str = "") -> dict:
    """What a measured cell must share with another number to be comparable, fit for JSON.

    images: the evaluation images as `index_ranges` writes them. Unconditional models have no guidance, PLMS no eta;
    weights are hashed as they were published, of a shipped model its denoiser's file.
    """
    origin = _origin(model)
    found = {
        "model": model.name,
        "weights": origin["sha256"],
        "sampler": model.sampler,
        "steps": model.steps,
        "eta": None if model.sampler == "plms" else model.eta,
        "guidance": None if model.conditioning == "none" else model.guidance,
        "n": n,
        "seeds": f"evaluation {images}",
        "extractor": model.extractor,
        "extractor_sha256": weights.sha256(model.extractor),
        "clip": model.clip,
        "clip_sha256": weights.sha256(model.clip),
        "prompts": (origin.get("captions") or {}).get("sha256"),
        "reference": reference_sha256 or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _origin(model):
    if model.origin is None:
        return {"sha256": weights.sha256_of(ZOO / model.name / "unet" / "diffusion_pytorch_model.safetensors")}
    path = PREPARED / model.name / "origin.json"
    found = read_json(path)
    hashes = [found.get("sha256"), (found.get("captions") or {}).get("sha256", "0" * 64)] if _mapping(found) else [None]
    if not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
        raise ValueError(f"{path}: sha256 of the weights, and of captions where there are any, must be 64 digits each")
    return found


def _mapping(found):
    return isinstance(found, dict) and isinstance(found.get("captions") or {}, dict)


def published(path: str | Path = PUBLISHED) -> pd.DataFrame:
    """The published numbers, columns COLUMNS; `value` is NaN where the source has none (a failed generation).

    Raises ValueError, naming file and row, for missing columns, a value that is no number, or a number that is there
    twice.
    """
    frame = pd.DataFrame(read_rows(path, COLUMNS), columns=COLUMNS, dtype=str)
    for line, row in enumerate(frame.itertuples(), start=2):
        try:
            if row.value and not math.isfinite(float(row.value)):
                raise ValueError(f"value {row.value}; needed: a finite number, or nothing")
            protocol_says(row.protocol)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {one_line(error)}") from None
    keys = [column for column in COLUMNS if column not in ("value", "note")]
    if (repeated := frame.duplicated(keys)).any():
        raise ValueError(f"{path}, line {repeated.idxmax() + 2}: this number is there twice")
    frame["value"] = [float(value or "nan") for value in frame["value"]]
    return frame


def protocol_says(protocol: str) -> dict[str, str]:
    """What a protocol says, by key."""
    stated = {}
    for part in filter(None, protocol.split("; ")):
        key, equals, value = part.partition("=")
        if not equals or not value or key in stated:
            raise ValueError(f"protocol {protocol!r}: write it as key=value; key=value, each key once")
        stated[key] = value
    return stated


def ledger(cells: Sequence[dict], numbers: pd.DataFrame) -> pd.DataFrame:
    """Published numbers of the suite's models and metrics beside measured cells (metrics.json), columns LEDGER.

    Models drawn by the suite itself are left out, as nothing is published of them. A verdict is one of VERDICTS:

    - PASS: within TOLERANCE of the published value, or the published value lies in our interval.
    - DRIFT: neither.
    - NOT COMPARABLE: the protocols differ (`why` says in what), or the source has no number there.
    - INCONCLUSIVE: our interval is so wide that being in it says nothing.
    - NOT RUN: nothing measured.

    `not_stated` lists what the metric depends on and the source does not say; the verdict stands in spite of it.
    """
    measured = {(cell["model"], cell["method"], cell["bits"]): cell for cell in cells}
    rows = []
    for number in numbers.itertuples():
        model = MODELS.get(number.model)
        if model is None or model.extractor == "scenes" or number.metric not in METRICS:
            continue
        cell = measured.get((number.model, number.method, number.bits))
        ours = next((row for row in cell["rows"] if row["metric"] == number.metric), None) if cell else None
        verdict, why = _verdict(number, cell, ours)
        stated = protocol_says(number.protocol)
        needed = [key for key in (*KEYS, *OF_METRIC.get(number.metric, ())) if _applies(key, model)]
        rows.append(
            {key: getattr(number, key) for key in ("source", "table", "model", "method", "bits", "metric")}
            | {"published": number.value}
            | {key: ours[key] if ours else math.nan for key in ("low", "high", "n")}
            | {"ours": ours["value"] if ours else math.nan, "verdict": verdict, "why": why}
            | {"not_stated": ", ".join(key for key in needed if key not in stated), "note": number.note}
        )
    return pd.DataFrame(rows, columns=LEDGER)


def _applies(key, model):
    return not (key == "eta" and model.sampler == "plms" or key == "guidance" and model.conditioning == "none")


def _verdict(number, cell, ours):
    if ours is None:
        return "NOT RUN", "" if cell is None else f"the cell has no {number.metric}"
    if math.isnan(number.value):
        return "NOT COMPARABLE", "the source has no number here"
    differences = _differences(number, cell["fingerprint"])
    if differences:
        return "NOT COMPARABLE", "; ".join(differences)
    value, low, high = ours["value"], ours["low"], ours["high"]
    if not all(map(math.isfinite, (value, low, high))):
        return "DRIFT", "ours is not finite"
    tolerance = TOLERANCE.get(number.metric, DEFAULT_TOLERANCE)
    difference, half = value / number.value - 1, (high - low) / 2 / abs(number.value)
    told = f"{difference:+.1%} ± {half:.1%}"
    if abs(difference) > tolerance and not low <= number.value <= high:
        return "DRIFT", told
    if half > WIDE * tolerance:
        return "INCONCLUSIVE", f"{told}, needs ± {WIDE * tolerance:.1%} or less"
    return "PASS", told


def _differences(number, fingerprint) -> list[str]:
    """Where what the source states differs from a cell, as "key: ours here, theirs in the source"."""
    found = []
    of_metric = OF_METRIC.get(number.metric, ())
    for key, stated in protocol_says(number.protocol).items():
        if key in ("extractor", "clip", "prompts", "reference") and key not in of_metric:
            continue
        if key in ("prompts", "reference"):  # named there, hashed here: they cannot be compared
            continue
        ours = fingerprint.get(key)
        if ours is None or not _equal(number.metric, key, ours, stated):
            found.append(f"{key}: {'none' if ours is None else ours} here, {stated} in the source")
    return found


def _equal(metric, key, ours, stated):
    if key == "extractor" and metric != "is":
        return SAME_DISTANCE.get(ours, ours) == SAME_DISTANCE.get(stated, stated)
    try:
        return math.isclose(float(ours), float(stated))
    except ValueError:
        return str(ours) == stated


def beside(numbers: pd.DataFrame) -> dict[tuple[str, str, str, str], float]:
    """The paper's own numbers by (model, method, bits, metric), from its tables of results: what main tables print.

    Where several tables have a cell, the first one of Tables 3, 4, 5, 9, 10 and 11.
    """
    tables = ["Table 3", "Table 4", "Table 5", "Table 9", "Table 10", "Table 11"]
    own = numbers[(numbers["source"] == PAPER) & numbers["table"].isin(tables) & numbers["value"].notna()]
    own = own.assign(order=own["table"].map(tables.index)).sort_values("order", ascending=False, kind="stable")
    return {(row.model, row.method, row.bits, row.metric): row.value for row in own.itertuples()}
