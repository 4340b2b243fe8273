"""Compare QuEST's finetuning here with the schedule of its released code, on one denoiser (Linux).

Both tune the same layers and scales of the same calibrated denoiser with the same losses, at W4A4, for as many
iterations times rows. The released code (hatchetProject/QuEST at a357018)

- goes through the timesteps from the noisiest to the cleanest, with a new Adam for the scales at each visit: as many
  epochs as fill the rows on 8 rows of a timestep, then rounds over all timesteps with 64 rows each (or all there are);
- writes the outputs of full precision of these rows, of every tuned layer and of the whole denoiser, into a file for
  each mini-batch of 2 or 4, and reads the file whenever the mini-batch comes;
- runs one row at a time and adds up the gradients of a mini-batch;
- adds the global loss once for each tuned layer;
- keeps all weights learnable, so each is quantized anew in every pass and has a gradient. The optimizer has the tuned
  ones.

"here, short of memory" is the same as here for a job that may hold 100 MB: full precision's outputs and blocks are
computed again. All run in copies of this process, in turns, on one thread; see `quest.planning.meter.in_copy`.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

from quest.runtime import command_line

ROWS = (8, 64)  # of a visit to a timestep, in each of the two stages
BATCH = (2, 4)
SHORT = 10**8  # bytes


def main() -> None:
    parser = command_line.parser(__doc__, "model", "calibration", "file")
    parser.add_argument("--iterations", type=command_line.whole, nargs=2, default=[10, 80], help="of both stages here")
    parser.add_argument("--batch", type=command_line.whole, default=16, help="rows of an iteration here")
    parser.add_argument("--repeats", type=command_line.whole, default=3)
    arguments = parser.parse_args()

    import torch

    import quest
    from baselines.quest import FinetuneRecipe, finetune, resolve, weights_and_biases
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.denoisers import denoiser_of
    from quest.diffusion.models import get
    from quest.planning.meter import in_copy
    from quest.runtime.provenance import write_json

    torch.set_num_threads(1)
    model = get(arguments.model)
    pipe, calibration = model.load(), CalibrationSet.load(arguments.calibration)
    told = dict(tla_iterations=arguments.iterations[0], cma_iterations=arguments.iterations[1], batch=arguments.batch)
    settings = dict(selection=model.selection, time_groups=model.time_groups)
    recipe = resolve(FinetuneRecipe(preset="full", **settings, **told), pipe, 4)
    still = dict(tla_iterations=0, cma_iterations=0) | settings
    student = denoiser_of(quest.quantize(pipe, "quest-suite", "w4a4", calibration=calibration, **still))
    loops = {
        "here": partial(finetune, student, denoiser_of(pipe), calibration, recipe, weights_and_biases),
        "here, short of memory": partial(short_of_memory, student, denoiser_of(pipe), calibration, recipe),
        "released": partial(released, student, denoiser_of(pipe), calibration, recipe),
    }
    costs: dict[str, list] = {name: [] for name in loops}
    for _ in range(arguments.repeats):
        for name, loop in loops.items():
            costs[name].append(in_copy(loop, arguments.output.with_suffix(".log")))
            print(name, costs[name][-1], flush=True)
    medians = {name: {key: statistics.median(one[key] for one in of) for key in of[0]} for name, of in costs.items()}
    about = {"model": model.name, "rows": len(calibration), "settings": told}
    write_json(arguments.output, about | {"costs": costs, "medians": medians})
    for name, found in medians.items():
        print(f"{name}: {found['seconds']:.3g} processor s, {found['memory_mb']:.3g} MB")


def short_of_memory(student, teacher, calibration, recipe) -> None:
    from baselines.quest import finetune, weights_and_biases
    from quest.runtime import memory

    with memory.limited(SHORT):
        finetune(student, teacher, calibration, recipe, weights_and_biases)


def released(student, teacher, calibration, recipe) -> None:
    """Tune a calibrated denoiser by the released code's schedule, for the iterations times rows of a recipe."""
    import torch

    from baselines.selection import selected
    from quest.quantization.layers import quant_layers

    generator = torch.Generator().manual_seed(recipe.seed)
    for _, layer in quant_layers(student):
        layer.thaw()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("weight_quantizer" not in name)
    groups = student.time_groups
    of_group = groups.rows(calibration.timestep)
    stages = selected(student, recipe.selection, recipe.time_embedding)
    lengths = (recipe.tla_iterations, recipe.cma_iterations)
    for stage, ((layers, quantizers), iterations) in enumerate(zip(stages, lengths, strict=True)):
        weights = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
        adam = torch.optim.Adam(weights, lr=recipe.lr_weight)
        pool = min(ROWS[stage], *map(len, of_group))
        passes = max(1, round(iterations * recipe.batch[stage] / (pool * len(of_group))))
        rounds, epochs = (1, passes) if stage == 0 else (passes, 1)
        for visit in range(rounds * len(of_group)):
            rows = of_group[visit % len(of_group)]
            rows = rows[torch.randperm(len(rows), generator=generator)[:pool]]
            adam_scales = torch.optim.Adam([q.scale for q in quantizers], lr=recipe.lr_scale)
            with tempfile.TemporaryDirectory() as folder:
                parts = list(rows.split(BATCH[stage]))
                files = [write_features(teacher, layers, calibration, part, Path(folder)) for part in parts]
                for _ in range(epochs):
                    for file, part in zip(files, parts, strict=True):
                        student.zero_grad()
                        backward(student, calibration, part, torch.load(file))
                        adam.step()
                        adam_scales.step()


def write_features(teacher, layers, calibration, rows, folder: Path) -> Path:
    """Write what full precision gives for these rows, in every tuned layer and in the end (under the name "")."""
    import torch

    from quest.learning.alignment import outputs_of

    with torch.no_grad(), outputs_of(teacher, layers) as outputs:
        prediction = teacher(**calibration.inputs(rows)).sample
    file = folder / f"fp_activations_{rows[0]}.pt"
    torch.save(outputs | {"": prediction}, file)
    return file


def backward(student, calibration, rows, wanted: dict) -> None:
    """Add up the gradients of a mini-batch, one row after the other."""
    import torch.nn.functional as F

    from quest.learning.alignment import outputs_of

    names = [name for name in wanted if name]
    for i in range(len(rows)):
        with outputs_of(student, names) as outputs:
            prediction = student(**calibration.inputs(rows[i : i + 1])).sample
        loss = 0.0
        for name in names:
            share = outputs[name].shape[0]  # some layers see more rows than the denoiser
            loss += F.mse_loss(outputs[name], wanted[name][i * share : (i + 1) * share])
            loss += F.mse_loss(prediction, wanted[""][i : i + 1])
        (loss / len(rows)).backward()


if __name__ == "__main__":
    main()
