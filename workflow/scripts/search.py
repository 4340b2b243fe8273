"""Try recipes of several methods on held-out trajectories, in as many seconds for each. Presets are chosen with it.

Every recipe is judged by the error of the (guided) noise prediction on trajectories of the validation seeds, which
nothing else uses, and by the latent MSE of images of the same seeds. The first recipe of a row is what ships. A row
gets no further one when it had as many as every other, or when its processor seconds are spent; the first is not
counted. Then the best recipe of the row and what ships run with further quantization seeds, each of which has its own
calibration trajectories and starting points.

The log has a line per trial and is written anew after each. A trial that it has already, of the same settings of the
model, of the row and of what it starts from, is not run again. The table shows the trials of this config alone.
"""

import json
import math
import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "threads")
    parser.add_argument("folder", type=Path, help="results of the config: calibration sets and starting points")
    parser.add_argument("--config", type=json.loads, required=True, help="JSON of name, models, methods and search")
    parser.add_argument("--log", type=Path, required=True, help="table of all trials, which this script extends")
    parser.add_argument("-o", "--output", type=Path, required=True, help="table of what was found, Markdown")
    arguments = parser.parse_args()

    import torch

    from quest.config.searched import trials
    from quest.report import rendering, searches

    torch.set_num_threads(arguments.threads)
    block = arguments.config["search"]
    rows, asked = searches.read(arguments.log), []

    def run(bench, row: str, changes: dict, seed: int) -> dict:
        """The line of a trial, from the log where it has it."""
        names = bench.names(row, changes, seed)
        known = [line for line in rows if all(str(line[key]) == str(names[key]) for key in searches.KEYS)]
        if not known:
            rows.append(names | bench.measure(row, changes, seed))
            searches.write(arguments.log, rows)
            print(json.dumps(rows[-1]), flush=True)
        asked.append((known or rows[-1:])[0])
        return asked[-1]

    for model in arguments.config["models"]:
        bench = Bench(arguments.config, arguments.folder, model)
        for row in block["methods"]:
            done: list[tuple[dict, dict]] = []
            for changes in trials(arguments.config, row):
                if sum(float(line["seconds"]) for _, line in done[1:]) < block["seconds"]:
                    done.append((changes, run(bench, row, changes, 0)))
            best, _ = min(done, key=lambda one: searches.objective(one[1]))
            for seed in block["seeds"] if best else []:
                for changes in ({}, best):
                    run(bench, row, changes, seed)
    rendering.write(arguments.output, *searches.tables(asked))


class Bench:
    """One model, full precision's held-out trajectories and latents, and what measures a recipe on them."""

    def __init__(self, config: dict, folder: Path, model: str):
        from quest.diffusion.calibration_set import collect
        from quest.diffusion.models import get

        self.config, self.folder, self.model = config, folder, get(model)
        self.pipe = self.model.load()
        settings = config["models"][model]
        self.images = settings["images"]
        self.held_out = collect(self.pipe, self.model, "validation", settings.get("evaluation", 16))
        self.latents = self.sampled(self.pipe)

    def sampled(self, pipe):
        import torch

        from quest.diffusion.sampling import generate

        return torch.cat([latents for _, latents, _ in generate(pipe, self.model, "validation", self.images)])

    def names(self, row: str, changes: dict, seed: int) -> dict:
        from quest.config.searched import cell, settings, with_changes

        run = cell(self.config, self.model.name, row, seed)
        told = {"model": run.model, "method": row, "bits": run.bits, "seed": seed}
        whole = settings(with_changes(self.config, row, changes), run.model, row)
        texts = {"recipe": changes, "settings": whole}
        return told | {name: json.dumps(value, sort_keys=True) for name, value in texts.items()}

    def measure(self, row: str, changes: dict, seed: int) -> dict:
        """What a trial shows, what it took, and where it ran."""
        import quest
        from baselines import METHODS
        from quest.config import parse_bits, recipe_of, start_of
        from quest.config.searched import cell, with_changes
        from quest.diffusion.calibration_set import CalibrationSet
        from quest.metrics.noise_prediction import eps_errors
        from quest.quantization.header import read as read_header
        from quest.runtime.provenance import provenance

        config, run = with_changes(self.config, row, changes), cell(self.config, self.model.name, row, seed)
        registered, recipe = recipe_of(config, run.method)
        recipe = self.model.recipe(METHODS[registered].quantize, parse_bits(run.bits)[1]) | recipe
        if start := start_of(config, run):
            recipe["init"] = str(self.folder / start.path / "model.safetensors")
        draw = f"-{seed}" if seed else ""
        calibration = CalibrationSet.load(self.folder / self.model.name / f"calibration{draw}.safetensors")
        made, note, began = self.folder / run.path / "model.safetensors", "", time.process_time()
        try:
            if not changes and made.exists():  # a starting point of others
                student, seconds = quest.load(self.pipe, made, "reference"), read_header(made)["seconds"]
                note = "wall time of the workflow's job"
            else:
                student = quest.quantize(self.pipe, registered, run.bits, calibration=calibration, **recipe)
                seconds = round(time.process_time() - began, 1)
        except FloatingPointError as error:
            student, seconds, note = None, round(time.process_time() - began, 1), f"diverged; {error}"
        shown = dict.fromkeys(("guided_eps_error", "deviation", "eps_error", "latent_mse"), math.nan)
        if student is not None:
            errors, guided, _ = eps_errors(student, self.held_out, self.model.guidance)
            of_trajectory = (errors if guided is None else guided).mean(1)
            shown = {
                "guided_eps_error": "" if guided is None else round(guided.mean().item(), 5),
                "deviation": round(of_trajectory.std().item() / len(of_trajectory) ** 0.5, 5),
                "eps_error": round(errors.mean().item(), 5),
                "latent_mse": round((self.sampled(student) - self.latents).square().mean().item(), 4),
            }
        job = provenance()
        where = {"commit": (job["commit"] or "")[:7] + ("+" if job["dirty"] else "")}
        where |= {"machine": job["machine"]["cpu"], "isa": (job["core"] or {}).get("isa", ""), "date": job["date"]}
        return shown | {"seconds": seconds, "note": note} | where


if __name__ == "__main__":
    main()
