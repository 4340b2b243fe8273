"""The ledger compares every published number with ours, and says whether the two may be compared.

`resources/published.csv` has one row per number. Its column `protocol` holds what the source states about the
measurement, as "key=value; key=value", for example "sampler=ddim; steps=200". A measured cell has a fingerprint with
the same keys. If a stated value differs from the fingerprint, the two numbers are not comparable.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from quest.diffusion.denoisers import NAMES
from quest.diffusion.models import MODELS, PREPARED, Model
from quest.metrics import METRICS, RESIZE, weights
from quest.runtime.files import one_line, read_json, read_rows

PUBLISHED = Path(__file__).parents[2] / "resources" / "published.csv"
COLUMNS = ["source", "table", "model", "method", "bits", "metric", "value", "protocol", "note"]
LEDGER = ["source", "table", "model", "method", "bits", "metric", "published", "ours", "low", "high", "n"]
LEDGER += ["verdict", "why", "not_stated", "note"]
VERDICTS = ("PASS", "DRIFT", "NOT COMPARABLE", "INCONCLUSIVE", "NOT RUN")
PAPER = "arXiv:2402.03666v6"
# The rows here that stand for a published method; the ledger takes the first one that was run.
ROWS = {"quest": ("quest-official", "quest-paper", "quest-suite")}

# A number is reproduced if the relative difference is within the tolerance. That of CLIP scores is small, because the
# scores of different methods differ by less than 1 %.
TOLERANCE = {"clip": 0.002}
DEFAULT_TOLERANCE = 0.02
WIDE = 5  # an interval with a half width of more than this many tolerances cannot decide between PASS and DRIFT

KEYS = ("weights", "sampler", "steps", "eta", "guidance", "n")  # every metric depends on these
OF_NETWORK = {"extractor": ("extractor",), "clip": ("clip", "prompts"), None: ()}  # and on those of its network
# `adm` and `torch-fidelity` use the same pixels and the same network for distances; only their Inception scores differ.
SAME_DISTANCE = {"adm": "inception, TensorFlow bilinear", "torch-fidelity": "inception, TensorFlow bilinear"}


def fingerprint(model: Model, images: str, n: int, reference_sha256: str = "") -> dict:
    """Return, for JSON, the facts that two numbers must share to be comparable.

    images: the evaluation images as `index_ranges` writes them. `weights` is the hash of the published file, or of the
    denoiser's file for a shipped model. Unconditional models have no guidance and PLMS has no eta. Raises ValueError
    for an origin.json without valid hashes.
    """
    origin = _origin(model)
    facts = {
        "model": model.name,
        "weights": origin["sha256"],
        "sampler": model.sampler,
        "steps": model.steps,
        "eta": model.eta if model.has_eta else None,
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
    return {key: value for key, value in facts.items() if value is not None}


def _origin(model):
    if model.ships:
        part = next((name for name in NAMES if (model.folder / name).is_dir()), NAMES[0])
        return {"sha256": weights.sha256_of(model.folder / part / "diffusion_pytorch_model.safetensors")}
    path = PREPARED / model.name / "origin.json"
    origin = read_json(path)
    hashes = [None]
    if isinstance(origin, dict) and isinstance(captions := origin.get("captions") or {}, dict):
        hashes = [origin.get("sha256"), captions.get("sha256", "0" * 64)]
    if not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
        raise ValueError(f"{path}: sha256 of the weights, and of captions where there are any, must be 64 digits each")
    return origin


def published(path: str | Path = PUBLISHED) -> pd.DataFrame:
    """Read the published numbers, columns COLUMNS; `value` is NaN if the source has none (a failed generation).

    Raises ValueError, which names file and line, for other columns, a value that is no number, a protocol of another
    form, or a number that occurs twice.
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
    """Parse "key=value; key=value". Raises ValueError for another form or a repeated key."""
    stated = {}
    for part in filter(None, protocol.split("; ")):
        key, equals, value = part.partition("=")
        if not equals or not value or key in stated:
            raise ValueError(f"protocol {protocol!r}: write it as key=value; key=value, each key once")
        stated[key] = value
    return stated


