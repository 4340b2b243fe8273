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
    """What each row of METHODS is, the paper it comes from, and the keywords it fixes."""
    from baselines import METHODS

    return {name: method.description for name, method in METHODS.items()}


if __name__ == "__main__":
    main()
