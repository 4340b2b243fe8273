"""The tables of the paper (arXiv:2402.03666v6), by number, with its printed values and the values measured here.

If a model of the paper was not run, a model of the zoo replaces it: emoji-uncond or scenes-uncond replaces LSUN,
photos-class or scenes-class ImageNet, and emoji-text or scenes-text Stable Diffusion. These are other models with
another feature extractor, so their numbers cannot be compared with the paper's, which have columns of their own. If the
paper's model was run, the ledger compares them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from quest.metrics import METRICS
from quest.quantization.header import effort
from quest.report import ledger, rendering
from quest.report.cells import read_cells
from quest.report.rendering import columns, plus_minus
from quest.report.tables import PROVENANCE, paired_rows, provenance_of
from quest.runtime.yaml_files import read_yaml

# The models that can represent a model of the paper; the first one that was measured does. Tables 2 and 7 do not state
# their model.
STANDS = {
    "lsun-bedrooms": ("lsun-bedrooms", "emoji-uncond", "scenes-uncond"),
    "lsun-churches": ("lsun-churches", "emoji-uncond", "scenes-uncond"),
    "imagenet": ("imagenet", "photos-class", "scenes-class"),
    "sd14": ("sd14", "emoji-text", "scenes-text"),
    "cifar10": ("cifar10",),
    "unknown": (),
}
# Suffixes of a method's name; each one that was run has a row.
VARIANTS = ("", "-suite", "-paper", "-official", "-as-released")
FP = "w32a32"


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, its method in published.csv ("" for none) and its method in this project."""

    label: str
    paper: str
    cell: str
    versus: str = ""  # the method to which columns such as "change of FID" refer


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper: its models, bits, rows and quantities (columns).

    ablation_only: methods that only ablations run. The table also shows every model and bits that ran one of them.
    """

    title: str
    models: Sequence[str]
    bits: Sequence[str]
    rows: Sequence[Row]
    quantities: Sequence[str]
    ablation_only: Sequence[str] = ()


def _read() -> dict[int, PaperTable]:
    tables = {}
    for number, table in read_yaml(Path(__file__).parents[2] / "resources" / "tables.yaml").items():
        rows = [Row(*(row if isinstance(row, list) else [row] * 3)) for row in table.pop("rows")]
        tables[int(number)] = PaperTable(**table, rows=rows)
    return tables


TABLES = _read()
BESIDE = ("latent_mse",)  # every table shows it, because with few images it separates methods that FID does not
# The names in published.csv of quantities that are measured in another way here.
PUBLISHED_AS = {"hours": "gpu_hours", "hours_in_all": "gpu_hours", "memory": "memory_mb", "memory_in_all": "memory_mb"}
LABELS = {"hours": "hours", "hours_in_all": "hours, AdaRound included", "memory": "peak MB", "memory_in_all": "peak MB"}
LABELS |= {"size_mib": "size [MiB]", "iterations": "iterations"}
LABELS |= {"fid_change": "change of FID", "sfid_change": "change of sFID"}
COLUMNS = ["table", "model", "stands_for", "row", "method", "bits", "quantity", "value", "low", "high", "n"]
COLUMNS += ["extractor", "status", "published", "published_n", "published_extractor", "note"]
COLUMNS += PROVENANCE
NOT_RUN = "NOT RUN"


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write table2 to table11 (.csv, .md, .tex) of the metrics.json files `paths` into `folder`.

    The cost of quantizing a cell comes from the file model.safetensors in the same folder.
    """
    cells = {(cell["model"], cell["method"], cell["bits"]): cell for cell in read_cells(paths)}
    checkpoints = {key: Path(path).with_name("model.safetensors") for key, path in zip(cells, paths, strict=True)}
    efforts = {key: effort(path) for key, path in checkpoints.items() if path.exists()}
    numbers = ledger.published()
    for number in TABLES:
        frame = table(number, cells, efforts, numbers)
        rendering.write(Path(folder, f"table{number}.csv"), frame)
        for kind in ("md", "tex"):
            rendering.write(Path(folder, f"table{number}.{kind}"), for_people(number, frame))


