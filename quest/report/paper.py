"""The tables of the paper (arXiv:2402.03666v6), by their numbers: what it prints, and what was measured here.

A model of the zoo stands where the paper's own was not run: scenes-uncond for LSUN, scenes-class for ImageNet,
scenes-text for Stable Diffusion. Its numbers are of another model and another feature extractor, so the paper's stand
in columns of their own and are not to be compared with them; where the paper's own model ran, the ledger judges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from quest.metrics import METRICS
from quest.quantization.header import effort
from quest.report import ledger, rendering
from quest.report.rendering import columns, plus_minus
from quest.report.tables import paired_rows, provenance_of, read

# What may stand for a model of the paper, the first that was measured. Tables 2 and 7 do not say which model it was.
STANDS = {
    "lsun-bedrooms": ("lsun-bedrooms", "scenes-uncond"),
    "lsun-churches": ("lsun-churches", "scenes-uncond"),
    "imagenet": ("imagenet", "scenes-class"),
    "sd14": ("sd14", "scenes-text"),
    "cifar10": ("cifar10",),
    "unknown": (),
}
VARIANTS = ("", "-paper", "-official", "-as-released")  # of a method's name, each a row of its own where it was run
FP = "w32a32"


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is called, its method in published.csv ("" for none), and its cell here."""

    label: str
    paper: str
    cell: str
    versus: str = ""  # cell that its changes are measured from


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper. spread: rows that only ablations have; models and bits that ran one of them are shown."""

    title: str
    models: tuple[str, ...]
    bits: tuple[str, ...]
    rows: tuple[Row, ...]
    quantities: tuple[str, ...]
    spread: tuple[str, ...] = ()


def _methods(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, name, name) for name in names)


ALL = ("w8a8", "w4a8", "w4a4")
TABLES = {
    2: PaperTable(
        "Time embeddings: quantized, in full precision, or aligned",
        ("unknown",),
        ("w8a8", "w4a8"),
        (
            Row("PTQ", "time-embedding-ptq", "quest-untuned"),
            Row("full precision", "time-embedding-fp", "quest-untuned-float-time-embedding"),
            Row("L_TLA + L_G", "time-embedding-quest", "quest-tla-only"),
        ),
        ("fid", "sfid"),
        ("quest-untuned", "quest-untuned-float-time-embedding", "quest-tla-only"),
    ),
    3: PaperTable(
        "Unconditional, LSUN",
        ("lsun-bedrooms", "lsun-churches"),
        ALL,
        _methods("fp", "ptq4dm", "q-diffusion", "ptqd", "efficient-dm", "quest"),
        ("size_mib", "fid"),
    ),
    4: PaperTable(
        "By class, ImageNet",
        ("imagenet",),
        ALL,
        _methods("fp", "q-diffusion", "ptqd", "efficient-dm", "quest"),
        ("size_mib", "fid", "sfid", "is"),
    ),
    5: PaperTable(
        "By text, Stable Diffusion v1.4",
        ("sd14",),
        ALL,
        _methods("fp", "q-diffusion", "quest"),
        ("size_mib", "clip"),
    ),
    6: PaperTable(
        "Components and their cost",
        ("lsun-bedrooms",),
        ("w4a8",),
        (
            Row("full precision", "fp", "fp"),
            Row("PTQ (Q-Diffusion)", "q-diffusion", "q-diffusion"),
            Row("baseline (AdaRound)", "adaround", "quest-untuned"),
            Row("baseline, one time group", "", "quest-untuned-groups-1"),
            Row("+ TLA", "quest-tla", "quest-tla-only"),
            Row("+ TLA + CMA", "quest", "quest"),
        ),
        ("hours_in_all", "memory_in_all", "size_mib", "fid"),
        ("quest-untuned", "quest-tla-only"),
    ),
    7: PaperTable(
        "The global loss",
        ("unknown",),
        (),
        (
            Row("TLA without L_G", "quest-tla-without-global", "quest-tla-only-no-global", "quest-tla-only"),
            Row("TLA", "quest-tla", "quest-tla-only"),
            Row("TLA, L_G alone", "quest-tla-only-global", "quest-tla-only-no-local", "quest-tla-only"),
            Row("CMA without L_G", "quest-cma-without-global", "quest-cma-only-no-global", "quest-cma-only"),
            Row("CMA", "", "quest-cma-only"),
            Row("both without L_G", "", "quest-no-global", "quest"),
            Row("both", "", "quest"),
            Row("both, L_G alone", "", "quest-only-global", "quest"),
        ),
        ("fid", "fid_change", "sfid", "sfid_change"),
        ("quest-tla-only-no-global", "quest-no-global", "quest-only-global"),
    ),
    8: PaperTable(
        "Finetuning: EfficientDM, all weights, QuEST",
        ("lsun-bedrooms",),
        ("w4a8", "w4a4"),
        _methods("efficient-dm", "full-finetune", "quest"),
        ("hours", "memory", "iterations", "fid"),
        ("efficient-dm", "full-finetune"),
    ),
    9: PaperTable(
        "TFMQ-DM",
        ("lsun-bedrooms", "imagenet"),
        ("w8a8", "w4a8"),
        _methods("tfmq-dm", "quest"),
        ("fid",),
    ),
    10: PaperTable(
        "LSUN-Bedrooms by sFID and IS",
        ("lsun-bedrooms",),
        ("w8a8", "w4a4"),
        _methods("q-diffusion", "ptqd", "efficient-dm", "quest"),
        ("sfid", "is"),
    ),
    11: PaperTable(
        "CIFAR-10",
        ("cifar10",),
        ("w8a8", "w4a4"),
        _methods("q-diffusion", "efficient-dm", "quest"),
        ("fid",),
    ),
}
BESIDE = ("latent_mse",)  # measured here in every table: on few images it tells methods apart where FID does not
# What the source calls a quantity that is measured here in another way.
PUBLISHED_AS = {"hours": "gpu_hours", "hours_in_all": "gpu_hours", "memory": "memory_mb", "memory_in_all": "memory_mb"}
LABELS = {"hours": "hours", "hours_in_all": "hours, AdaRound included", "memory": "peak MB", "memory_in_all": "peak MB"}
LABELS |= {"size_mib": "size [MiB]", "iterations": "iterations"}
LABELS |= {"fid_change": "change of FID", "sfid_change": "change of sFID"}
COLUMNS = ["table", "model", "stands_for", "row", "method", "bits", "quantity", "value", "low", "high", "n"]
COLUMNS += ["extractor", "status", "published", "published_n", "published_extractor", "note"]
COLUMNS += ["seeds", "versions", "commit", "machine"]
NOT_RUN = "NOT RUN"


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write table2 to table11 (.csv, .md, .tex) of the given metrics.json files into `folder`.

    What making a cell took is read from the model.safetensors beside its file.
    """
    cells = {(cell["model"], cell["method"], cell["bits"]): cell for cell in read(paths)}
    checkpoints = {key: Path(path).with_name("model.safetensors") for key, path in zip(cells, paths, strict=True)}
    spent = {key: effort(path) for key, path in checkpoints.items() if path.exists()}
    numbers = ledger.published()
    for number in TABLES:
        frame = table(number, cells, spent, numbers)
        rendering.write(Path(folder, f"table{number}.csv"), frame)
        for kind in ("md", "tex"):
            rendering.write(Path(folder, f"table{number}.{kind}"), for_people(number, frame))


