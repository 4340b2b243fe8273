"""Write the report of a run: one HTML file that opens offline. It includes the results of other rules that exist."""

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

    details = {"kernels": arguments.kernels, "methods": descriptions(), "references": REFERENCES}
    write(arguments.run, arguments.output, TEMPLATE, **details)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


def descriptions() -> dict[str, str]:
    """Return the description of each method in METHODS: what it does, its paper, and the keywords it fixes."""
    from baselines import METHODS

    return {name: method.description for name, method in METHODS.items()}


if __name__ == "__main__":
    main()
