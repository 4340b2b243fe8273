"""The log of `snakemake search`, and what it found: did a recipe beat the one that ships by more than seeds differ?"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from quest.report import rendering
from quest.report.rendering import Cell, Column, Table, columns, number
from quest.runtime.files import loads, read_rows

KEYS = ("model", "method", "bits", "seed", "recipe", "settings")  # what a trial is known by
COLUMNS = (*KEYS, "guided_eps_error", "deviation", "eps_error", "latent_mse")
COLUMNS += ("seconds", "note", "commit", "machine", "isa", "date")


def read(path: str | Path) -> list[dict]:
    """The lines of a log; none where there is no file. Raises ValueError that names a file with other columns."""
    return read_rows(path, COLUMNS) if Path(path).exists() else []


def write(path: str | Path, lines: Sequence[dict]) -> None:
    """Write a log, all at once or not at all."""
    rows = [[str(line[name]) for name in COLUMNS] for line in lines]
    rendering.write(path, Table(columns(*COLUMNS, texts=len(COLUMNS)), rows))


def objective(line: dict) -> float:
    """The error that a search minimizes, infinite where the recipe diverged.

    It is that of the guided noise prediction where the model has guidance, otherwise that of the noise prediction.
    """
    return _finite(line["guided_eps_error"] or line["eps_error"])


def tables(lines: Sequence[dict]) -> list[Table]:
    """A table for each model: the recipe that ships beside the best one of each method."""
    heads = [Column("method", "text"), *columns("trials", "seconds"), Column("best recipe", "text")]
    heads += [*columns("seeds", "error", "latent MSE"), Column("better?", "text")]
    made = []
    for model in dict.fromkeys(line["model"] for line in lines):
        rows = []
        of_model = [line for line in lines if line["model"] == model]
        for method in dict.fromkeys(line["method"] for line in of_model):
            rows.append(_row(method, [line for line in of_model if line["method"] == method]))
        note = (
            "Arrows lead from what ships to the best recipe. Seconds are those of a processor, of the trials of seed 0 "
            "after the first. Errors are of the guided noise prediction on held-out trajectories. 'yes': better in "
            "both with every seed, and on average by more than the seeds of either recipe differ; 'open': one seed."
        )
        made.append(Table(heads, rows, model, [note]))
    return made


def _row(method: str, lines: list[dict]) -> list[Cell | str]:
    tried = [line for line in lines if int(line["seed"]) == 0]
    shipped = next(line for line in tried if line["recipe"] == "{}")
    best = min(tried, key=objective)
    seeds = sorted({int(line["seed"]) for line in lines} - {0})
    pairs = [(_of(lines, shipped, seed), _of(lines, best, seed)) for seed in seeds]
    pairs = [pair for pair in pairs if None not in pair]
    spent = sum(float(line["seconds"]) for line in tried if line is not shipped)
    recipe = loads(best["recipe"], f"recipe of {method}")
    told = ", ".join(f"{name} {value}" for name, value in recipe.items()) or "what ships"
    row = [method, str(len(tried)), number(spent, ".0f"), told]
    if best is shipped:
        return [*row, "1", f"{objective(best):.3f}", f"{latent_mse(best):.3f}", rendering.NONE]
    pairs = [(shipped, best), *pairs]
    return [*row, str(len(pairs)), _arrow(pairs, objective), _arrow(pairs, latent_mse), verdict(pairs)]


def latent_mse(line: dict) -> float:
    return _finite(line["latent_mse"])


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def verdict(pairs: Sequence[tuple[dict, dict]]) -> str:
    """Is the second recipe of each pair, of one seed each, better in both errors by more than seeds differ?

    One seed has no spread, so its verdict is "open".
    """
    if len(pairs) < 2:
        return "open"
    better = []
    for error in (objective, latent_mse):
        first, second = ([error(line) for line in side] for side in zip(*pairs, strict=True))
        gains = [a - b for a, b in zip(first, second, strict=True)]
        spread = max(max(side) - min(side) for side in (first, second))
        better.append(min(gains) > 0 and mean(gains) > spread)
    words = {(True, True): "yes", (True, False): "in noise prediction only", (False, True): "in latent MSE only"}
    return words.get(tuple(better), "no")


def _arrow(pairs, error) -> str:
    first, second = (mean(error(line) for line in side) for side in zip(*pairs, strict=True))
    return f"{first:.3f} → {second:.3f}"


def _of(lines: list[dict], like: dict, seed: int) -> dict | None:
    """The line of the same recipe with another seed."""
    return next((one for one in lines if one["recipe"] == like["recipe"] and int(one["seed"]) == seed), None)
