"""Finetune one model by one recipe of QuEST on one kind of data, and measure it on held-out trajectories and scenes.

The data are trajectories of the full-precision model, or noised real scenes. With scenes, the targets are the
predictions of the full-precision model (`scenes`) or the true noise (`noise`). `--method full-finetune` with the true
noise and the global loss alone is quantization-aware training: all weights and activation scales learn from the loss
that the model was trained by. The errors of the noise prediction are measured on every trajectory against full
precision, and for models of scenes also on held-out scenes against the true noise. The latents of the first images are
compared with full precision's.
"""

import json
import math
import time
from pathlib import Path

from quest.runtime import command_line

SCENES = 64  # number of held-out scenes
HELD_OUT = 1  # the seed of their noise
IMAGES = 50


def noise_seed(seed: int) -> int:
    """Return the seed of the noise on the scenes of a quantization seed: one of its own, and not HELD_OUT.

    The same seed would give scenes of both splits the same noise, which is the target.
    """
    return seed + (seed >= HELD_OUT)


def main() -> None:
    parser = command_line.parser(__doc__, "model", "bits", "calibration", "evaluation", "file", "threads")
    parser.add_argument("--method", default="quest-suite", help="one with QuEST's keywords (default %(default)s)")
    parser.add_argument("--recipe", type=json.loads, default={}, help="keyword arguments of the method, as JSON")
    parser.add_argument("--pictures", type=command_line.whole, help="real scenes; default: as many as trajectories")
    parser.add_argument("--data", choices=("trajectories", "scenes", "noise"), default="trajectories")
    parser.add_argument("--init", type=Path, required=True, help="checkpoint to start from")
    arguments = parser.parse_args()

    import torch

    import quest
    from baselines import METHODS
    from quest.config import parse_bits
    from quest.diffusion.denoisers import denoiser_of
    from quest.diffusion.sampling import generate
    from quest.metrics.noise_prediction import eps_error
    from quest.runtime.provenance import write_json
    from quest.zoo.noised import noised
    from workflow.scripts import opened

    model, pipe, calibration, evaluation = opened(arguments)
    drawn = model.name.startswith("scenes")  # a program draws their pictures; those of other models do not ship
    if arguments.data != "trajectories" and not drawn:
        parser.error(f"--data: the real pictures of {model.name} do not ship; valid: trajectories")
    recipe = model.recipe(METHODS[arguments.method].quantize, parse_bits(arguments.bits)[1])
    recipe |= {"init": str(arguments.init)} | arguments.recipe
    if arguments.data != "trajectories":
        pictures = arguments.pictures or len(calibration.trajectory.unique())
        seed = recipe.get("seed", 0)
        calibration = noised(pipe, model, "train", pictures, noise_seed(seed), start=seed * pictures)
        if arguments.data == "scenes":
            rows = torch.arange(len(calibration)).split(64)
            with torch.no_grad():
                calibration.target = torch.cat([denoiser_of(pipe)(**calibration.inputs(r)).sample for r in rows])
    start, diverged = time.perf_counter(), ""
    try:
        student = quest.quantize(pipe, arguments.method, arguments.bits, calibration=calibration, **recipe)
    except FloatingPointError as error:  # of the training, or of what it starts from
        student, diverged = None, str(error)
        print(f"diverged: {diverged}", flush=True)
    seconds = round(time.perf_counter() - start, 1)

    def errors_of(one, trajectories):
        """The mean error of each trajectory; NaN without a denoiser."""
        if one is None:
            return [math.nan] * len(trajectories.trajectory.unique())
        return eps_error(one, trajectories)[0].mean(1).tolist()

    def latents_of(one):
        return torch.cat([latents for _, latents, _ in generate(one, model, "evaluation", IMAGES)])

    errors = {"to_full_precision": errors_of(student, evaluation)}
    apart = torch.full((IMAGES,), math.nan)
    if student is not None:
        apart = (latents_of(student) - latents_of(pipe)).square().flatten(1).mean(1).log10()
    errors["log_latent_mse"] = apart.tolist()
    if drawn:
        held_out = noised(pipe, model, "validation", SCENES, HELD_OUT)
        errors["to_noise"] = errors_of(student, held_out)
        errors["full_precision_to_noise"] = errors_of(pipe, held_out)
    print({name: round(sum(values) / len(values), 5) for name, values in errors.items()}, f"{seconds} s", flush=True)
    names = {key: getattr(arguments, key) for key in ("model", "bits", "method", "recipe", "data")}
    write_json(arguments.output, names | errors | {"seconds": seconds, "diverged": diverged})


if __name__ == "__main__":
    main()
