"""Write the results of a run into docs/results.md, between markers, and copy its files to docs/assets beside it."""

import shutil
from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--table", type=Path, required=True, help="main.md")
    parser.add_argument("--main", type=Path, required=True, help="main.csv")
    parser.add_argument("--paired", type=Path, required=True, help="paired.csv")
    seeds = "seeds.csv; without it, verdicts speak of checkpoints, not of methods"
    parser.add_argument("--seeds", type=Path, help=seeds)
    parser.add_argument("--figures", type=Path, nargs="+", required=True)
    page = ROOT / "docs" / "results.md"
    parser.add_argument("--page", type=Path, default=page, help="(default docs/results.md); assets lies beside it")
    arguments = parser.parse_args()

    from quest.runtime.files import atomic, between

    images = {file: f"![{alternative(file.stem)}](assets/{file.name})" for file in arguments.figures}
    samples = [image for file, image in images.items() if file.stem.startswith("samples-")]
    others = [image for image in images.values() if image not in samples]
    tables = [file for file in (arguments.main, arguments.paired, arguments.seeds) if file]
    every = ", ".join(f"[{file.name}](assets/{file.name})" for file in tables)
    whole = [
        f"{origin(arguments.main)} Every row: {every}.",
        "### Samples",
        *samples,
        "### Verdicts",
        verdicts(arguments.main, arguments.paired, arguments.seeds),
        "### At the fewest bits",
        short_table(arguments.main, arguments.paired),
        "### Checkpoint against checkpoint",
        paired_table(arguments.paired),
        "### Every bit width and metric",
        arguments.table.read_text(encoding="utf-8").strip().replace("### ", "#### "),
        "### Figures",
        *others,
    ]
    between(arguments.page, BEGIN, END, "\n\n".join(whole))
    assets = arguments.page.parent / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for file in [*tables, *arguments.figures]:
        with atomic(assets / file.name) as temporary:
            shutil.copyfile(file, temporary)
        print(assets / file.name, flush=True)


def alternative(stem: str) -> str:
    """Return what a figure shows, for readers who do not see it."""
    if stem.startswith("samples-"):
        model, _, bits = stem.removeprefix("samples-").rpartition("-")
        return (
            f"Samples of {model}: a row for full precision and for each method at {bits.upper()}, a seed in each column"
        )
    return f"{stem.replace('_', ' ')}, a panel for each model"


def origin(file: Path) -> str:
    """Return a sentence that names every commit and every machine that produced the numbers."""
    import pandas as pd

    frame = pd.read_csv(file)[["commit", "machine"]].fillna("unknown")
    # A cell of these columns joins several values with " / ", and most rows have the same values.
    values = {name: " / ".join(dict.fromkeys(" / ".join(column).split(" / "))) for name, column in frame.items()}
    return f"Written by `snakemake readme`, from a run at commit {values['commit']} on {values['machine']}."


def verdicts(main: Path, paired: Path, seeds: Path | None) -> str:
    """Return the verdicts on the last method at the fewest bits, as a list in Markdown.

    With `seeds` the sentences speak about methods, without it about the checkpoints of this run.
    """
    import pandas as pd

    from quest.report.rendering import read_csv
    from quest.report.verdicts import seed_sentences, verdict_sentences

    frame = read_csv(seeds) if seeds else None
    if frame is not None and (frame["versus"] != "").any():
        verdict, n = seed_sentences(frame)[0], frame["n"].max()
        head = f"over quantization seeds {frame['seeds'].iloc[0]}, the methods as configured here (n = {n})"
        caveat = "Intervals hold the spread over images and over seeds"
    else:
        verdict = verdict_sentences(pd.read_csv(paired), pd.read_csv(main)["method"].iloc[-1])[0]
        head = "the checkpoints of this run, of one calibration draw and one quantization seed"
        caveat = "Intervals hold the spread over images alone, so these are verdicts on checkpoints, not on methods"
    lines = [f"- {sentence['text']}" for sentence in verdict["sentences"]]
    caveat += '; nothing is corrected for the number of comparisons, and "not told apart" does not mean equal.'
    return "\n".join([f"At {verdict['bits'].upper()}, {head}:", "", *lines, "", caveat])


def short_table(main: Path, paired: Path) -> str:
    """Return a Markdown table of every model at its fewest bits, with the metrics of HEADLINE that all models have."""
    from quest.metrics import METRICS
    from quest.report.rendering import Column, Table, columns, number, read_csv
    from quest.report.tables import best_values, column_label, metric_cells
    from quest.report.verdicts import HEADLINE

    frame, pairs = read_csv(main), read_csv(paired)
    models = frame.groupby("model", sort=False)
    names = [name for name in HEADLINE if all(name in set(of_model["metric"]) for _, of_model in models)]
    measured = [Column(column_label(name, frame), direction=METRICS[name].better) for name in names]
    table = Table([*columns("model", "method", "bits", "size [MB]", texts=3), *measured], [])
    for model, of_model in models:
        best = best_values(of_model, pairs[pairs["model"] == model])
        bits = of_model["bits"].iloc[-1]
        rows = of_model[(of_model["method"] == "fp") | (of_model["bits"] == bits)]
        for (method, width), cell in rows.groupby(["method", "bits"], sort=False):
            values = metric_cells(cell, names, best, {})
            table.rows.append([model, method, width.upper(), number(cell["size_mb"].iloc[0]), *values])
    size = int(frame["n"].max())
    table.notes = [
        f"One checkpoint of each method (one calibration draw, one quantization seed), n = {size} images. ± is half of "
        "a 95 % interval over images; bold: this checkpoint is better than the runner-up by the paired interval, and "
        "not beyond full precision."
    ]
    return table.markdown()


def paired_table(file: Path) -> str:
    """Return a Markdown table that compares the last method with every other one at the last bits of each model."""
    import pandas as pd

    from quest.metrics import METRICS
    from quest.metrics.comparison import outcome
    from quest.report.rendering import MISSING, Cell, Table, columns, interval

    frame = pd.read_csv(file)
    shown = [name for name in ("kid_64w", "log_latent_mse", "fid_to_fp") if name in set(frame["metric"])]
    frame = frame[(frame["versus"] != "fp") & (frame["bits"] == frame.groupby("model")["bits"].transform("last"))]
    frame = frame[frame["method"] == frame.groupby("model")["method"].transform("last")]
    heads = columns("model", "bits", "method", "versus", *(METRICS[name].label for name in shown), texts=4)
    lines = []
    for names, rows in frame.groupby(["model", "bits", "method", "versus"], sort=False):
        cells = []
        by_metric = {row["metric"]: row for _, row in rows.iterrows()}
        for row in map(by_metric.get, shown):
            if row is None:  # a metric that other models have
                cells.append(MISSING)
                continue
            verdict = outcome(row["better"], row["method"])
            cell = interval(row["difference"], row["low"], row["high"], "best" if verdict == "better" else "")
            cells.append(Cell(row["better"]) if verdict.endswith("diverged") else cell)
        lines.append([*names, *cells])
    footer = (
        "Difference, method minus versus, with half of its paired 95 % interval over images; bold: the checkpoint of "
        "the method is better. One calibration draw and one quantization seed: another can move a difference by more."
    )
    return Table(heads, lines, notes=[footer]).markdown()


if __name__ == "__main__":
    main()
