"""A run as one HTML file that opens offline: verdicts, tables, images and figures, all inside it. Needs no torch.

Everything is taken from what a run wrote. What other rules make (`snakemake seeds`, ...) is shown where it is there;
where it is not, its section says NOT RUN and what would make it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt

from quest.metrics import METRICS
from quest.report import figures, ledger, style, tables
from quest.report.page_images import drawings, farthest, grids, illustrated, picture
from quest.report.page_tables import (
    PROVENANCE,
    cost_table,
    csv_table,
    ledger_table,
    main_table,
    paired_table,
    read,
    speed_table,
)
from quest.report.verdicts import comparisons, seed_matrix, seed_sentences, verdict_matrix, verdict_sentences
from quest.runtime.files import atomic

DRAWN = ("latent_mse", "fid_to_fp", "fid", "eps_error", "sfid", "is", "clip", "psnr", "precision")
AGAINST_COST = ("latent_mse", "fid_to_fp", "fid")
# Files that other rules add to the folder of a run, and the target that makes them.
OPTIONAL = {
    "seeds": ("tables/seeds.csv", "snakemake seeds"),
    "ablations": ("tables/ablations.csv", "snakemake ablations"),
    "questions": ("questions/questions.md", "snakemake questions"),
}
KERNELS = "snakemake kernels"


def write(
    run: str | Path,
    output: str | Path,
    template: str | Path,
    *,
    kernels: Iterable[str | Path] = (),
    methods: dict[str, str] | None = None,
    references: str | Path | None = None,
) -> None:
    """Write the report of a finished run, one HTML file without a single link to another.

    run: results/{name}, with its tables, figures and cells. kernels: csv files of kernel timings. methods: what a row
    of the tables is, by its name, with the arXiv ids it goes back to. references: a BibTeX file, of which those
    entries are shown whose `eprint` one of `methods` names. Raises FileNotFoundError for a run without its tables.
    """
    run, template = Path(run), Path(template)
    html = (
        environment(template.parent)
        .get_template(template.name)
        .render(contents(run, kernels, methods or {}, references))
    )
    with atomic(output) as file:
        file.write_text(html, encoding="utf-8")


def environment(folder: Path) -> jinja2.Environment:
    """Templates of a folder; what they print is escaped, and a name they lack is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def contents(run: Path, kernels: Iterable[str | Path], methods: dict[str, str], references) -> dict:
    """All that the template shows, by name."""
    main, paired, verdicts = (read(run / "tables" / name) for name in ("main.csv", "paired.csv", "ledger.csv"))
    shown = list(dict.fromkeys(main["method"]))
    bits = sorted(set(main.loc[main["method"] != "fp", "bits"]), key=tables.by_bits)
    cells = {model: illustrated(run, of_model, bits) for model, of_model in main.groupby("model", sort=False)}
    optional = {name: run / file for name, (file, _) in OPTIONAL.items()}
    found = {name: file if file.is_file() else None for name, file in optional.items()}
    seeds = read(found["seeds"]) if found["seeds"] else None
    return {
        "name": run.name,
        "models": list(cells),
        "bits": bits,
        "legend": [
            (method, style.COLOURS[place % len(style.COLOURS)], style.GLYPHS[place % len(style.GLYPHS)])
            for place, method in enumerate(method for method in shown if method != "fp")
        ],
        "n": int(main["n"].max()),
        "verdicts": verdict_sentences(paired, shown[-1]),
        "matrices": verdict_matrix(paired, shown[-1]),
        "comparisons": comparisons(paired),
        "diverged": paired["better"].str.endswith(" diverged").any(),
        "over_seeds": [] if seeds is None else seed_sentences(seeds),
        "seed_matrices": [] if seeds is None else seed_matrix(seeds),
        "main": main_table(main, paired, verdicts),
        "footers": _footers(main),
        "ledger": ledger_table(verdicts),
        "ledger_counts": _counts(verdicts),
        "grids": [grid for model in cells for grid in grids(model, cells[model], bits)],
        "pairs": [pairs for model in cells for pairs in farthest(model, cells[model], bits)],
        "lowest": bits[-1] if bits else "",
        "paired": paired_table(paired),
        "panels": _panels(main, DRAWN, ("bits",)),
        "cost_panels": _panels(main, AGAINST_COST, ("size_mb", "tbops")),
        "cost": cost_table(run, main),
        "speed": speed_table(run, main),
        "kernels": [_kernels(Path(file)) for file in kernels],
        "over_time": drawings(run, "eps_error_vs_timestep"),
        "sensitivity": drawings(run, "sensitivity*"),
        "activations": drawings(run, "activation*", "imbalance*", "temporal*"),
        "seeds": csv_table(found["seeds"]) if found["seeds"] else None,
        "ablations": csv_table(found["ablations"]) if found["ablations"] else None,
        "ablation_figures": drawings(run, "ablations*"),
        "questions": markdown(found["questions"]) if found["questions"] else "",
        "targets": {name: target for name, (_, target) in OPTIONAL.items()} | {"kernels": KERNELS},
        "provenance": _provenance(main),
        "methods": {method: methods[method] for method in shown if method in methods},
        "bibtex": _bibtex(references, methods, shown),
    }


