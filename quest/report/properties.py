"""The three properties of quantized diffusion models that QuEST (arXiv:2402.03666) starts from, as tidy tables.

Imbalanced activations, temporal information, uneven sensitivity: what the scripts of these names measured on each
model, with 95 % intervals over held-out trajectories. Needs no torch.
"""

import math

import pandas as pd

from quest.metrics.intervals import student

INTERVAL = ["value", "low", "high", "n"]
SENSITIVITY = ["model", "bits", "layer_class", "lowered", *INTERVAL, "layers", "parameters", "macs"]
TEMPORAL = ["model", "bits", "quantized", "ranges", *INTERVAL]
RANGE_KINDS = ("static", "one for each timestep")  # of activation ranges
RANGES = ["model", "bits", "quantized", *INTERVAL]
EMBEDDINGS = ["model", "bits", "ranges", "timestep", "error", "apart", "apart_quantized", "nearest"]
ACTIVATIONS = ["model", "bits", "layer_class", "layers", "denoiser", "statistic", *INTERVAL]
CHANGES = ["model", "bits", "layer_class", "layers", "statistic", "denoiser", "against", *INTERVAL]
PAIRS = [("before finetuning", "full precision"), ("after finetuning", "before finetuning")]


def interval(values) -> dict[str, float]:
    """Columns INTERVAL of a mean over trajectories."""
    return dict(zip(INTERVAL, (*student(values), len(values)), strict=True))


def sensitivity_frame(models: list[dict]) -> pd.DataFrame:
    """Noise-prediction error with one class of layers quantized at a time, columns SENSITIVITY."""
    rows = [{**_name(m), **row, **interval(row["errors"])} for m in models for row in m["rows"]]
    return pd.DataFrame(rows, columns=SENSITIVITY)


def temporal_frame(models: list[dict]) -> pd.DataFrame:
    """Noise-prediction error with the time-embedding path, all else, or all quantized, columns TEMPORAL."""
    rows = [{**_name(m), **row, **interval(row["errors"])} for m in models for row in m["errors"]]
    return pd.DataFrame(rows, columns=TEMPORAL)


def range_frame(models: list[dict]) -> pd.DataFrame:
    """What one range for each timestep changes against a static one, paired by trajectory, columns RANGES."""
    rows = []
    for m in models:
        static, timed = ({r["quantized"]: r["errors"] for r in m["errors"] if r["ranges"] == k} for k in RANGE_KINDS)
        for quantized in static:
            differences = [a - b for a, b in zip(timed[quantized], static[quantized], strict=True)]
            rows.append({**_name(m), "quantized": quantized, **interval(differences)})
    return pd.DataFrame(rows, columns=RANGES)


def embeddings_frame(models: list[dict]) -> pd.DataFrame:
    """How far the embedding of each timestep moves, columns EMBEDDINGS; `nearest` is the timestep it now looks like."""
    rows = []
    for m in models:
        kinds: dict[str, dict[str, list]] = {}
        for row in m["distances"]:
            kinds.setdefault(row["ranges"], {})[row["what"]] = row["values"]
        for ranges, found in kinds.items():
            for place, timestep in enumerate(m["timesteps"]):
                values = {what: found[what][place] for what in ("error", "apart", "apart_quantized")}
                nearest = m["timesteps"][found["nearest"][place]]
                rows.append({**_name(m), "ranges": ranges, "timestep": timestep, **values, "nearest": nearest})
    return pd.DataFrame(rows, columns=EMBEDDINGS)


def activation_frame(models: list[dict]) -> pd.DataFrame:
    """Geometric means of the statistics of layers' inputs by class, columns ACTIVATIONS."""
    rows = []
    for m, denoiser, layer_class, found, statistic in _statistics(models):
        value = {k: v if k == "n" else math.exp(v) for k, v in interval(found[statistic]).items()}
        names = {"layer_class": layer_class, "layers": found["layers"], "denoiser": denoiser, "statistic": statistic}
        rows.append({**_name(m), **names, **value})
    return pd.DataFrame(rows, columns=ACTIVATIONS)


def change_frame(models: list[dict]) -> pd.DataFrame:
    """By what the statistics are multiplied from one denoiser to another, paired by trajectory, columns CHANGES."""
    rows = []
    for m, denoiser, layer_class, found, statistic in _statistics(models):
        for against in (b for a, b in PAIRS if a == denoiser):
            other = m["denoisers"][against][layer_class][statistic]
            differences = [a - b for a, b in zip(found[statistic], other, strict=True)]
            value = {k: v if k == "n" else math.exp(v) for k, v in interval(differences).items()}
            names = {"layer_class": layer_class, "layers": found["layers"], "statistic": statistic}
            rows.append({**_name(m), **names, "denoiser": denoiser, "against": against, **value})
    return pd.DataFrame(rows, columns=CHANGES)


def _statistics(models):
    for m in models:
        for denoiser, classes in m["denoisers"].items():
            for layer_class, found in classes.items():
                for statistic in (key for key in found if key not in ("layers", "histogram")):
                    yield m, denoiser, layer_class, found, statistic


def _name(content):
    return {"model": content["model"], "bits": content["bits"]}
