"""Compare the ablations of a run for docs/findings.md, and write that between its markers. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("cells", type=Path, nargs="+", help="metrics.json of one model and bits")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "findings.md")
    arguments = parser.parse_args()

    from quest.report import evidence, questions
    from quest.runtime.files import between

    between(arguments.document, BEGIN, END, questions.findings(evidence.read(arguments.cells)).strip())
    print(arguments.document)


if __name__ == "__main__":
    main()