def table(number: int, cells: dict[tuple, dict], spent: dict[tuple, dict], numbers: pd.DataFrame) -> pd.DataFrame:
    """One line per row of the table, bits, measured or published quantity, and model of the paper; columns COLUMNS.

    cells, spent: by (model, method, bits). A quantity of a cell that was not run has the status "NOT RUN"; one that a
    cell cannot have (full precision took no time to make) has no value and no status.
    """
    spec = TABLES[number]
    names = [f"Table {number}", f"text on Table {number}"]
    theirs = numbers[(numbers["source"] == ledger.PAPER) & numbers["table"].isin(names)]
    printed = {(row.model, row.method, row.bits, row.metric): row for row in theirs.itertuples()}
    lines = []
    for model, stands_for in _models(spec, cells):
        for row, method, bits in _cells(spec, model, cells):
            for quantity in (*spec.quantities, *BESIDE):
                own = _measured(quantity, (model, method, bits), row, cells, spent)
                for paper_model in stands_for:
                    line = {"table": number, "model": model, "stands_for": paper_model, "row": row.label}
                    line |= {"method": method, "bits": bits, "quantity": quantity}
                    lines.append(line | own | _published(printed, paper_model, row, bits, quantity))
    return pd.DataFrame(lines, columns=COLUMNS)


