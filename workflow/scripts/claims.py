"""Write docs/claims.md and docs/assets/lottery.csv from results/settled. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
# Tables over seeds 0 to 2 whose rows have the recipes of today.
BEFORE = ("seeds-photos-class.csv",)


def main() -> None:
    command_line.parser(__doc__).parse_args()

    from quest.report import rendering

    text, found = made()
    (ROOT / "docs" / "claims.md").write_text(text, encoding="utf-8")
    rendering.write(ROOT / "docs" / "assets" / "lottery.csv", found)


def made():
    """Return the text of docs/claims.md, and the frame of docs/assets/lottery.csv."""
    from quest.config import read
    from quest.config.old_names import RENAMED
    from quest.report.rendering import read_csv
    from quest.report.settle import cells, claims, lottery, verdicts

    evidence = cells.read(ROOT / "results" / "settled")
    families = read(ROOT / "workflow" / "config" / "settle.yaml")["settle"]["families"]
    before = {name: read_csv(ROOT / "docs" / "assets" / name) for name in BEFORE}
    for seeds in before.values():  # tables of before the method had its present name
        for column in ("method", "versus", "better"):
            seeds[column] = seeds[column].replace(RENAMED)
    found = lottery.frame(evidence, before)
    return claims.document(verdicts.frame(evidence, families), before, lottery.summary(found)), found


if __name__ == "__main__":
    main()
