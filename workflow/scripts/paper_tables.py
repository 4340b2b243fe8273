"""The paper's tables by their numbers, from the cells that were measured. Imports no torch."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json of cells, their checkpoints beside them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write the tables into")
    arguments = parser.parse_args()

    from quest.report import paper

    paper.write(arguments.metrics, arguments.output)
    for number in paper.TABLES:
        print((arguments.output / f"table{number}.md").read_text())


if __name__ == "__main__":
    main()