def _models(spec, cells) -> list[tuple[str, list[str]]]:
    """(measured model, the paper's models that it stands for); "–" where nothing does."""
    measured = dict.fromkeys(model for model, _, _ in cells)
    found: dict[str, list[str]] = {}
    for paper_model in spec.models:
        model = next((model for model in STANDS[paper_model] if model in measured), None)
        if model is not None:
            found.setdefault(model, []).append(paper_model)
    for model, method, _ in cells:
        if method in spec.spread:
            found.setdefault(model, list(spec.models[:1]))
    missing = [name for name in spec.models if not any(name in names for names in found.values())]
    return [*found.items(), *([("–", missing)] if missing else [])]


def _cells(spec, model, cells):
    """(row, method of its cell, bits): of every bits all rows, full precision once; variants that were not run hide."""
    spread = [bits for other, method, bits in cells if other == model and method in spec.spread]
    order = list(dict.fromkeys([*spec.bits, *spread]))
    for bits in [FP, *(order or ["unknown"])]:
        for row in spec.rows:
            if (row.cell == "fp") != (bits == FP):
                continue
            ran = [row.cell + variant for variant in VARIANTS if (model, row.cell + variant, bits) in cells]
            for method in ran or [row.cell]:
                yield row, method, bits


def _measured(quantity, key, row, cells, spent):
    """Value, interval, n, extractor, status and provenance of a quantity of a cell."""
    cell, took = cells.get(key), spent.get(key)
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": math.nan, "extractor": ""}
    nothing |= {"status": "" if cell else NOT_RUN}
    if cell is None:
        return nothing
    name = quantity.removesuffix("_change")
    if name in METRICS:
        found = next((own for own in cell["rows"] if own["metric"] == name), None)
        if quantity != name:
            versus = cells.get((key[0], row.versus, key[2]))
            if found is None or versus is None:
                return nothing | {"status": NOT_RUN if row.versus and versus is None else ""}
            pair = next(own for own in paired_rows(cell, versus) if own["metric"] == name)
            found = found | {"value": pair["difference"], "low": pair["low"], "high": pair["high"]}
        if found is None:
            return nothing
        own = {key: found[key] for key in ("value", "low", "high", "n", "extractor")}
        return own | {"status": ""} | provenance_of(name, cell)
    value = _of_cell(quantity, cell, took)
    return nothing | {"value": value} | provenance_of("", cell)


def _of_cell(quantity, cell, took):
    """Size, time, memory and iterations of a cell."""
    if quantity == "size_mib":
        return cell["footprint"].get("bytes", math.nan) / 2**20
    if took is None:
        return math.nan
    return {
        "hours": took["seconds"] / 3600,
        "hours_in_all": (took["seconds"] + took["seconds_before"]) / 3600,
        "memory": took["peak_memory"],
        "memory_in_all": max(took["peak_memory"], took["peak_memory_before"]),
        "iterations": took["iterations"],
    }[quantity]


def _published(printed, model, row, bits, quantity):
    """What the paper prints: its number as text, "N/A" where a generation failed there, "" where it has none."""
    wanted = PUBLISHED_AS.get(quantity, quantity)
    number = next((n for b in (bits, "unknown") if (n := printed.get((model, row.paper, b, wanted)))), None)
    if number is None:
        return {"published": "", "published_n": "", "published_extractor": "", "note": ""}
    says = ledger.protocol_says(number.protocol)
    return {
        "published": "N/A" if math.isnan(number.value) else f"{number.value:g}",
        "published_n": says.get("n", ""),
        "published_extractor": says.get("extractor", says.get("clip", "")),
        "note": number.note,
    }


def for_people(number: int, frame: pd.DataFrame) -> rendering.Table:
    """A row per model and cell; measured quantities first, then the paper's numbers."""
    rows_of: dict[tuple, dict] = {}  # by cell: its lines by paper's model and quantity
    networks: dict[tuple, list[str]] = {}  # of the paper's columns
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
        own = {quantity: line for (_, quantity), line in lines.items()}  # the same for every model of the paper
        words += [_text(own[quantity]) for quantity in quantities]
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
    if line.n > 0:  # a metric
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
    """What measured and printed numbers have to do with each other."""
    others = [f"{model} for {paper}" for model, paper in pairs if model != paper]
    if others:
        return (
            " Its models, feature extractor (ADM's Inception, or CLIP ViT-B/16) and numbers of images are others "
            f"({', '.join(others)}): the two are not to be compared; at most the order of methods is."
        )
    return " Whether a number here may be compared with it is said by the ledger." if pairs else ""


def _pairs(frame):
    """Each measured model with the paper's that it stands for."""
    pairs = dict.fromkeys(zip(frame["model"], frame["stands_for"], strict=True))
    return [(model, _model(paper)) for model, paper in pairs if model != "–"]
