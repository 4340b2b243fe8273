"""What TAQuant costs at inference: a quantized call with its sets of scales against one with a single set, and bytes.

The single set is one time group's own, so that both compute the same in it and differ in looking their scales up only.
Calls alternate; seconds are those of the processor, one thread.
"""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "file", "threads")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint with time groups")
    parser.add_argument("--repeats", type=int, default=40, help="calls of each (default %(default)s)")
    arguments = parser.parse_args()

    from functools import partial

    import torch

    import quest
    from quest import kernels
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.models import MODELS
    from quest.planning.measure import seconds_in_turns
    from quest.properties.lookup import look_up, single
    from quest.quantization.cost import stored
    from quest.runtime.provenance import write_json

    torch.set_num_threads(arguments.threads)
    model = MODELS[arguments.model]
    pipe = model.load()
    evaluation = CalibrationSet.load(arguments.evaluation)
    at = (evaluation.call == evaluation.call.max() // 2).nonzero().flatten()
    inputs = evaluation.inputs(at)
    rows = []
    for kernel in dict.fromkeys(("reference", kernels.choose("auto", torch.device("cpu")))):
        many = quest.load(pipe, arguments.checkpoint, kernel=kernel).unet
        one = single(quest.load(pipe, arguments.checkpoint, kernel=kernel).unet, inputs["timestep"][:1])
        with torch.no_grad():
            same = torch.equal(many(**inputs).sample, one(**inputs).sample)
            for batch in (1, len(at)):
                given = evaluation.inputs(at[:batch])
                steps = {
                    "time groups": partial(many, **given),
                    "one group": partial(one, **given),
                    "lookup": partial(look_up, many, given["timestep"]),
                }
                repeats = arguments.repeats * (4 if batch == 1 else 1)
                seconds = seconds_in_turns(steps, repeats)
                rows.append({"kernel": kernel, "rows": batch, "same_output": same, "seconds": seconds})
                middle = {name: f"{1e3 * sorted(values)[len(values) // 2]:.4g} ms" for name, values in seconds.items()}
                print(kernel, batch, middle, same, flush=True)
    size = {kind: sum(of_kind.values()) for kind, of_kind in stored(many).items()}
    content = {"model": model.name, "groups": len(many.time_groups), "bytes": size, "rows": rows}
    write_json(arguments.output, content)


if __name__ == "__main__":
    main()