def table(number: int, cells: dict[tuple, dict], efforts: dict[tuple, dict], numbers: pd.DataFrame) -> pd.DataFrame:
    """Return one line per row of the table, bits, quantity and model of the paper, columns COLUMNS.

    cells, efforts: by (model, method, bits). numbers: see `ledger.published`. If a cell was not run, its quantities
    have the status "NOT RUN". A quantity that a cell cannot have has neither value nor status; full precision, for
    example, has no quantization time.
    """
    spec = TABLES[number]
    names = [f"Table {number}", f"text on Table {number}"]
    theirs = numbers[(numbers["source"] == ledger.PAPER) & numbers["table"].isin(names)]
    printed = {(row.model, row.method, row.bits, row.metric): row for row in theirs.itertuples()}
    lines = []
    for model, stands_for in _models(spec, cells):
        for row, method, bits in _cells(spec, model, cells):
            for quantity in (*spec.quantities, *BESIDE):
                measured = _measured(quantity, (model, method, bits), row, cells, efforts)
                for paper_model in stands_for:
                    line = {"table": number, "model": model, "stands_for": paper_model, "row": row.label}
                    line |= {"method": method, "bits": bits, "quantity": quantity}
                    lines.append(line | measured | _published(printed, paper_model, row, bits, quantity))
    return pd.DataFrame(lines, columns=COLUMNS)


def _models(spec, cells) -> list[tuple[str, list[str]]]:
    """Return (measured model, the paper's models that it represents); "–" represents those without a measured model."""
    measured = {model for model, _, _ in cells}
    represented: dict[str, list[str]] = {}
    for paper_model in spec.models:
        if model := next((model for model in STANDS[paper_model] if model in measured), None):
            represented.setdefault(model, []).append(paper_model)
    for model, method, _ in cells:
        if method in spec.ablation_only:
            represented.setdefault(model, spec.models[:1])
    missing = [name for name in spec.models if not any(name in names for names in represented.values())]
    return [*represented.items(), *([("–", missing)] if missing else [])]


def _cells(spec, model, cells):
    """Yield (row, method, bits) of all rows at all bits; full precision occurs once, and variants only if they ran."""
    ablations = [bits for other, method, bits in cells if other == model and method in spec.ablation_only]
    order = list(dict.fromkeys([*spec.bits, *ablations]))
    for bits in [FP, *(order or ["unknown"])]:
        for row in spec.rows:
            if (row.cell == "fp") != (bits == FP):
                continue
            ran = [row.cell + variant for variant in VARIANTS if (model, row.cell + variant, bits) in cells]
            for method in ran or [row.cell]:
                yield row, method, bits


def _measured(quantity, key, row, cells, efforts):
    """Return value, interval, n, extractor, status and provenance of a quantity of a cell."""
    cell = cells.get(key)
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": math.nan, "extractor": ""}
    nothing |= {"status": "" if cell else NOT_RUN}
    if cell is None:
        return nothing
    name = quantity.removesuffix("_change")
    if name in METRICS:
        measured = next((one for one in cell["rows"] if one["metric"] == name), None)
        if quantity != name:
            versus = cells.get((key[0], row.versus, key[2]))
            if measured is None or versus is None:
                return nothing | {"status": NOT_RUN if row.versus and versus is None else ""}
            pair = next(one for one in paired_rows(cell, versus) if one["metric"] == name)
            measured = measured | {"value": pair["difference"], "low": pair["low"], "high": pair["high"]}
        if measured is None:
            return nothing
        values = {column: measured[column] for column in ("value", "low", "high", "n", "extractor")}
        return values | {"status": ""} | provenance_of(name, cell)
    return nothing | {"value": _cost(quantity, cell, efforts.get(key))} | provenance_of("", cell)


def _cost(quantity, cell, effort):
    """Return the size of a cell, or the time, memory or iterations of its quantization."""
    if quantity == "size_mib":
        return cell["footprint"].get("bytes", math.nan) / 2**20
    if effort is None:
        return math.nan
    return {
        "hours": effort["seconds"] / 3600,
        "hours_in_all": (effort["seconds"] + effort["seconds_before"]) / 3600,
        "memory": effort["peak_memory"],
        "memory_in_all": max(effort["peak_memory"], effort["peak_memory_before"]),
        "iterations": effort["iterations"],
    }[quantity]


def _published(printed, model, row, bits, quantity):
    """Return the number that the paper prints as text; "N/A" if its generation failed, "" if it prints none."""
    name = PUBLISHED_AS.get(quantity, quantity)
    number = next((n for b in (bits, "unknown") if (n := printed.get((model, row.paper, b, name)))), None)
    if number is None:
        return dict.fromkeys(("published", "published_n", "published_extractor", "note"), "")
    protocol = ledger.protocol_says(number.protocol)
    return {
        "published": "N/A" if math.isnan(number.value) else f"{number.value:g}",
        "published_n": protocol.get("n", ""),
        "published_extractor": protocol.get("extractor", protocol.get("clip", "")),
        "note": number.note,
    }


