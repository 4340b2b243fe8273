"""Write the tables of a run from the metrics of its cells, in the order of the cells. Imports no torch."""

from quest.runtime import command_line


def main() -> None:
    arguments = command_line.parser(__doc__, "metrics", "folder").parse_args()

    from quest.report.tables import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "main.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
