"""Put the results of a run into the README, between its markers, and the files it shows into docs/assets."""

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="main.md")
    parser.add_argument("--main", type=Path, required=True, help="main.csv")
    parser.add_argument("--paired", type=Path, required=True, help="paired.csv")
    parser.add_argument("--figures", type=Path, nargs="+", required=True)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()

    from quest.files import between

    tables = [arguments.table.read_text().strip(), "### Method against method", paired_table(arguments.paired)]
    images = [f"![{file.stem.replace('_', ' ')}](docs/assets/{file.name})" for file in arguments.figures]
    between(arguments.readme, BEGIN, END, "\n\n".join([origin(arguments.main), *tables, *images]))
    assets = arguments.readme.parent / "docs" / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for file in [arguments.main, arguments.paired, *arguments.figures]:
        shutil.copyfile(file, assets / file.name)
        print(assets / file.name, flush=True)


def origin(file: Path) -> str:
    """Where the numbers come from: every commit and machine that had a part in them, and the tables with every row."""
    import pandas as pd

    frame = pd.read_csv(file)[["commit", "machine"]].fillna("unknown")
    # A row joins with " / " all that had a part in it, and rows share most of that.
    made = {name: " / ".join(dict.fromkeys(" / ".join(column).split(" / "))) for name, column in frame.items()}
    rows = "Every row: [main.csv](docs/assets/main.csv), [paired.csv](docs/assets/paired.csv)."
    return f"Written by `snakemake readme`, from a run at commit {made['commit']} on {made['machine']}. {rows}"


def paired_table(file: Path) -> str:
    """The last method against every other at the last bits of each model, in what sees most with few images."""
    import pandas as pd

    from quest.metrics import METRICS
    from quest.tables import with_interval

    shown = ["latent_mse", "fid_to_fp"]
    frame = pd.read_csv(file)
    frame = frame[(frame["versus"] != "fp") & (frame["bits"] == frame.groupby("model")["bits"].transform("last"))]
    frame = frame[frame["method"] == frame.groupby("model")["method"].transform("last")]
    lines = ["| model | bits | method | versus | " + " | ".join(METRICS[name].label for name in shown) + " |"]
    lines += ["|---|---|---|---|" + "---:|" * len(shown)]
    for names, rows in frame.groupby(["model", "bits", "method", "versus"], sort=False):
        cells = []
        for row in (rows[rows["metric"] == name].iloc[0] for name in shown):
            text = with_interval(row["difference"], (row["high"] - row["low"]) / 2)
            cells.append(f"**{text}**" if row["better"] == row["method"] else text)
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    footer = "Difference, method minus versus, with half of its paired 95 % interval; bold: the method is better."
    return "\n".join([*lines, "", footer])


if __name__ == "__main__":
    main()