def for_people(number: int, frame: pd.DataFrame) -> rendering.Table:
    """Return the table for readers: a row per model and cell, first the measured quantities, then the paper's numbers.

    frame: that of `table`.
    """
    rows_of: dict[tuple, dict] = {}  # cell -> (paper's model, quantity) -> line
    networks: dict[tuple, list[str]] = {}  # (paper's model, quantity) -> feature extractors of the paper's numbers
    for line in frame.itertuples():
        of_cell = rows_of.setdefault((line.model, line.row, line.method, line.bits), {})
        of_cell[line.stands_for, line.quantity] = line
        if line.published:
            networks.setdefault((line.stands_for, line.quantity), []).append(line.published_extractor)
    quantities = list(dict.fromkeys(frame["quantity"]))
    order = [(paper, quantity) for paper in dict.fromkeys(frame["stands_for"]) for quantity in quantities]
    printed = [column for column in order if column in networks]
    heads = ["model", "row", "bits", *(_head(q, frame) for q in quantities)]
    for paper, quantity in printed:
        network = ", ".join(filter(None, dict.fromkeys(networks[paper, quantity])))
        heads.append(f"PAPER, {_model(paper)}: {_plain(quantity)}{f' ({network})' if network else ''}")
    rows, cell_of = [], {row.label: row.cell for row in TABLES[number].rows}
    for (model, label, method, bits), lines in rows_of.items():
        words = [model, label if method == cell_of[label] else f"{label} ({method})", bits]
        measured = {quantity: line for (_, quantity), line in lines.items()}  # equal for every model of the paper
        words += [_text(measured[quantity]) for quantity in quantities]
        words += [lines[column].published or "–" if column in lines else "" for column in printed]
        rows.append(words)
    title, notes = f"Table {number}: {TABLES[number].title}", _footer(frame, printed)
    caption = f"Table {number} of {ledger.PAPER}: {TABLES[number].title}. {' '.join(notes)}"
    return rendering.Table(columns(*heads, texts=3), rows, title, notes, caption)


def _head(quantity, frame):
    networks = [name for name in frame.loc[frame["quantity"] == quantity, "extractor"].unique() if name]
    return _plain(quantity) + (f" ({', '.join(networks)} net)" if networks else "")


def _plain(quantity):
    return LABELS[quantity] if quantity in LABELS else METRICS[quantity].label


def _model(paper):
    return "model not stated" if paper == "unknown" else paper


def _text(line):
    if line.status:
        return line.status
    if line.n > 0:  # metrics have n, costs do not
        return plus_minus(line.value, line.low, line.high)
    if math.isnan(line.value):
        return "–"
    return f"{line.value:.3g}" if line.value < 1000 else f"{line.value:.0f}"


def _footer(frame, printed):
    sizes = ", ".join(f"{int(n)}" for n in sorted(set(frame["n"].dropna())))
    lines = [
        f"Measured here: ± is half of a 95 % interval{f', n = {sizes}' if sizes else ''}. Changes are paired on the "
        "same seeds. NOT RUN: no cell of this configuration. –: nothing to state."
    ]
    if any(quantity in PUBLISHED_AS for quantity in frame["quantity"]):
        machines = ", ".join(m for m in frame["machine"].dropna().unique() if m)
        lines.append(f"Hours and peak memory here are of one process on {machines or 'no machine'}.")
    if printed:
        lines.append(f"PAPER: printed in {ledger.PAPER}; N/A: generation failed there.{_comparable(_pairs(frame))}")
    notes = dict.fromkeys(part for note in frame["note"].dropna() for part in note.split("; "))
    notes = [note for note in notes if note and not note.startswith("N/A")]
    if notes:
        lines.append(f"Of the paper's numbers: {'; '.join(notes)}.")
    return lines


def _comparable(pairs):
    """Return a sentence that says whether measured and printed numbers may be compared."""
    others = [f"{model} for {paper}" for model, paper in pairs if model != paper]
    if others:
        return (
            " Its models, feature extractor (ADM's Inception, or CLIP ViT-B/16) and numbers of images are others "
            f"({', '.join(others)}): the two are not to be compared; at most the order of methods is."
        )
    return " Whether a number here may be compared with it is said by the ledger." if pairs else ""


def _pairs(frame):
    """Return each measured model with the model of the paper that it represents."""
    pairs = dict.fromkeys(zip(frame["model"], frame["stands_for"], strict=True))
    return [(model, _model(paper)) for model, paper in pairs if model != "–"]
