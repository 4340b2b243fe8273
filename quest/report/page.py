"""A run as one HTML file that opens offline: verdicts, tables, images and figures, all inside it. Needs no torch.

Everything is taken from what a run wrote. What other rules make (`snakemake seeds`, ...) is shown where it is there;
where it is not, its section says NOT RUN and what would make it.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open

from quest.files import atomic
from quest.metrics import METRICS, Cell
from quest.report import figures, ledger, style, tables

HEADLINE = ("latent_mse", "fid_to_fp", "fid", "clip")  # of the verdicts, where a run has them
DRAWN = ("latent_mse", "fid_to_fp", "fid", "eps_error", "sfid", "is", "clip", "psnr", "precision")
AGAINST_COST = ("latent_mse", "fid_to_fp", "fid")
SIDE = 128  # pixels, above which images are shown smaller
COLUMNS, PAIRS = 8, 6  # images in a row of a sample grid, and of the pairs that are farthest apart
PROVENANCE = ("commit", "machine", "versions", "seeds")
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
    main, paired, verdicts = (_table(run / "tables" / name) for name in ("main.csv", "paired.csv", "ledger.csv"))
    shown = list(dict.fromkeys(main["method"]))
    bits = sorted(set(main.loc[main["method"] != "fp", "bits"]), key=tables.by_bits)
    cells = {model: _cells(run, of_model, bits) for model, of_model in main.groupby("model", sort=False)}
    optional = {name: run / file for name, (file, _) in OPTIONAL.items()}
    found = {name: file if file.is_file() else None for name, file in optional.items()}
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
        "comparisons": _comparisons(paired),
        "over_seeds": seed_sentences(_table(found["seeds"])) if found["seeds"] else [],
        "main": main_table(main, paired, verdicts),
        "footers": _footers(main),
        "ledger": ledger_table(verdicts),
        "ledger_counts": _counts(verdicts),
        "grids": [grid for model in cells for grid in _grids(model, cells[model], bits)],
        "pairs": [pairs for model in cells for pairs in farthest(model, cells[model], bits)],
        "lowest": bits[-1] if bits else "",
        "paired": paired_table(paired),
        "panels": _panels(main, DRAWN, ("bits",)),
        "cost_panels": _panels(main, AGAINST_COST, ("size_mb", "tbops")),
        "cost": cost_table(run, main),
        "speed": speed_table(run, main),
        "kernels": [_kernels(Path(file)) for file in kernels],
        "over_time": _figures(run, "eps_error_vs_timestep"),
        "sensitivity": _figures(run, "sensitivity*"),
        "activations": _figures(run, "activation*", "imbalance*", "temporal*"),
        "seeds": csv_table(found["seeds"]) if found["seeds"] else None,
        "ablations": csv_table(found["ablations"]) if found["ablations"] else None,
        "ablation_figures": _figures(run, "ablations*"),
        "questions": markdown(found["questions"]) if found["questions"] else "",
        "targets": {name: target for name, (_, target) in OPTIONAL.items()} | {"kernels": KERNELS},
        "provenance": _provenance(main),
        "methods": {method: methods[method] for method in shown if method in methods},
        "bibtex": _bibtex(references, methods, shown),
    }


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=["nan"])


# Verdicts


def verdict_sentences(paired: pd.DataFrame, focus: str) -> list[dict]:
    """One method against every other and against full precision, fewest bits first.

    Returns [{bits, sentences}]. A method is called better on a model where the paired interval of the difference
    excludes 0, and otherwise nothing is said than that the two are not told apart.
    """
    of_focus = paired[paired["method"] == focus]
    models = list(dict.fromkeys(of_focus["model"]))
    found = []
    for bits in sorted(set(of_focus["bits"]), key=tables.by_bits, reverse=True):
        rows = of_focus[of_focus["bits"] == bits]
        alike: dict[tuple, dict[str, list]] = {}
        for (versus, metric), cell in rows.groupby(["versus", "metric"], sort=False):
            if metric not in HEADLINE:
                continue
            better = cell.set_index("model")["better"].reindex(models).dropna()
            outcome = tuple(
                tuple(model for model, name in better.items() if name == winner)
                for winner in (focus, versus, "neither")
            )
            group = alike.setdefault((outcome, versus == "fp"), {})
            group.setdefault(versus, []).append(metric)
        sentences = []
        for (outcome, _), by_rival in alike.items():
            same: dict[tuple, list] = {}
            for versus, metrics in by_rival.items():
                same.setdefault(tuple(metrics), []).append(versus)
            sentences += [_sentence(focus, rivals, metrics, outcome) for metrics, rivals in same.items()]
        found.append({"bits": bits, "sentences": sorted(sentences, key=lambda said: said["order"])})
    return found


def _sentence(focus, rivals, metrics, outcome):
    better, worse, neither = outcome
    total = sum(map(len, outcome))
    against = listed(["full precision" if rival == "fp" else rival for rival in rivals])
    measured = listed([METRICS[name].label for name in sorted(metrics, key=HEADLINE.index)])
    found = [("better", "than", better), ("worse", "than", worse), ("not told apart", "from", neither)]
    said = [
        f"{word}{'' if any(names for _, _, names in found[:place]) else f' {to} {against}'} {_on(on, total)}"
        for place, (word, to, on) in enumerate(found)
        if on
    ]
    kind = "mixed" if better and worse else "better" if better else "worse" if worse else "same"
    text = f"In {measured}, {focus} is {'; '.join(said)}."
    return {"text": text, "kind": kind, "order": (rivals == ["fp"], -len(better), len(worse))}


def _on(names, total):
    if total == 1:
        return f"on {names[0]}"
    if len(names) == total:
        return f"on all {total} models" if total > 2 else "on both models"
    return f"on {len(names)} of {total} models ({listed(names)})"


def listed(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def seed_sentences(seeds: pd.DataFrame) -> list[str]:
    """What holds over quantization seeds, of the pairs of methods in seeds.csv."""
    rows = seeds[(seeds["versus"] != "") & seeds["metric"].isin((*HEADLINE, "eps_error"))]
    sentences = []
    for (model, bits, method, versus), cell in rows.groupby(["model", "bits", "method", "versus"], sort=False):
        groups: dict[str, list] = {}
        for row in cell.itertuples():
            groups.setdefault(row.better, []).append(METRICS[row.metric].label)
        parts = [
            f"not told apart in {listed(labels)}" if better == "neither" else f"{better} better in {listed(labels)}"
            for better, labels in groups.items()
        ]
        number = len(str(cell["seeds"].iloc[0]).split(","))
        sentences.append(f"{model}, {bits.upper()}, {method} against {versus}, {number} seeds: {'; '.join(parts)}.")
    return sentences


def _comparisons(paired):
    rivals = paired[paired["versus"] != "fp"]
    return {"rows": len(rivals), "told_apart": int((rivals["better"] != "neither").sum())}


def _range(frame, column):
    values = sorted(set(frame[column]))
    return "" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


# Tables: {"columns": [...], "rows": [[{"text", "value", "mark"}]]}, `value` what a column is sorted by


def column(label: str, kind: str = "number", better: str = "", choose: bool = False, title: str = "") -> dict:
    """A column: kind "text" or "number", better "lower", "higher" or "", choose for a menu of its values."""
    return {"label": label, "kind": kind, "better": better, "choose": choose, "title": title}


def entry(text: str, value: object = None, mark: str = "", note: str = "") -> dict:
    """A cell of a table: what it says, what it is sorted by (a number as the csv has it), how it is marked."""
    return {"text": text, "value": text if value is None else value, "mark": mark, "note": note}


def number(value: float, form: str = ".4g") -> dict:
    """A cell with a number, or a dash where there is none."""
    missing = value == "" or (isinstance(value, float) and math.isnan(value))
    return entry("–", "") if missing else entry(format(value, form), value)


def interval(value: float, low: float, high: float, mark: str = "", note: str = "") -> dict:
    """A cell with a value ± half of its interval, sorted by the value."""
    if math.isnan(value):
        return entry("–", "")
    return entry(tables.plus_minus(value, low, high), value, mark, note)


def main_table(main: pd.DataFrame, paired: pd.DataFrame, verdicts: pd.DataFrame) -> dict:
    """main.csv with a row for each cell, fewest bits first; the paper's number stands below ours."""
    names = [name for name in METRICS if name in set(main["metric"])]
    columns = [column("model", "text", choose=True), column("method", "text", choose=True)]
    columns += [column("bits", "text", choose=True)]
    columns += [column(tables.column_label(name, main), better=METRICS[name].better) for name in names]
    extra = ["latency_ms"] if "latency_ms" in main else []  # tables of older runs lack it
    columns += [column("size [MB]", better="lower"), column("TBOPs", better="lower")]
    columns += [column("bits per parameter"), column("share on integers", better="higher")]
    columns += [column("latency [ms]", better="lower") for _ in extra]
    judged = verdicts.set_index(["model", "method", "bits", "metric"])["verdict"].to_dict()
    rows = []
    for model, of_model in main.groupby("model", sort=False):
        best = tables.best_values(of_model, paired[paired["model"] == model])
        cells = of_model.groupby(["method", "bits"], sort=False)
        for method, bits in sorted(
            cells.groups, key=lambda run: (run[0] != "fp", [-b for b in tables.by_bits(run[1])])
        ):
            cell = cells.get_group((method, bits)).set_index("metric")
            row = [entry(model), entry(method), entry(bits.upper())]
            for name in names:
                if name not in cell.index:
                    row.append(entry("–", ""))
                    continue
                found, note = cell.loc[name], ""
                if not math.isnan(found["published"]):
                    note = f"paper {found['published']:g}: {judged.get((model, method, bits, name), 'see ledger')}"
                mark = "best" if (method, bits, name) in best else ""
                row.append(interval(found["value"], found["low"], found["high"], mark, note))
            first = cell.iloc[0]
            row += [
                number(first["size_mb"]),
                number(first["bops"] / 1e12, ".3g"),
                number(first["effective_bits"], ".3g"),
            ]
            row += [
                number(first["realizable"], ".0%"),
                *(number(first[name]) | {"note": first["latency_at"]} for name in extra),
            ]
            rows.append(row)
    return {"columns": columns, "rows": rows}


