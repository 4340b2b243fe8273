"""Write docs/claims.md and docs/questions.md, and tables and figures of theirs in docs/assets. Needs no torch.

They follow from results/settled, and from tables in docs/assets of runs with one seed.
"""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
# Tables over seeds 0 to 2 whose rows have the recipes of today.
BEFORE = ("seeds-photos-class.csv",)
# Runs of one seed, as PREFIXmain.csv and PREFIXpaired.csv.
RUNS = ("", "scenes-")
LAYERS = "layer-errors.csv"  # of workflow.scripts.layer_errors, for the checkpoints of records


def main() -> None:
    command_line.parser(__doc__).parse_args()

    import pandas as pd

    from quest.report import rankings, rendering
    from quest.report.settle import levels
    from quest.runtime.files import write_text

    text, answers, found, runs, rows = made()
    assets = ROOT / "docs" / "assets"
    write_text(ROOT / "docs" / "claims.md", text)
    write_text(ROOT / "docs" / "questions.md", answers)
    rendering.write(assets / "lottery.csv", found)
    ranked = [rankings.frame(*tables).assign(run=name) for name, tables in runs.items()]
    rendering.write(assets / "rankings.csv", pd.concat(ranked))
    rankings.figure(runs["main.csv"][0], None, assets / "rankings.png")
    levels.figure(rows, "log_latent_mse", assets / "standing.png")
    levels.granularity_figure(rows, "psnr", assets / "granularity.png")


def made():
    """Return the texts of claims.md and questions.md, the frame of lottery.csv, tables of runs and `levels.frame`."""
    import pandas as pd

    from quest.config import read
    from quest.config.old_names import RENAMED
    from quest.config.settled import families
    from quest.report.rendering import read_csv
    from quest.report.settle import cells, claims, facts, levels, lottery, ten, verdicts

    assets = ROOT / "docs" / "assets"
    evidence = cells.read()
    pairs = families(read(ROOT / "workflow" / "config" / "settle.yaml"))
    before = {name: read_csv(assets / name) for name in BEFORE}
    runs = {
        f"{run}main.csv": (read_csv(assets / f"{run}main.csv"), read_csv(assets / f"{run}paired.csv")) for run in RUNS
    }
    layers = (
        read_csv(assets / LAYERS) if (assets / LAYERS).is_file() else pd.DataFrame(columns=["checkpoint", "median"])
    )
    for seeds in before.values():  # tables of before the method had its present name
        for column in ("method", "versus", "better"):
            seeds[column] = seeds[column].replace(RENAMED)
    found = lottery.frame(evidence, before)
    settled = verdicts.frame(evidence, pairs, floors=cells.floors())
    rows = levels.frame(evidence)
    measured = facts.of(evidence, settled, runs, layers)
    matched = [table for endpoint in ("psnr", "kid_64w") for table in levels.by_granularity(rows, endpoint)]
    text = claims.document(settled, before, lottery.summary(found), measured, levels.tables(rows), matched)
    tables = {"main.csv": runs["main.csv"][0]}
    tables |= {name: read_csv(assets / name) for name in ("tuned.csv", "qat.csv")}
    sources = ten.Sources(tables, (ROOT / "docs" / "findings.md").read_text(encoding="utf-8"))
    return text, ten.document(settled, before, sources), found, runs, rows


if __name__ == "__main__":
    main()
