"""Commands beside the workflow. `plan CONFIG`: what a config costs. `measure MODEL`: what its steps cost here.
`rehearse MODEL`: the same of a published model's architecture with random weights.
`audit FILE`: what a checkpoint contains, to the byte. `doctor`: what works on this machine. `judge A B`: whether the
images of A are as good as those of B; the exit code is 0 if they are, 1 if they are worse, 2 if the images cannot
tell, and 3 for input that cannot be used. `export`: a quantized denoiser as ONNX or OpenVINO IR. `settle`: every
verdict of PROTOCOL.md again, from results/settled alone."""

import argparse
import sys
import traceback
from pathlib import Path

from quest.runtime.command_line import may_lose_reader, reader_is_gone


def main(arguments: list[str] | None = None) -> None:
    may_lose_reader()
    parser = argparse.ArgumentParser(prog="python -m quest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="jobs, hours, disk and memory of a config, before anything starts")
    plan.add_argument("config", type=Path, help="workflow/config/*.yaml")
    plan.add_argument("--machine", help="a machine of resources/costs.csv, or a GPU to forecast; default: here")
    plan.add_argument("--costs", type=Path, help="measured costs (default resources/costs.csv)")
    plan.add_argument(
        "--jobs", action="store_true", help="write results/NAME/jobs.csv: memory and time that the workflow asks for"
    )
    measured = {
        "measure": "measure what a model's steps cost here, and add it to the costs",
        "rehearse": "the same of a published model with random weights, with as little work as that takes",
    }
    for name, about in measured.items():
        measure = commands.add_parser(name, help=about)
        measure.add_argument("model", help="a name in quest.diffusion.models.MODELS")
        measure.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        measure.add_argument("--batch", type=int, help="samples per call; default: a sampling batch, or rehearsed two")
        measure.add_argument("--costs", type=Path, help="file to write (default resources/costs.csv)")
        measure.add_argument("--memory", help='what the process may address, as "ulimit -v" limits it, e.g. 20GB')
        measure.add_argument(
            "--steps", nargs="+", help="only these, e.g. call decode; default: all that is planned with"
        )
    commands.choices["measure"].add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    commands.choices["rehearse"].add_argument(
        "--config",
        type=Path,
        default=Path("workflow/config/paper.yaml"),
        help="whose methods to rehearse (default %(default)s)",
    )
    audit = commands.add_parser("audit", help="bytes, bits per parameter and bit operations of a checkpoint")
    audit.add_argument("file", type=Path, help="model.safetensors, as quest.save writes it")
    commands.add_parser("doctor", help="which kernels, devices and weights work here, and why others do not")
    judge = commands.add_parser("judge", help="whether the images of generator A are as good as those of generator B")
    judge.add_argument("a", type=Path, metavar="A", help="the new one: folder of images, .npz, or folder of a pipeline")
    judge.add_argument("b", type=Path, metavar="B", help="what it is compared with")
    judge.add_argument("--reference", type=Path, help="real images, folder or .npz: which of both is closer to them?")
    judge.add_argument("--prompts", type=Path, help="file with the prompt of each image in a line")
    judge.add_argument(
        "--images", type=int, default=200, help="images of a pipeline without prompts (default %(default)s)"
    )
    judge.add_argument("-o", "--output", type=Path, default=Path("judged.html"), help="page (default %(default)s)")
    export = commands.add_parser("export", help="write a quantized denoiser as ONNX or OpenVINO IR")
    export.add_argument("pipeline", type=Path, help="folder of the full-precision pipeline, in diffusers' layout")
    export.add_argument("file", type=Path, help="its quantized denoiser, as quest.save writes it")
    export.add_argument("-o", "--output", type=Path, required=True, help="NAME.onnx, or NAME.xml for OpenVINO")
    settle = commands.add_parser("settle", help="verdicts on methods from results/settled, without a model")
    settle.add_argument("store", type=Path, nargs="?", default=Path("results/settled"), help="(default %(default)s)")
    settle.add_argument(
        "--config", type=Path, default=Path("workflow/config/settle.yaml"), help="(default %(default)s)"
    )
    settle.add_argument("-o", "--output", type=Path, help="folder for settled.csv and settled.md; default: none")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        given = sys.argv[1:] if arguments is None else arguments
        raise SystemExit(3 if stop.code and "judge" in given[:1] else stop.code) from None
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character of the tables
    try:
        of_name = {"plan": _plan, "measure": _measure, "rehearse": _measure, "audit": _audit, "doctor": _doctor}
        (of_name | {"judge": _judge, "settle": _settle, "export": _export})[options.command](options)
    except Exception as error:
        broken_pipe = isinstance(error, BrokenPipeError)
        if broken_pipe and reader_is_gone("\n"):
            raise SystemExit(141) from None  # as a shell reports it
        in_words = isinstance(error, (ValueError, OSError, MemoryError)) and not broken_pipe
        if options.command != "judge":
            if in_words:
                raise SystemExit(f"{options.command}: {error}") from None
            raise
        if in_words:
            print(f"judge: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        raise SystemExit(3) from None  # Python's own code for an error, 1, is the verdict "worse"


def _plan(options):
    import torch

    from quest.config import read, validate
    from quest.planning import budget, costs, plan
    from quest.planning.forecast import GPUS

    if not options.config.is_file():
        raise FileNotFoundError(f"{options.config}: no such file; valid: a config such as workflow/config/paper.yaml")
    config = read(options.config)
    validate(config)
    known = costs.read(options.costs or costs.COSTS)
    machines = sorted({row["machine"] for row in known})
    here = costs.machine("cuda" if torch.cuda.is_available() else "cpu")
    machine = options.machine or here
    if machine in GPUS and machine not in machines:
        measured = here if here in machines else costs.machine("cpu")
        known = plan.forecasts(config, costs.with_stand_ins(known, measured), measured, machine)
    elif options.machine and options.machine not in machines:
        valid = ", ".join([*machines, *(f"{gpu} (a forecast)" for gpu in GPUS)])
        raise ValueError(f"--machine: nothing was measured on {options.machine!r}; valid: {valid}")
    else:
        known = costs.with_stand_ins(known, machine)
    print(plan.report(config, known, machine), end="")
    if options.jobs:
        file = Path("results", config["name"], "jobs.csv")
        found = budget.jobs(config, known, machine)
        budget.write(found, file)
        print(f"\n{file}: memory and time of {len(found)} kinds of jobs, which the workflow asks a cluster for")


def _measure(options):
    import torch

    from quest.diffusion.models import MODELS, get
    from quest.planning import costs, measure

    torch.set_num_threads(1)
    model, random = get(options.model), options.command == "rehearse"
    if random and model.ships:
        valid = ", ".join(name for name, one in MODELS.items() if not one.ships)
        raise ValueError(f"model: {model.name} ships with its weights, use `measure`; valid: {valid}")
    if unknown := set(options.steps or ()) - set(costs.HELD):
        raise ValueError(f"--steps: {sorted(unknown)[0]!r} is not one of {', '.join(costs.HELD)}")
    wanted = set(options.steps) if options.steps else None
    if random and wanted is None:
        wanted = _rehearsed(options.config, model.name)

    def done(rows):
        costs.record(rows, options.costs or costs.COSTS)
        for row in rows:
            print(f"{row['model']}: {row['what']} {row['value']} {row['unit']}", flush=True)

    repeats = 1 if random else options.repeats
    measure.measure(model, options.device, options.batch, repeats, random, wanted, options.memory, done)


def _rehearsed(file, name):
    """The steps that the jobs of a config take for a model; None, for all, where it leaves the model out."""
    from quest.config import read, validate
    from quest.planning import plan

    config = read(file)
    validate(config)
    return plan.steps(config, name) if name in config["models"] else None


def _audit(options):
    from quest.quantization import audit

    if not options.file.is_file():
        raise FileNotFoundError(f"{options.file}: no such file; valid: a checkpoint, model.safetensors of a cell")
    print(audit.report(options.file), end="")


def _doctor(_options):
    from quest import doctor

    findings, sound = doctor.report()
    print(doctor.text(findings), end="")
    if not sound:
        raise SystemExit("doctor: the reference kernel does not compute what it should; nothing here can be trusted")


def _judge(options):
    from quest.judge import EXIT, judge

    verdict = judge(options.a, options.b, options.reference, options.prompts, options.output, options.images)
    print(verdict.text(), end="")
    print(f"page: {options.output}")
    raise SystemExit(EXIT[verdict.verdict])


def _export(options):
    from quest.diffusion.loading import load_pipeline
    from quest.export import export
    from quest.quantization import checkpoint

    for path, valid in (
        (options.pipeline / "model_index.json", "a folder of a pipeline"),
        (options.file, "a checkpoint"),
    ):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; valid: {valid}")
    pipe = checkpoint.load(load_pipeline(options.pipeline), options.file, kernel="reference")
    difference = export(pipe, options.output)
    print(f"{options.output}: differs from the reference kernel by {difference:.1e} of the largest output")


def _settle(options):
    from quest.config import read
    from quest.config.schema import check_part
    from quest.config.settled import families
    from quest.report.settle import cells, verdicts

    if not options.store.is_dir():
        raise FileNotFoundError(f"{options.store}: no such folder; valid: results/settled of a checkout")
    config = read(options.config)
    check_part("settle", config.get("settle"), options.config)
    judged = verdicts.frame(cells.read(options.store), families(config), floors=cells.floors(options.store))
    print(verdicts.table(judged).markdown() if len(judged) else "no pair of these families has records yet")
    if options.output:
        verdicts.write(judged, options.output)


if __name__ == "__main__":
    main()