def paired_table(paired: pd.DataFrame) -> dict:
    """paired.csv, with the verdict in words."""
    columns = [column(name, "text", choose=True) for name in ("model", "bits", "metric", "method", "versus")]
    columns += [column("method minus versus"), column("better", "text", choose=True), column("n")]
    rows = []
    for row in paired.itertuples():
        names = [row.model, row.bits.upper(), METRICS[row.metric].label, row.method, row.versus]
        mark = {row.method: "better", row.versus: "worse"}.get(row.better, "")
        difference = interval(row.difference, row.low, row.high, mark)
        rows.append([*map(entry, names), difference, entry(row.better), number(row.n, "d")])
    return {"columns": columns, "rows": rows}


def ledger_table(verdicts: pd.DataFrame) -> dict:
    """ledger.csv: every published number, and ours where there is one that may stand beside it."""
    names = ["model", "method", "bits", "metric"]
    columns = [column(name, "text", choose=True) for name in names]
    columns += [column("published"), column("ours"), column("verdict", "text", choose=True), column("why", "text")]
    columns += [column("source", "text"), column("not stated there", "text"), column("note", "text")]
    rows = []
    for row in verdicts.itertuples():
        cells = [row.model, row.method, row.bits.upper(), METRICS[row.metric].label]
        ours = interval(row.ours, row.low, row.high)
        mark = row.verdict.lower().replace(" ", "-")
        told = [row.why, f"{row.source}, {row.table}", row.not_stated, row.note]
        rows.append([*map(entry, cells), number(row.published), ours, entry(row.verdict, mark=mark), *map(entry, told)])
    return {"columns": columns, "rows": rows}


