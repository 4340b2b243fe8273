"""Write the tables of the paper, by number, from the measured cells. Imports no torch."""

from quest.runtime import command_line


def main() -> None:
    arguments = command_line.parser(__doc__, "metrics", "folder").parse_args()

    from quest.report import paper

    paper.write(arguments.metrics, arguments.output)
    for number in paper.TABLES:
        print((arguments.output / f"table{number}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
