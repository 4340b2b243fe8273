"""The memory of a job against its budget, before it starts, and what each job asks of a cluster."""

import math
from collections.abc import Iterable
from pathlib import Path

from quest.config import FULL_PRECISION, ablation_runs, recipe_of, runs, seed_runs, starting_points
from quest.diffusion.declared import of_config
from quest.planning import costs, plan
from quest.runtime import memory
from quest.runtime.files import write_rows

# What a recipe sets to change the rows of a step that are in memory at once.
KEYS = {"rounding": "batch", "step learning": "batch", "threshold search": "rows"}
# Steps that fit themselves to the memory there is: blocks are computed again, and a mini-batch takes several passes
# (quest.learning.recomputing); the search of ranges and units take fewer rows at once (quest.learning.calibrate and
# quest.learning.units).
SHRINK = {"ranges", "distillation", "full finetuning", "temporal alignment", "critical alignment", "call", "gptq"}
SHRINK |= {"svdquant"}
JOBS = ["rule", "model", "method", "bits", "least_mb", "mem_mb", "runtime"]
MARGIN = {"mem_mb": 1.2, "runtime": 1.5}  # that a job asks for beyond what the plan has


def least(known: dict, steps: dict) -> tuple[float, str, float, int]:
    """The memory in MB below which a quantize job fails, the step that takes it, its MB of a row and rows at once.

    Zero where the memory of no step was measured.
    """
    most = 0.0, "", 0.0, 0
    for step, (fixed, row, rows) in plan.peaks(known, steps, **plan.TOGETHER).items():
        rows = min(rows, 1) if step in SHRINK else rows
        needed = fixed + (rows and rows * row)
        most = max(most, (0.0 if math.isnan(needed) else needed, step, row, round(rows)))
    return most


def check(model, method: str, recipe: dict, bits: str, trajectories: int, device: str = "cpu") -> str:
    """What a quantize job needs beside its budget, in one line.

    Raises ValueError, which says what would fit, for a job that needs more. Memory is that of the costs measured on
    this machine, or on another one: the tensors are the same.
    """
    budget = memory.budget(device) / 1e6
    steps = plan.quantizing(method, recipe, bits, model, trajectories) or {}
    needed, step, row, rows = least(_known(model.name, device), steps)
    if not needed:
        return f"memory: {budget / 1e3:.1f} GB; what {method} takes on {model.name} was not measured"
    told = f"memory: {method} at {bits} takes {needed / 1e3:.1f} GB on {model.name} ({step}, {rows} rows at once)"
    if needed <= budget:
        return f"{told}, the budget is {budget / 1e3:.1f} GB"
    fitting = math.floor(rows - (needed - budget) / row) if row and step in KEYS else 0
    fits = f"memory: {math.ceil(needed / 1e3)}GB"
    if fitting >= 1:
        fits = f"{KEYS[step]}: {fitting}, or {fits}"
    raise ValueError(f"{told}, the budget is {budget / 1e3:.1f} GB; what fits: {fits}")


def _known(model: str, device: str) -> dict[str, float]:
    """The costs of a model on this machine, and of what was not measured here, those on others."""
    rows, here = [row for row in costs.read() if row["model"] == model], costs.machine(device)
    machines = sorted({row["machine"] for row in rows}, key=lambda name: name == here)
    return {what: value for name in machines for what, value in plan.known_of(rows, model, name).items()}


def jobs(config: dict, known: list[dict], machine: str) -> list[dict]:
    """What each job that has a plan asks of a cluster: rows with JOBS, memory in MB and runtime in minutes.

    Jobs whose costs were not measured on `machine` are left out.
    """
    models, found = of_config(config), []
    cells = [*runs(config), *seed_runs(config), *ablation_runs(config)]
    made = dict.fromkeys([*cells, *starting_points(config, cells)])
    for name, model in models.items():
        settings, known_here = config["models"][name], plan.known_of(known, name, machine)
        n, images = settings.get("trajectories", model.trajectories), settings["images"] / settings.get("shards", 1)
        drawn = {"trajectories": n, "redraw": n, "evaluation": settings.get("evaluation", 16)}
        needed = {(rule, "", ""): plan.trajectories(model, known_here, count) for rule, count in drawn.items()}
        lowest = {}
        for run in (run for run in made if run.model == name):
            exact = run.method == FULL_PRECISION[0]
            needed["sample", run.method, run.bits] = plan.sample(model, known_here, images, exact)
            if not exact:
                job = "quantize", run.method, run.bits
                steps = plan.quantizing(*recipe_of(config, run.method), run.bits, model, n)
                needed[job] = plan.quantize(known_here, steps)
                lowest[job] = least(known_here, steps or {})[0]
        for job, needs in needed.items():
            if math.isfinite(needs.seconds) and math.isfinite(needs.memory):
                megabytes = [math.ceil(lowest.get(job, needs.memory)), math.ceil(needs.memory * MARGIN["mem_mb"])]
                minutes = math.ceil(max(10, needs.seconds / 60 * MARGIN["runtime"]))
                found.append(dict(zip(JOBS, (job[0], name, *job[1:], *megabytes, minutes), strict=True)))
    return found


def write(rows: Iterable[dict], path: Path) -> None:
    """Write the rows of `jobs`, where the workflow finds them: results/<name>/jobs.csv."""
    write_rows(path, rows, JOBS)