def _counts(verdicts):
    counts = verdicts["verdict"].value_counts()
    return {name: int(counts.get(name, 0)) for name in ledger.VERDICTS}


def csv_table(path: str | Path) -> dict:
    """Any csv file as a table; columns that say where a row comes from are left out."""
    frame = _table(Path(path))
    frame = frame[[name for name in frame if name not in (*PROVENANCE, "evaluation")]]
    columns, kinds = [], {name: pd.api.types.is_numeric_dtype(frame[name]) for name in frame}
    for name, numeric in kinds.items():
        few = not numeric and frame[name].nunique() <= 12
        columns.append(column(name.replace("_", " "), "number" if numeric else "text", choose=few))
    rows = []
    for record in frame.to_dict("records"):
        row = [
            number(value, "d" if isinstance(value, int) else ".4g") if kinds[name] else entry(str(value))
            for name, value in record.items()
        ]
        if record.get("speedup", 1) < 1:  # a speed that is none has to catch the eye
            row = [cell | {"mark": "slower"} for cell in row]
        rows.append(row)
    return {"columns": columns, "rows": rows}


def cost_table(run: Path, main: pd.DataFrame) -> dict:
    """What quantizing took, as the checkpoints tell, and what their starting points took."""
    columns = [column(name, "text", choose=True) for name in ("model", "method", "bits")]
    columns += [column("quantizing [s]", better="lower"), column("peak memory [MB]", better="lower")]
    columns += [column("starts from", "text"), column("that took [s]"), column("iterations", "text")]
    rows = []
    for model, method, bits in _quantized(main):
        file = run / model / method / bits / "model.safetensors"
        if not file.is_file():
            continue
        with safe_open(file, framework="numpy") as opened:
            header = json.loads(opened.metadata()["quest"])
        start = header.get("init") or {}
        stages = [f"{stage['stage']} {stage['iterations']}" for stage in header.get("cost", {}).get("stages", [])]
        name = f"{start['method']} {start['bits'].upper()}" if start.get("method") else "–"
        row = [entry(model), entry(method), entry(bits.upper()), number(header.get("seconds", math.nan), ".1f")]
        row += [number(header.get("peak_memory", math.nan), ".0f"), entry(name)]
        rows.append([*row, number(start.get("seconds", math.nan), ".1f"), entry(_shortened(stages))])
    return {"columns": columns, "rows": rows}


