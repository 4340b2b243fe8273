"""Put the results of a run into README.md and docs/results.md, between their markers, and its files into docs/assets.

The README gets the verdicts, a short table and one picture; docs/results.md gets every table and the other figures.
"""

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
    parser.add_argument(
        "--seeds", type=Path, help="seeds.csv; without it, verdicts speak of checkpoints, not of methods"
    )
    parser.add_argument("--figures", type=Path, nargs="+", required=True)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="docs/results.md lies beside it")
    arguments = parser.parse_args()

    from quest.runtime.files import between

    docs = arguments.readme.parent / "docs"
    images = [f"![{file.stem.replace('_', ' ')}](assets/{file.name})" for file in arguments.figures]
    samples = [image for image in images if image.startswith("![samples-")]
    others = [image for image in images if image not in samples]
    tables = [file for file in (arguments.main, arguments.paired, arguments.seeds) if file]
    source = origin(arguments.main)
    every = ", ".join(f"[{file.name}]({{}}assets/{file.name})" for file in tables)
    shown = [
        verdicts(arguments.main, arguments.paired, arguments.seeds),
        short_table(arguments.main, arguments.paired),
        *(image.replace("(", "(docs/") for image in samples[-1:]),
        f"{source} Every bit width and metric: [results](docs/results.md). Every row: {every.format(*['docs/'] * 3)}.",
    ]
    whole = [
        f"{source} Every row: {every.format(*[''] * 3)}.",
        "## Checkpoint against checkpoint",
        paired_table(arguments.paired),
        "## Every bit width and metric",
        arguments.table.read_text().strip(),
        "## Samples and figures",
        *samples,
        *others,
    ]
    between(docs / "results.md", BEGIN, END, "\n\n".join(whole))
    between(arguments.readme, BEGIN, END, "\n\n".join(shown))
    assets = docs / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for file in [*tables, *arguments.figures]:
        shutil.copyfile(file, assets / file.name)
        print(assets / file.name, flush=True)


def origin(file: Path) -> str:
    """Where the numbers come from: every commit and machine that had a part in them."""
    import pandas as pd

    frame = pd.read_csv(file)[["commit", "machine"]].fillna("unknown")
    # A row joins with " / " all that had a part in it, and rows share most of that.
    made = {name: " / ".join(dict.fromkeys(" / ".join(column).split(" / "))) for name, column in frame.items()}
    return f"Written by `snakemake readme`, from a run at commit {made['commit']} on {made['machine']}."


def verdicts(main: Path, paired: Path, seeds: Path | None) -> str:
    """What the last method is better in, worse in, and what cannot be told, at the fewest bits.

    With a table over quantization seeds the sentences speak of methods, without one of the checkpoints of this run.
    """
    import pandas as pd

    from quest.report.verdicts import seed_sentences, verdict_sentences

    frame = pd.read_csv(seeds, keep_default_na=False, na_values=["nan"]) if seeds else None
    if frame is not None and (frame["versus"] != "").any():
        found = seed_sentences(frame)[0]
        head = (
            f"over quantization seeds {frame['seeds'].iloc[0]}, the methods as configured here (n = {frame['n'].max()})"
        )
        caveat = "Intervals hold the spread over images and over seeds"
    else:
        found = verdict_sentences(pd.read_csv(paired), pd.read_csv(main)["method"].iloc[-1])[0]
        head = "the checkpoints of this run, of one calibration draw and one quantization seed"
        caveat = "Intervals hold the spread over images alone, so these are verdicts on checkpoints, not on methods"
    lines = [f"- {sentence['text']}" for sentence in found["sentences"]]
    caveat += '; nothing is corrected for the number of comparisons, and "not told apart" does not mean equal.'
    return "\n".join([f"At {found['bits'].upper()}, {head}:", "", *lines, "", caveat])


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
    footer = (
        f"One checkpoint of each method (one calibration draw, one quantization seed), n = {size} images. ± is half of "
        "a 95 % interval over images; bold: this checkpoint is better than the runner-up by the paired interval, and "
        "not beyond full precision."
    )
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
    footer = (
        "Difference, method minus versus, with half of its paired 95 % interval over images; bold: the checkpoint of "
        "the method is better. One calibration draw and one quantization seed: another can move a difference by more."
    )
    return "\n".join([*lines, "", footer])


if __name__ == "__main__":
    main()
