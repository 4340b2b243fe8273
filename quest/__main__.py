"""`python -m quest plan CONFIG`: what a config costs. `python -m quest measure MODEL`: what its steps cost here.
`python -m quest audit FILE`: what is in a checkpoint, to the byte. `python -m quest doctor`: what works here."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m quest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="jobs, hours, disk and memory of a config, before anything starts")
    plan.add_argument("config", type=Path, help="workflow/config/*.yaml")
    plan.add_argument("--machine", help="a machine of resources/costs.csv; default: this one's processor or GPU")
    plan.add_argument("--costs", type=Path, help="measured costs (default resources/costs.csv)")
    measure = commands.add_parser("measure", help="add to the measured costs")
    measure.add_argument("model", help="a name in quest.diffusion.models.MODELS")
    measure.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    measure.add_argument("--batch", type=int, help="samples per call; default: those of a sampling batch")
    measure.add_argument("--costs", type=Path, help="file to write (default resources/costs.csv)")
    audit = commands.add_parser("audit", help="bytes, bits per parameter and bit operations of a checkpoint")
    audit.add_argument("file", type=Path, help="model.safetensors, as quest.save writes it")
    commands.add_parser("doctor", help="which kernels, devices and weights work here, and why others do not")
    given = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a sign of the tables
    try:
        {"plan": _plan, "measure": _measure, "audit": _audit, "doctor": _doctor}[given.command](given)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{given.command}: {error}") from None


def _plan(given):
    from quest.config import read, validate
    from quest.planning import measure, plan

    if not given.config.is_file():
        raise FileNotFoundError(f"{given.config}: no such file; valid: a config such as workflow/config/paper.yaml")
    config = read(given.config)
    validate(config)
    costs = measure.read(given.costs or measure.COSTS)
    machines = sorted({row["machine"] for row in costs})
    machine = given.machine or measure.machine("cuda" if _has_gpu() else "cpu")
    if given.machine and given.machine not in machines:
        raise ValueError(f"--machine: nothing was measured on {given.machine!r}; valid: {', '.join(machines)}")
    print(plan.report(config, costs, machine), end="")


def _measure(given):
    import torch

    from quest.diffusion.models import get
    from quest.planning import measure

    torch.set_num_threads(1)
    rows = measure.measure(get(given.model), given.device, given.batch)
    measure.record(rows, given.costs or measure.COSTS)
    for row in rows:
        print(f"{row['model']} on {row['machine']}: {row['what']} {row['value']} {row['unit']}")


def _audit(given):
    from quest.quantization import audit

    if not given.file.is_file():
        raise FileNotFoundError(f"{given.file}: no such file; valid: a checkpoint, model.safetensors of a cell")
    print(audit.report(given.file), end="")


def _doctor(_given):
    from quest import doctor

    findings, sound = doctor.report()
    print(doctor.text(findings), end="")
    if not sound:
        raise SystemExit("doctor: the reference kernel does not compute what it should; nothing here can be trusted")


def _has_gpu():
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