def _shortened(stages):
    return ", ".join(stages) if len(stages) <= 3 else f"{', '.join(stages[:2])}, … ({len(stages)} units)"


def speed_table(run: Path, main: pd.DataFrame) -> dict:
    """Where the layers of a cell ran, and how long it sampled, set against full precision of the same model."""
    columns = [column(name, "text", choose=True) for name in ("model", "method", "bits", "kernel")]
    columns += [column("share on integers", better="higher"), column("sampling [s per 100 images]", better="lower")]
    columns += [column("times full precision", better="higher"), column("layers refused"), column("deviation")]
    rows, plain = [], {}
    for model, method, bits in _quantized(main, fp=True):
        taken = [_metadata(file) for file in _shards(run / model / method / bits, "samples")]
        if not taken or not all("seconds" in one for one in taken):
            continue
        each = 100 * sum(one["seconds"] for one in taken) / sum(one["seeds"]["n"] for one in taken)
        placed = taken[0].get("kernel") or {}
        if method == "fp":
            plain[model] = each
        ratio = plain[model] / each if model in plain and method != "fp" else math.nan
        row = [entry(model), entry(method), entry(bits.upper()), entry(placed.get("kernel") or "float32")]
        row += [number(taken[0].get("footprint", {}).get("realizable", math.nan), ".0%"), number(each, ".1f")]
        row += [number(ratio, ".2f") | {"mark": "slower" if ratio < 1 else ""}]
        row += [number(len(placed["refused"]), "d") if "refused" in placed else number(math.nan)]
        rows.append([*row, number(placed.get("deviation", math.nan), ".1e")])
    return {"columns": columns, "rows": rows}


def _kernels(file):
    """Timings of one machine: what stands in Markdown beside the csv file, and every row."""
    text = file.with_suffix(".md")
    return csv_table(file) | {"caption": file.stem, "html": markdown(text) if text.is_file() else ""}


def _quantized(main, fp=False):
    """(model, method, bits) of the cells, full precision first if at all."""
    cells = dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    cells = [cell for cell in cells if fp or cell[1] != "fp"]
    models = list(dict.fromkeys(main["model"]))
    return sorted(cells, key=lambda c: (models.index(c[0]), c[1] != "fp", [-b for b in tables.by_bits(c[2])]))


