"""Write the table of null controls: full precision against itself. Imports no torch."""

from quest.runtime import command_line


def main() -> None:
    arguments = command_line.parser(__doc__, "metrics", "folder").parse_args()

    from quest.report.nulls import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "nulls.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
