"""The report of a run: one HTML file with verdicts, tables, images and figures that opens offline. Needs no torch.

It shows files that the run wrote. Some of them come from other rules, such as `snakemake seeds`. If such a file is
missing, its section says NOT RUN and names the command that makes it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from quest.metrics import METRICS
from quest.quantization.header import read as read_header
from quest.report import figures, ledger, page_tables, style, tables
from quest.report.page_images import drawings, farthest, grids, illustrated, picture
from quest.report.rendering import read_csv
from quest.report.verdicts import comparisons, seed_matrix, seed_sentences, verdict_matrix, verdict_sentences
from quest.runtime.files import dumps, read_json, write_text

DRAWN = ("kid_64w", "latent_mse", "fd_64w_to_fp", "fid_to_fp", "fid", "eps_error", "sfid", "is")
DRAWN += ("clip", "psnr", "precision", "recall")
AGAINST_COST = ("kid_64w", "latent_mse", "fid_to_fp", "fid")
# Files that other rules add to the folder of a run, and the commands that make them.
OPTIONAL = {
    "seeds": ("tables/seeds.csv", "snakemake seeds"),
    "nulls": ("tables/nulls.csv", "snakemake nulls"),
    "rankings": ("tables/rankings.csv", "snakemake rankings"),
    "ablations": ("tables/ablations.csv", "snakemake ablations"),
    "questions": ("questions/questions.md", "snakemake questions"),
}
KERNELS = "snakemake kernels"
LINES, LETTERS = 30, 200  # of a log that the page shows
OF_HEADER = ("method", "bits", "recipe", "init", "seconds", "peak_memory", "diverged")


def write(
    run: str | Path,
    output: str | Path,
    template: str | Path,
    *,
    kernels: Iterable[str | Path] = (),
    methods: dict[str, str] | None = None,
    references: str | Path | None = None,
) -> None:
    """Write the report of a finished run: one HTML file that needs no other file.

    run: the folder results/{name} with its tables, figures and cells. kernels: csv files of kernel timings. methods:
    the description of each method by name, with arXiv ids. references: a BibTeX file; the report shows the entries
    whose `eprint` occurs in a description. Raises FileNotFoundError for a run without tables.
    """
    template = Path(template)
    environment = jinja2.Environment(  # it escapes all values, and an unknown name is an error
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    html = environment.get_template(template.name).render(contents(Path(run), kernels, methods or {}, references))
    write_text(output, html)


def contents(run: Path, kernels: Iterable[str | Path], methods: dict[str, str], references) -> dict:
    """Return all values that the template shows, by name; the arguments are those of `write`."""
    main, paired, verdicts = (read_csv(run / "tables" / name) for name in ("main.csv", "paired.csv", "ledger.csv"))
    shown = list(dict.fromkeys(main["method"]))
    focus = main["method"].iloc[-1]  # the last row of the config
    bits = sorted(set(main.loc[main["method"] != "fp", "bits"]), key=tables.by_bits)
    cells = {model: illustrated(run, of_model, bits) for model, of_model in main.groupby("model", sort=False)}
    optional = {name: run / file for name, (file, _) in OPTIONAL.items() if (run / file).is_file()}
    seeds = read_csv(optional["seeds"]) if "seeds" in optional else None
    verdict_counts = verdicts["verdict"].value_counts()
    return {
        "name": run.name,
        "models": list(cells),
        "bits": bits,
        "legend": [
            (method, style.COLOURS[place % len(style.COLOURS)], style.GLYPHS[place % len(style.GLYPHS)])
            for place, method in enumerate(method for method in shown if method != "fp")
        ],
        "n": int(main["n"].max()),
        "verdicts": verdict_sentences(paired, focus),
        "matrices": verdict_matrix(paired, focus),
        "comparisons": comparisons(paired),
        "diverged": paired["better"].str.endswith(" diverged").any(),
        "over_seeds": [] if seeds is None else seed_sentences(seeds),
        "seed_matrices": [] if seeds is None else seed_matrix(seeds),
        "main": page_tables.main_table(main, paired, verdicts),
        "footers": _footers(main),
        "ledger": page_tables.ledger_table(verdicts),
        "ledger_counts": {name: int(verdict_counts.get(name, 0)) for name in ledger.VERDICTS},
        "grids": [grid for model in cells for grid in grids(model, cells[model], bits)],
        "pairs": [pairs for model in cells for pairs in farthest(model, cells[model], bits)],
        "lowest": bits[-1] if bits else "",
        "details": details(run, main, methods),
        "paired": page_tables.paired_table(paired),
        "panels": _panels(main, DRAWN, ("bits",)),
        "cost_panels": _panels(main, AGAINST_COST, ("size_mb", "tbops")),
        "cost": page_tables.cost_table(run, main),
        "speed": page_tables.speed_table(run, main),
        "kernels": [_kernels(Path(file)) for file in kernels],
        "over_time": drawings(run, "eps_error_vs_timestep"),
        "sensitivity": drawings(run, "sensitivity*"),
        "activations": drawings(run, "activation*", "imbalance*", "temporal*"),
        **{
            name: page_tables.csv_table(optional[name]) if name in optional else None
            for name in ("seeds", "nulls", "rankings", "ablations")
        },
        "ranking_figures": drawings(run, "rankings*"),
        "ablation_figures": drawings(run, "ablations*"),
        "questions": markdown(optional["questions"]) if "questions" in optional else "",
        "targets": {name: target for name, (_, target) in OPTIONAL.items()} | {"kernels": KERNELS},
        "provenance": _provenance(main),
        "methods": {method: methods[method] for method in shown if method in methods},
        "bibtex": _bibtex(references, methods, shown),
    }


def _range(frame, column):
    values = sorted(set(frame[column]))
    return "" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _kernels(file):
    """Return the timings of one machine: the Markdown file beside the csv file, and a table of all whole steps."""
    html = markdown(text) if (text := file.with_suffix(".md")).is_file() else ""
    return {"caption": file.stem, "html": html, "table": page_tables.csv_table(file, "step")}


def _footers(main):
    """Return the first note below the main table of each model."""
    footers = {}
    for model, of_model in main.groupby("model", sort=False):
        names = [name for name in METRICS if name in set(of_model["metric"])]
        footers[model] = tables.footer(of_model, {name: tables.column_label(name, of_model) for name in names})[0]
    return footers


def _provenance(main):
    parts = {name: " / ".join(main[name].unique()).split(" / ") for name in ("commit", "machine", "versions", "seeds")}
    return {name: [value or "unknown" for value in dict.fromkeys(values)] for name, values in parts.items()}


def _panels(main, metrics, axes):
    """Return a panel for each metric and axis, with a drawing for each model that has the metric."""
    measured = set(main.loc[main["method"] != "fp", "metric"])
    panels = []
    for metric, against in ((metric, against) for metric in metrics for against in axes if metric in measured):
        rows = main[main["metric"] == metric]
        drawings = [figures.quality(main, model, metric, against) for model in dict.fromkeys(rows["model"])]
        title = f"{tables.column_label(metric, rows)} against {figures.AGAINST[against]}"
        panels.append({"title": title, "better": METRICS[metric].better, "n": _range(rows, "n"), "drawings": drawings})
    return panels


def markdown(path: str | Path) -> str:
    """Convert a Markdown file to HTML that contains its images. Raises FileNotFoundError for a missing image."""
    path = Path(path)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(path.read_text(encoding="utf-8"))

    def inlined(match):
        file = path.parent / match[1]
        if not file.is_file():
            raise FileNotFoundError(f"{path}: shows {match[1]}, which is not there")
        return f'src="{picture(file)}"'

    html = re.sub(r'src="([^"]+)"', inlined, html)
    html = re.sub(r"<(/?)h([1-4])>", lambda match: f"<{match[1]}h{int(match[2]) + 2}>", html)  # the page uses 1 and 2
    html = html.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", html)  # a link to a file would leave the report


def _bibtex(references, methods, shown):
    """Return the entries whose eprint occurs in the description of a method of this run, in the order of the file."""
    if references is None:
        return ""
    entries = re.findall(r"^@.*?^}", Path(references).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    descriptions = " ".join(methods.get(method, "") for method in shown)
    return "\n\n".join(entry for entry in entries if re.search(r"eprint\s*=\s*\{(.*?)\}", entry)[1] in descriptions)


def details(run: Path, main: pd.DataFrame, methods: dict[str, str]) -> list[dict]:
    """Return {"model", "method", "bits", "about", "parts"} of each cell in main.csv, in its order.

    parts: {title: text}. The recipe is that in the header of the checkpoint, the provenance that of metrics.json,
    Snakemake's benchmarks say what the last run of a job took, and each log stands under its name. What a cell does not
    have is left out.
    """
    cells = dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    found = []
    for model, method, bits in cells:
        folder, parts = run / model / method / bits, {}
        if (checkpoint := folder / "model.safetensors").is_file():
            header = read_header(checkpoint, diverged=True)
            parts["Recipe"] = dumps({k: header[k] for k in OF_HEADER if k in header}, indent=1)
        if (metrics := folder / "metrics.json").is_file():
            parts["Provenance"] = dumps(read_json(metrics)["provenance"], indent=1)
        parts |= {f"Benchmark of {file.stem}": spent(file) for file in sorted(folder.glob("*.tsv"))}
        parts |= {f"End of {log.name}": end(log) for log in sorted(folder.glob("*.log"))}
        about = methods.get(method.partition("@")[0], "")
        found.append({"model": model, "method": method, "bits": bits, "about": about, "parts": parts})
    return found


def spent(file: Path) -> str:
    """What a job took, from the benchmark file that Snakemake wrote. A job that was too short was not measured.

    The file's processor time is left out: Snakemake looks at it every 30 s, so half of a job's can be missing.
    """
    row = pd.read_csv(file, sep="\t", na_values=["-"]).iloc[-1]
    numbers = {"s": row["s"], "MB of memory at most": row["max_rss"]}
    return "\n".join(f"{value:,.0f} {unit}" for unit, value in numbers.items() if pd.notna(value))


def end(log: Path) -> str:
    """Return the last lines of a log; of a line that a progress bar wrote again and again, what it said at last."""
    text = log.read_bytes().decode("utf-8", "replace")  # as text, a carriage return would end a line
    lines = [line.rstrip("\r").rpartition("\r")[2][:LETTERS] for line in text.split("\n")]
    return "\n".join([line for line in lines if line.strip()][-LINES:])