def _shards(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.npz"))


def _metadata(file):
    with np.load(file) as arrays:
        return json.loads(str(arrays["metadata"])) if "metadata" in arrays.files else {}


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


# Images


def _cells(run, of_model, bits):
    """The cells of a model that kept images: full precision, and every method by bits."""
    methods = [method for method in dict.fromkeys(of_model["method"]) if method != "fp"]
    model = of_model["model"].iloc[0]
    found = {}
    for method, width in [("fp", "w32a32"), *((method, width) for width in bits for method in methods)]:
        folder = run / model / method / width
        samples, features = _shards(folder, "samples"), _shards(folder, "features")
        if samples and len(samples) == len(features) and _has_images(samples[0]):
            found[method, width] = Cell.load(features, samples)
    return found


def _has_images(file):
    with np.load(file) as arrays:
        return "images" in arrays.files


def _grids(model, cells, bits):
    """Per bits the first seeds of full precision and of every method, a strip each; fewest bits first."""
    for width in reversed(bits):
        shown = {method: cell for (method, at), cell in cells.items() if at == width}
        if not shown or ("fp", "w32a32") not in cells:
            continue
        rows = [("full precision", cells["fp", "w32a32"]), *shown.items()]
        seeds = cells["fp", "w32a32"].index[:COLUMNS]
        yield {
            "model": model,
            "bits": width,
            "seeds": ", ".join(map(str, seeds)),
            "rows": [(label, strip(cell.images[:COLUMNS])) for label, cell in rows],
        }


def farthest(model: str, cells: dict[tuple[str, str], Cell], bits: list[str]) -> list[dict]:
    """Per method at the fewest bits the images whose extractor features lie farthest from full precision's.

    Euclidean distance of the pooled features at the same seed; worst first.
    """
    full = cells.get(("fp", "w32a32"))
    if full is None or not bits:
        return []
    found = []
    for (method, width), cell in cells.items():
        if width != bits[-1] or not np.array_equal(cell.index, full.index):
            continue
        distance = np.linalg.norm(cell.features["pool"] - full.features["pool"], axis=1)  # [N]
        worst = np.argsort(-distance, kind="stable")[:PAIRS]
        found.append(
            {
                "model": model,
                "method": method,
                "bits": width,
                "seeds": [int(seed) for seed in full.index[worst]],
                "distances": [float(value) for value in distance[worst]],
                "median": float(np.median(distance)),
                "n": len(distance),
                "full": strip(full.images[worst]),
                "quantized": strip(cell.images[worst]),
            }
        )
    return found


def strip(images: np.ndarray) -> dict:
    """Images uint8 [N, H, W, 3] side by side, as {"uri", "width", "height"}; lossless below SIDE pixels."""
    n, height, width, _ = images.shape
    scale = max(1, math.ceil(max(height, width) / SIDE))
    height, width, gap = height // scale, width // scale, 2
    sheet = Image.new("RGBA", (n * (width + gap) - gap, height))
    for place, pixels in enumerate(images):
        picture = Image.fromarray(pixels)
        picture = picture.resize((width, height), Image.Resampling.BOX) if scale > 1 else picture
        sheet.paste(picture, (place * (width + gap), 0))
    return {"uri": _webp(sheet), "width": sheet.width, "height": sheet.height}


def _figures(run, *patterns):
    folders = (run / "figures", run / "questions" / "figures")
    files = [file for pattern in patterns for folder in folders for file in sorted(folder.glob(f"{pattern}.png"))]
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append({"label": file.stem.replace("_", " "), "width": image.width, "height": image.height})
        found[-1]["uri"] = _picture(file)
    return found


def _picture(file):
    """An image file as a data URI, without loss; drawings take half of their PNG."""
    with Image.open(file) as image:
        return _webp(image.convert("RGBA"))


def _webp(image):
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True, quality=100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


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


# Texts


def markdown(path: str | Path) -> str:
    """A Markdown file as HTML, its images inside it. Raises FileNotFoundError for an image that is not there."""
    path = Path(path)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(path.read_text(encoding="utf-8"))

    def inlined(match):
        file = path.parent / match[1]
        if not file.is_file():
            raise FileNotFoundError(f"{path}: shows {match[1]}, which is not there")
        return f'src="{_picture(file)}"'

    html = re.sub(r'src="([^"]+)"', inlined, html)
    html = re.sub(r"<(/?)h([1-4])>", lambda match: f"<{match[1]}h{int(match[2]) + 2}>", html)  # the page's own are 1, 2
    html = html.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")
    return re.sub(r'<a href="(?!https?:)[^"]*">(.*?)</a>', r"\1", html)  # a link to a file would leave the report


def _bibtex(references, methods, shown):
    """Entries whose eprint a method of this run names, in the order of the file."""
    if references is None:
        return ""
    entries = re.split(r"\n(?=@)", Path(references).read_text(encoding="utf-8").strip())
    named = " ".join(methods.get(method, "") for method in shown)
    return "\n\n".join(entry.strip() for entry in entries if re.search(r"eprint\s*=\s*\{(.*?)\}", entry)[1] in named)
