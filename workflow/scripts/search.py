"""Compare recipes of one method on held-out trajectories. The presets were chosen with it, see results/LOG.md.

The trajectories are those of the validation seeds, which nothing else uses. It prints a row per recipe, the best last.
"""

import json
import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "method", "bits", "calibration", "threads")
    parser.add_argument("recipes", type=json.loads, help='JSON list of keyword arguments, e.g. [{}, {"samples": 64}]')
    parser.add_argument("--validation", type=Path, required=True, help="validation trajectories; sampled if missing")
    parser.add_argument("-n", type=int, default=16, help="validation trajectories (default %(default)s)")
    arguments = parser.parse_args()

    import torch

    import quest
    from quest.diffusion.calibration_set import CalibrationSet, collect
    from quest.diffusion.models import get
    from quest.metrics.noise_prediction import eps_error

    torch.set_num_threads(arguments.threads)
    model = get(arguments.model)
    pipe = model.load()
    if not arguments.validation.exists():
        collect(pipe, model, "validation", arguments.n).save(arguments.validation)
    validation = CalibrationSet.load(arguments.validation)
    calibration = CalibrationSet.load(arguments.calibration)
    rows = []
    for recipe in arguments.recipes:
        start = time.perf_counter()
        q = quest.quantize(pipe, arguments.method, arguments.bits, calibration=calibration, **recipe)
        seconds = time.perf_counter() - start
        errors = eps_error(q, validation)[0].mean(1)  # [trajectories]
        deviation = errors.std() / len(errors) ** 0.5
        rows.append((errors.mean().item(), deviation.item(), seconds, json.dumps(recipe)))
        print("{:.5f} +- {:.5f}  {:.0f} s  {}".format(*rows[-1]), flush=True)
    print("in order:")
    for row in sorted(rows, reverse=True):
        print("{:.5f} +- {:.5f}  {:.0f} s  {}".format(*row))


if __name__ == "__main__":
    main()