def _range(frame, column):
    values = sorted(set(frame[column]))
    return "" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _counts(verdicts):
    counts = verdicts["verdict"].value_counts()
    return {name: int(counts.get(name, 0)) for name in ledger.VERDICTS}


def _kernels(file):
    """Timings of one machine: what stands in Markdown beside the csv file, and every row of a whole step."""
    text = file.with_suffix(".md")
    html = markdown(text) if text.is_file() else ""
    return {"caption": file.stem, "html": html, "table": csv_table(file, "step")}


def _footers(main):
    """By model, what its part of the main table is not to be read without."""
    found = {}
    for model, of_model in main.groupby("model", sort=False):
        names = [name for name in METRICS if name in set(of_model["metric"])]
        found[model] = tables.footer(of_model, {name: tables.column_label(name, of_model) for name in names})[0]
    return found


def _provenance(main):
    made = {name: dict.fromkeys(" / ".join(dict.fromkeys(main[name])).split(" / ")) for name in PROVENANCE}
    return {name: [value or "unknown" for value in values] for name, values in made.items()}


def _panels(main, metrics, axes):
    """Per metric and axis one drawing for each model that has the metric."""
    known = set(main.loc[main["method"] != "fp", "metric"])
    found = []
    for metric, against in ((metric, against) for metric in metrics for against in axes if metric in known):
        rows = main[main["metric"] == metric]
        drawings = [figures.quality(main, model, metric, against) for model in dict.fromkeys(rows["model"])]
        title = f"{tables.column_label(metric, rows)} against {figures.AGAINST[against]}"
        found.append({"title": title, "better": METRICS[metric].better, "n": _range(rows, "n"), "drawings": drawings})
    return found


def markdown(path: str | Path) -> str:
    """A Markdown file as HTML, its images inside it. Raises FileNotFoundError for an image that is not there."""
    path = Path(path)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(path.read_text(encoding="utf-8"))

    def inlined(match):
        file = path.parent / match[1]
        if not file.is_file():
            raise FileNotFoundError(f"{path}: shows {match[1]}, which is not there")
        return f'src="{picture(file)}"'

    html = re.sub(r'src="([^"]+)"', inlined, html)
    html = re.sub(r"<(/?)h([1-4])>", lambda match: f"<{match[1]}h{int(match[2]) + 2}>", html)  # the page's own are 1, 2
    html = html.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", html)  # a link to a file would leave the report


def _bibtex(references, methods, shown):
    """Entries whose eprint a method of this run names, in the order of the file."""
    if references is None:
        return ""
    entries = re.findall(r"^@.*?^}", Path(references).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    named = " ".join(methods.get(method, "") for method in shown)
    return "\n\n".join(entry for entry in entries if re.search(r"eprint\s*=\s*\{(.*?)\}", entry)[1] in named)
