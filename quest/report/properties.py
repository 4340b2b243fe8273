"""Tidy tables of the three properties of quantized diffusion models that motivate QuEST (arXiv:2402.03666, section 3).

The properties are imbalanced activations, temporal information and uneven sensitivity. Scripts measure them on each
model; the tables add 95 % intervals over held-out trajectories. Needs no torch.
"""

import math

import pandas as pd

from quest.metrics.intervals import student

INTERVAL = ["value", "low", "high", "n"]
SENSITIVITY = ["model", "bits", "layer_class", "lowered", *INTERVAL, "layers", "parameters", "macs"]
TEMPORAL = ["model", "bits", "quantized", "ranges", *INTERVAL]
RANGE_KINDS = ("static", "one for each timestep")  # the two kinds of activation ranges
RANGES = ["model", "bits", "quantized", *INTERVAL]
EMBEDDINGS = ["model", "bits", "ranges", "timestep", "error", "apart", "apart_quantized", "nearest"]
ACTIVATIONS = ["model", "bits", "layer_class", "layers", "denoiser", "statistic", *INTERVAL, "note"]
CHANGES = ["model", "bits", "layer_class", "layers", "statistic", "denoiser", "against", *INTERVAL, "note"]
PAIRS = [("before finetuning", "full precision"), ("after finetuning", "before finetuning")]


def interval(values) -> dict[str, float]:
    """Return the columns INTERVAL for the mean of values, one for each trajectory."""
    return dict(zip(INTERVAL, (*student(values), len(values)), strict=True))


def sensitivity_frame(models: list[dict]) -> pd.DataFrame:
    """Return the noise-prediction error with one class of layers quantized at a time, columns SENSITIVITY."""
    rows = [{**_name(m), **row, **interval(row["errors"])} for m in models for row in m["rows"]]
    return pd.DataFrame(rows, columns=SENSITIVITY)


def temporal_frame(models: list[dict]) -> pd.DataFrame:
    """Return the noise-prediction error, columns TEMPORAL; `quantized` is the time-embedding path, the rest, or all."""
    rows = [{**_name(m), **row, **interval(row["errors"])} for m in models for row in m["errors"]]
    return pd.DataFrame(rows, columns=TEMPORAL)


def range_frame(models: list[dict]) -> pd.DataFrame:
    """Return the error with one range per timestep minus that with a static one, by trajectory, columns RANGES."""
    rows = []
    for m in models:
        static, timed = ({r["quantized"]: r["errors"] for r in m["errors"] if r["ranges"] == k} for k in RANGE_KINDS)
        for quantized in static:
            differences = [a - b for a, b in zip(timed[quantized], static[quantized], strict=True)]
            rows.append({**_name(m), "quantized": quantized, **interval(differences)})
    return pd.DataFrame(rows, columns=RANGES)


def embeddings_frame(models: list[dict]) -> pd.DataFrame:
    """Return how far quantization moves the embedding of each timestep, columns EMBEDDINGS.

    nearest: the timestep whose exact embedding is nearest to the quantized one.
    """
    rows = []
    for m in models:
        kinds: dict[str, dict[str, list]] = {}
        for row in m["distances"]:
            kinds.setdefault(row["ranges"], {})[row["what"]] = row["values"]
        for ranges, distances in kinds.items():
            for place, timestep in enumerate(m["timesteps"]):
                values = {name: distances[name][place] for name in ("error", "apart", "apart_quantized")}
                nearest = m["timesteps"][distances["nearest"][place]]
                rows.append({**_name(m), "ranges": ranges, "timestep": timestep, **values, "nearest": nearest})
    return pd.DataFrame(rows, columns=EMBEDDINGS)


def activation_frame(models: list[dict]) -> pd.DataFrame:
    """Return geometric means of the statistics of layers' inputs by class, columns ACTIVATIONS."""
    rows = [{**names, **_geometric(logarithms)} for _, names, logarithms in _statistics(models)]
    return pd.DataFrame(rows, columns=ACTIVATIONS)


def change_frame(models: list[dict]) -> pd.DataFrame:
    """Return the ratio of each statistic between two denoisers, paired by trajectory, columns CHANGES."""
    rows = []
    for m, names, logarithms in _statistics(models):
        for against in (b for a, b in PAIRS if a == names["denoiser"]):
            other = m["denoisers"][against][names["layer_class"]][names["statistic"]]
            differences = [a - b for a, b in zip(logarithms, other, strict=True)]
            rows.append({**names, "against": against, **_geometric(differences)})
    return pd.DataFrame(rows, columns=CHANGES)


def _statistics(models):
    """Yield (model, names, logarithms by trajectory) of every statistic."""
    for m in models:
        for denoiser, classes in m["denoisers"].items():
            for layer_class, statistics in classes.items():
                names = {**_name(m), "layer_class": layer_class, "layers": statistics["layers"], "denoiser": denoiser}
                reason = m.get("diverged", {}).get(denoiser)
                names["note"] = f"diverged; {reason}" if reason else ""
                for statistic in (key for key in statistics if key not in ("layers", "histogram")):
                    yield m, {**names, "statistic": statistic}, statistics[statistic]


def _geometric(logarithms):
    return {key: value if key == "n" else math.exp(value) for key, value in interval(logarithms).items()}


def _name(content):
    return {"model": content["model"], "bits": content["bits"]}