def ledger(cells: Sequence[dict], numbers: pd.DataFrame) -> pd.DataFrame:
    """Compare the published numbers with measured cells (metrics.json), columns LEDGER.

    cells: see `quest.report.cells.read_cells`. numbers: see `published`. Numbers of unknown models and metrics
    are left out. The verdict is one of VERDICTS:

    - PASS: our value is within TOLERANCE of the published one, or the published one lies in our interval.
    - DRIFT: neither is true.
    - NOT COMPARABLE: the protocols differ (`why` says how), or the source has no number.
    - INCONCLUSIVE: our interval is so wide that it would contain almost any number.
    - NOT RUN: nothing was measured.

    `not_stated` lists the facts that the metric depends on and the source does not state; they change no verdict.
    """
    measured = {(cell["model"], cell["method"], cell["bits"]): cell for cell in cells}
    rows = []
    for number in numbers.itertuples():
        model = MODELS.get(number.model)
        if model is None or model.extractor not in RESIZE or number.metric not in METRICS:
            continue
        rows_here = [(number.model, row, number.bits) for row in ROWS.get(number.method, (number.method,))]
        cell = next((measured[key] for key in rows_here if key in measured), None)
        ours = next((row for row in cell["rows"] if row["metric"] == number.metric), None) if cell else None
        verdict, why = _verdict(number, cell, ours)
        stated = protocol_says(number.protocol)
        missing = {"eta": not model.has_eta, "guidance": model.conditioning == "none"}
        needed = [key for key in (*KEYS, *_of_metric(number.metric)) if not missing.get(key)]
        rows.append(
            {key: getattr(number, key) for key in ("source", "table", "model", "bits", "metric")}
            | {"method": cell["method"] if cell else number.method, "published": number.value}
            | {key: ours[key] if ours else math.nan for key in ("low", "high", "n")}
            | {"ours": ours["value"] if ours else math.nan, "verdict": verdict, "why": why}
            | {"not_stated": ", ".join(key for key in needed if key not in stated), "note": number.note}
        )
    return pd.DataFrame(rows, columns=LEDGER)


def _of_metric(name):
    """The facts on which this metric depends beside KEYS."""
    return (*OF_NETWORK[METRICS[name].network], *(("reference",) if METRICS[name].real else ()))


def _verdict(number, cell, ours):
    if ours is None:
        return "NOT RUN", "" if cell is None else f"the cell has no {number.metric}"
    if math.isnan(number.value):
        return "NOT COMPARABLE", "the source has no number here"
    differences = _differences(number, cell.get("fingerprint", {}))
    if differences:
        return "NOT COMPARABLE", "; ".join(differences)
    value, low, high = ours["value"], ours["low"], ours["high"]
    if not all(map(math.isfinite, (value, low, high))):
        return "DRIFT", "ours is not finite"
    tolerance = TOLERANCE.get(number.metric, DEFAULT_TOLERANCE)
    difference, half = value / number.value - 1, (high - low) / 2 / abs(number.value)
    text = f"{difference:+.1%} ± {half:.1%}"
    if abs(difference) > tolerance and not low <= number.value <= high:
        return "DRIFT", text
    if half > WIDE * tolerance:
        return "INCONCLUSIVE", f"{text}, needs ± {WIDE * tolerance:.1%} or less"
    return "PASS", text


def _differences(number, fingerprint) -> list[str]:
    """List the stated facts that differ from those of a cell, as "key: ours here, theirs in the source"."""
    differences = []
    of_metric = _of_metric(number.metric)
    for key, stated in protocol_says(number.protocol).items():
        if key in ("prompts", "reference"):  # the source states a name and the cell a hash
            continue
        if key in ("extractor", "clip") and key not in of_metric:
            continue
        ours = fingerprint.get(key)
        if ours is None or not _equal(number.metric, key, ours, stated):
            differences.append(f"{key}: {'none' if ours is None else ours} here, {stated} in the source")
    return differences


def _equal(metric, key, ours, stated):
    if key == "extractor" and metric != "is":
        return SAME_DISTANCE.get(ours, ours) == SAME_DISTANCE.get(stated, stated)
    try:
        return math.isclose(float(ours), float(stated))
    except ValueError:
        return str(ours) == stated


def beside(numbers: pd.DataFrame) -> dict[tuple[str, str, str, str], float]:
    """Return the paper's own results by (model, method, bits, metric), which the main tables show beside ours.

    If several tables have the same cell, the first one of Tables 3, 4, 5, 9, 10 and 11 counts.
    """
    tables = ["Table 3", "Table 4", "Table 5", "Table 9", "Table 10", "Table 11"]
    results = numbers[(numbers["source"] == PAPER) & numbers["table"].isin(tables) & numbers["value"].notna()]
    results = results.assign(order=results["table"].map(tables.index))
    results = results.sort_values("order", ascending=False, kind="stable")
    return {
        (row.model, method, row.bits, row.metric): row.value
        for row in results.itertuples()
        for method in ROWS.get(row.method, (row.method,))
    }
