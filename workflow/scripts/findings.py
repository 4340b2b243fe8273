"""Write a run's answers to open questions into docs/findings.md, between its markers."""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("findings", type=Path, help="findings.md of a run")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "findings.md")
    arguments = parser.parse_args()

    from quest.runtime.files import between

    between(arguments.document, BEGIN, END, arguments.findings.read_text(encoding="utf-8").strip())
    print(arguments.document)


if __name__ == "__main__":
    main()
