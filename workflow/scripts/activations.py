"""Measure the distributions of the layers' inputs: in full precision, and quantized before and after finetuning."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "bits", "calibration", "evaluation", "file", "threads")
    parser.add_argument("--init", type=Path, required=True, help="checkpoint that finetuning started from")
    parser.add_argument("--finetuned", type=Path, required=True, help="QuEST's checkpoint")
    arguments = parser.parse_args()

    import quest
    from baselines import METHODS
    from quest.config import parse_bits
    from quest.diffusion.denoisers import denoiser_of
    from quest.properties.distributions import EDGES, distributions, spreads, unknown
    from quest.runtime.provenance import write_json
    from workflow.scripts import opened

    model, pipe, calibration, evaluation = opened(arguments)
    recipe = model.recipe(METHODS["quest-suite"].quantize, parse_bits(arguments.bits)[1])
    recipe |= {"init": str(arguments.init), "tla_iterations": 0, "cma_iterations": 0}
    scale = spreads(denoiser_of(pipe), evaluation)
    denoisers = {"full precision": distributions(denoiser_of(pipe), evaluation, scale)}
    makers = {
        "before finetuning": lambda: quest.quantize(
            pipe, "quest-suite", arguments.bits, calibration=calibration, **recipe
        ),
        "after finetuning": lambda: quest.load(pipe, arguments.finetuned, kernel="reference"),
    }
    diverged = {}
    for name, make in makers.items():
        try:
            denoisers[name] = distributions(denoiser_of(make()), evaluation, scale)
        except FloatingPointError as error:  # the method, or what it starts from
            denoisers[name], diverged[name] = unknown(denoisers["full precision"]), str(error)
            print(f"{name}: diverged: {error}", flush=True)
    content = {"model": arguments.model, "bits": arguments.bits, "edges": EDGES.tolist(), "denoisers": denoisers}
    write_json(arguments.output, content | {"diverged": diverged})


if __name__ == "__main__":
    main()
