"""Measure the cost of time groups (TAQuant) at inference: the time of a call with all groups and with one, and bytes.

The single group is the one of the timed inputs, so both calls compute the same and differ only in the lookup of scales.
The calls alternate; the times are processor seconds of one thread.
"""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "file", "threads")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint with time groups")
    parser.add_argument("--repeats", type=int, default=40, help="number of calls of each kind (default %(default)s)")
    arguments = parser.parse_args()

    from functools import partial

    import torch

    import quest
    from quest import kernels
    from quest.diffusion.denoisers import denoiser_of
    from quest.properties.lookup import look_up, seconds_in_turns, single
    from quest.quantization.cost import stored
    from quest.quantization.header import read as read_header
    from quest.runtime.provenance import write_json
    from workflow.scripts import opened

    if reason := read_header(arguments.checkpoint, diverged=True).get("diverged"):
        print(f"nothing to time: diverged: {reason}", flush=True)
        nothing = {"model": arguments.model, "groups": 0, "bytes": {}, "rows": []}
        write_json(arguments.output, nothing | {"diverged": reason})
        return
    _, pipe, evaluation = opened(arguments)
    at = evaluation.rows_of_call(evaluation.call.max() // 2)
    inputs = evaluation.inputs(at)
    rows = []
    for kernel in dict.fromkeys(("reference", kernels.choose("auto", torch.device("cpu")))):
        many = denoiser_of(quest.load(pipe, arguments.checkpoint, kernel=kernel))
        one = single(denoiser_of(quest.load(pipe, arguments.checkpoint, kernel=kernel)), inputs["timestep"][:1])
        with torch.no_grad():
            same = torch.equal(many(**inputs).sample, one(**inputs).sample)
            for batch in (1, len(at)):
                call = evaluation.inputs(at[:batch])
                steps = {
                    "time groups": partial(many, **call),
                    "one group": partial(one, **call),
                    "lookup": partial(look_up, many, call["timestep"]),
                }
                repeats = arguments.repeats * (4 if batch == 1 else 1)
                seconds = seconds_in_turns(steps, repeats)
                rows.append({"kernel": kernel, "rows": batch, "same_output": same, "seconds": seconds})
                middle = {name: f"{1e3 * sorted(values)[len(values) // 2]:.4g} ms" for name, values in seconds.items()}
                print(kernel, batch, middle, same, flush=True)
    size = {kind: sum(of_kind.values()) for kind, of_kind in stored(many).items()}
    content = {"model": arguments.model, "groups": len(many.time_groups), "bytes": size, "rows": rows}
    write_json(arguments.output, content)


if __name__ == "__main__":
    main()
