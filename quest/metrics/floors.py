"""The floor of a metric: how far full precision is from itself when it is sampled in another way. Imports no torch.

Full precision in other batches, on another number of threads, on other instruction sets or in bf16 is still full
precision. Two methods whose errors differ by less than that cannot be ranked by this metric. `snakemake nulls` measures
floors, one for each model and metric.
"""

from collections.abc import Mapping
from dataclasses import replace

from quest.metrics.comparison import BELOW, BEYOND, Comparison

FULL_PRECISION = "fp"


def linear(metric: str, value: float) -> float:
    """The value of a paired metric as an error in which errors add up, as mean squares do; a logarithm is undone.

    >>> round(linear("psnr", 20.0), 3), round(linear("log_latent_mse", -2.0), 3), linear("latent_mse", 0.3)
    (0.01, 0.01, 0.3)
    """
    if metric == "psnr":
        return 10 ** (-value / 10)  # as a share of the square of the largest pixel
    return 10**value if metric == "log_latent_mse" else value


def apart(metric: str, first: float, second: float) -> float:
    """How far two values of a metric are from each other, in the units of its floor."""
    return abs(linear(metric, first) - linear(metric, second))


def doubted(found: Comparison, metric: str, values: tuple[float, float], cells: tuple[Mapping, Mapping]) -> Comparison:
    """Return the comparison of two cells in one metric, with its doubt if there is one.

    values: those of the two. cells: metrics.json of both; `method` and `floors` ({metric: error}) may be missing.
    """
    if found.verdict not in ("better", "worse"):
        return found
    loser = 1 if found.verdict == "better" else 0
    if cells[loser].get("method") == FULL_PRECISION:
        return replace(found, doubt=BEYOND)
    floor = max(cell.get("floors", {}).get(metric, 0.0) for cell in cells)
    return replace(found, doubt=BELOW) if apart(metric, *values) < floor else found


def both_beyond(found: Comparison, values: tuple[float, float], full: float) -> Comparison:
    """Return the comparison of two methods, doubted where both have better values than full precision has, `full`."""
    sign = 1 if found.direction == "lower" else -1
    if found.verdict in ("better", "worse") and all(sign * value < sign * full for value in values):
        return replace(found, doubt=f"both {BEYOND}")
    return found
