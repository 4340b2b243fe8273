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

    images = {file.stem: f"![{file.stem.replace('_', ' ')}](docs/assets/{file.name})" for file in arguments.figures}
    samples = [image for stem, image in images.items() if stem.startswith("samples-")]
    others = [image for stem, image in images.items() if not stem.startswith("samples-")]
    shown = [verdicts(arguments.main, arguments.paired), short_table(arguments.main, arguments.paired)]
    folded = {
        "Method against method": [paired_table(arguments.paired)],
        "Every bit width and metric, with the protocol": [arguments.table.read_text().strip()],
        "Samples of the other models, and figures": samples[:-1] + others,
    }
    details = [
        part
        for title, parts in folded.items()
        for part in (f"<details><summary>{title}</summary>", *parts, "</details>")
    ]
    block = "\n\n".join([*shown, *samples[-1:], *details, origin(arguments.main)])
    between(arguments.readme, BEGIN, END, block)
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


def verdicts(main: Path, paired: Path) -> str:
    """What the last method of the run is better in, worse in, and what cannot be told, at the fewest bits."""
    import pandas as pd

    from quest.report.verdicts import verdict_sentences

    focus = pd.read_csv(main)["method"].iloc[-1]
    found = verdict_sentences(pd.read_csv(paired), focus)[0]
    lines = [f"- {sentence['text']}" for sentence in found["sentences"]]
    caveat = "One calibration draw and one quantization seed: intervals are over images, and hold no spread over draws."
    return "\n".join([f"At {found['bits'].upper()}:", "", *lines, "", caveat])


def short_table(main: Path, paired: Path) -> str:
    """Every model at its fewest bits, in the metrics of HEADLINE that all models have."""
    import pandas as pd

    from quest.metrics import METRICS
    from quest.report.markup import with_interval
    from quest.report.tables import best_values, column_label
    from quest.report.verdicts import HEADLINE

    frame, pairs = pd.read_csv(main, keep_default_na=False, na_values=["nan"]), pd.read_csv(paired)
    models = frame.groupby("model", sort=False)
    names = [name for name in HEADLINE if all(name in set(of_model["metric"]) for _, of_model in models)]
    heads = [f"{column_label(name, frame)} {'↓' if METRICS[name].better == 'lower' else '↑'}" for name in names]
    lines = ["| model | method | bits | size [MB] | " + " | ".join(heads) + " |"]
    lines += ["|---|---|---|---:|" + "---:|" * len(names)]
    for model, of_model in models:
        best = best_values(of_model, pairs[pairs["model"] == model])
        bits = of_model["bits"].iloc[-1]
        rows = of_model[(of_model["method"] == "fp") | (of_model["bits"] == bits)]
        for (method, width), cell in rows.groupby(["method", "bits"], sort=False):
            values = cell.set_index("metric")
            texts = []
            for name in names:
                text = "–"
                if name in values.index:
                    value, low, high = values.loc[name, ["value", "low", "high"]]
                    text = with_interval(value, (high - low) / 2)
                texts.append(f"**{text}**" if (method, width, name) in best else text)
            words = [model, method, width.upper(), f"{cell['size_mb'].iloc[0]:.4g}", *texts]
            lines.append("| " + " | ".join(words) + " |")
    size = int(frame["n"].max())
    footer = f"n = {size} images. ± is half of a 95 % interval; bold: better than the runner-up by the paired interval."
    return "\n".join([*lines, "", footer])


def paired_table(file: Path) -> str:
    """The last method against every other at the last bits of each model, in what sees most with few images."""
    import pandas as pd

    from quest.metrics import METRICS
    from quest.report.markup import with_interval

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
