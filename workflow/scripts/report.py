"""The report of a run: one HTML file that opens offline. What other rules made is in it where it is there."""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "workflow" / "report" / "report.html.j2"
REFERENCES = ROOT / "resources" / "references.bib"


def main() -> None:
    parser = command_line.parser(__doc__, "file")
    parser.add_argument("run", type=Path, help="results/{name} of a finished run")
    parser.add_argument("--kernels", type=Path, nargs="*", default=[], help="csv files of kernel timings")
    arguments = parser.parse_args()

    from quest.report.page import write

    write(
        arguments.run,
        arguments.output,
        TEMPLATE,
        kernels=arguments.kernels,
        methods=descriptions(),
        references=REFERENCES,
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


def descriptions() -> dict[str, str]:
    """What each row of METHODS is: the first line of its module, what its function adds, and the keywords it fixes."""
    import inspect
    import sys

    from baselines import METHODS

    found = {}
    for name, method in METHODS.items():
        function, fixed = getattr(method, "func", method), getattr(method, "keywords", {})
        module = inspect.getdoc(sys.modules[function.__module__])
        said = [
            module.split("\n\n")[0].replace("\n", " "),
            inspect.getdoc(function).split("\n\n")[0].replace("\n", " "),
        ]
        settings = [f"{key} = {value!r}" for key, value in fixed.items() if key != "keep"]
        said += [f"Here: {', '.join(settings)}."] if settings else []
        found[name] = " ".join(said)
    return found


if __name__ == "__main__":
    main()
