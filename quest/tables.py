"""From the metrics.json of every cell to tidy tables (csv) and tables for people (Markdown, LaTeX). Needs no torch."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from quest.files import atomic
from quest.metrics import METRICS, compare

PROVENANCE = ["seeds", "versions", "commit", "machine"]
MAIN = ["model", "method", "bits", "metric", "value", "low", "high", "n", "extractor", "protocol", "note", *PROVENANCE]
PAIRED = ["model", "bits", "metric", "method", "versus", "difference", "low", "high", "n", "better", *PROVENANCE]
EPS_ERROR = ["model", "method", "bits", "call", "timestep", "value", "low", "high", "n", *PROVENANCE]


def write(paths: Sequence[str | Path], folder: str | Path) -> None:
    """Write main.csv, main.md, main.tex, paired.csv and eps_error.csv of the given metrics.json files into `folder`.

    Models and methods keep the order in which the files name them.
    """
    cells = read(paths)
    folder, main, paired = Path(folder), main_frame(cells), paired_frame(cells)
    for name, frame in (("main", main), ("paired", paired), ("eps_error", eps_error_frame(cells))):
        with atomic(folder / f"{name}.csv") as file:
            frame.to_csv(file, index=False, na_rep="nan")
    for suffix, render in (("md", markdown), ("tex", latex)):
        with atomic(folder / f"main.{suffix}") as file:
            file.write_text(render(main, paired), encoding="utf-8")


def read(paths: Sequence[str | Path]) -> list[dict]:
    """Cells as quest.metrics.measure returned them, each with model, method, bits and provenance.

    Raises ValueError, naming the file, for one that lacks something or repeats another's cell.
    """
    cells, seen = [], {}
    for path in paths:
        try:
            cell = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not a json file") from error
        needed = ("model", "method", "bits", "rows", "eps_error", "resampled", "drawn", "provenance")
        missing = [key for key in needed if key not in cell]
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(missing)}")
        unknown = [row["metric"] for row in cell["rows"] if row["metric"] not in METRICS]
        if unknown:
            raise ValueError(f"{path}: metric {unknown[0]!r} is not one of {', '.join(METRICS)}")
        key = (cell["model"], cell["method"], cell["bits"])
        if key in seen:
            raise ValueError(f"{path}: {' '.join(key)} is also in {seen[key]}")
        seen[key] = path
        cells.append(cell)
    return cells


def main_frame(cells: list[dict]) -> pd.DataFrame:
    """One row per cell and metric, columns MAIN."""
    rows = [_name(cell) | row | _provenance(row["metric"], cell) for cell in cells for row in cell["rows"]]
    return pd.DataFrame(rows, columns=MAIN)


def paired_frame(cells: list[dict]) -> pd.DataFrame:
    """Difference "method minus versus", columns PAIRED.

    Of every two methods of one model and bits, and of every method and full precision (`bits` are the method's).
    `better` names the better of the two where the interval excludes 0, else it says "neither". Raises ValueError where
    two cells are not of the same images and protocol.
    """
    rows = []
    for model, of_model in _groups(cells, "model").items():
        full_precision = [cell for cell in of_model if cell["method"] == "fp"]
        for bits, of_bits in _groups([cell for cell in of_model if cell["method"] != "fp"], "bits").items():
            # The later of two methods in the configuration is the one that is held against the earlier.
            pairs = [(b, a) for a, b in itertools.combinations(of_bits, 2)]
            for a, b in pairs + list(itertools.product(of_bits, full_precision)):
                names = {"method": a["method"], "versus": b["method"]}
                try:
                    compared = compare(a, b)
                except ValueError as error:
                    raise ValueError(f"{model} {bits}: {names['method']} against {names['versus']}: {error}") from None
                for row in compared:
                    row["better"] = names.get(row["better"], "neither")
                    rows.append({"model": model, "bits": bits} | names | row | _provenance(row["metric"], a, b))
    return pd.DataFrame(rows, columns=PAIRED)


def eps_error_frame(cells: list[dict]) -> pd.DataFrame:
    """Noise-prediction error by denoiser call, columns EPS_ERROR."""
    rows = [_name(cell) | row | _provenance("eps_error", cell) for cell in cells for row in cell["eps_error"]]
    return pd.DataFrame(rows, columns=EPS_ERROR)


def _groups(cells, key):
    groups = {}
    for cell in cells:
        groups.setdefault(cell[key], []).append(cell)
    return groups


def _name(cell):
    return {key: cell[key] for key in ("model", "method", "bits")}


def _provenance(metric, *cells):
    """Where the rows of these cells come from; what differs between sampling, metrics and cells is joined by " / "."""
    made = [one for cell in cells for one in (*cell.get("sampled", []), cell["provenance"])]

    def joined(describe):
        return " / ".join(dict.fromkeys(filter(None, map(describe, made))))

    drawn = cells[0]["drawn"]
    images = f"0-{drawn['trajectories'] - 1}" if metric == "eps_error" else drawn["images"]
    return {
        "seeds": f"evaluation {images}",
        "versions": joined(lambda p: ", ".join(f"{name} {v}" for name, v in p.get("versions", {}).items() if v)),
        "commit": joined(lambda p: p.get("commit") and p["commit"] + ("-dirty" if p.get("dirty") else "")),
        "machine": joined(lambda p: ", ".join(f"{key} {v}" for key, v in p.get("machine", {}).items() if v)),
    }


def markdown(main: pd.DataFrame, paired: pd.DataFrame) -> str:
    """One table per model for people, in Markdown."""
    blocks = []
    for block in _blocks(main, paired, bold="**{}**"):
        heads = ["method", "bits", *(f"{label} {'↓' if low else '↑'}" for label, low in block["columns"])]
        lines = [f"### {block['model']}", ""]
        lines += [_md_row(heads), _md_row(["---", "---", *["---:"] * len(block["columns"])])]
        lines += [_md_row(row) for row in block["rows"]]
        blocks.append("\n".join([*lines, "", *block["footer"], ""]))
    return "\n".join(blocks)


def _md_row(texts):
    return "| " + " | ".join(texts) + " |"


def latex(main: pd.DataFrame, paired: pd.DataFrame) -> str:
    """One table per model for papers; needs the package booktabs."""
    blocks = []
    for block in _blocks(main, paired, bold=r"\textbf{{{}}}"):
        heads = ["method", "bits"]
        for label, low in block["columns"]:
            arrow = r"$\downarrow$" if low else r"$\uparrow$"
            name, _, network = _tex(label).partition(" (")
            heads.append(rf"\shortstack{{{name} {arrow}\\({network}}}" if network else f"{name} {arrow}")
        rows = [" & ".join([_tex(row[0]), _tex(row[1]), *map(_tex, row[2:])]) + r" \\" for row in block["rows"]]
        footer = " ".join(map(_tex, block["footer"]))
        blocks.append(
            "\n".join(
                [
                    r"\begin{table*}[t]",
                    r"\centering\small",
                    rf"\caption{{{_tex(block['model'])}. {footer}}}",
                    rf"\begin{{tabular}}{{ll{'r' * len(block['columns'])}}}",
                    r"\toprule",
                    " & ".join(heads) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table*}",
                    "",
                ]
            )
        )
    return "\n".join(blocks)


def _tex(text):
    for plain, escaped in {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "±": r"$\pm$",
        "–": "--",
        "<=": r"$\le$",
    }.items():
        text = text.replace(plain, escaped)
    return text


def _blocks(main, paired, bold):
    """What both renderings of one model share: column labels with direction, cells as text, and lines to end with."""
    for model, of_model in main.groupby("model", sort=False):
        names = [name for name in METRICS if name in set(of_model["metric"])]
        heads = {name: _label(name, of_model) for name in names}
        best = _best(of_model, paired[paired["model"] == model])
        shown = of_model.set_index(["method", "bits", "metric"])
        rows = []
        for method, bits in sorted(dict.fromkeys(zip(of_model["method"], of_model["bits"], strict=True)), key=_by_bits):
            texts = []
            for name in names:
                if (method, bits, name) not in shown.index:
                    texts.append("–")
                    continue
                row = shown.loc[(method, bits, name)]
                text = with_interval(row["value"], (row["high"] - row["low"]) / 2)
                texts.append(bold.format(text) if (method, bits, name) in best else text)
            rows.append([method, bits, *texts])
        yield {
            "model": model,
            "columns": [(heads[name], METRICS[name].better == "lower") for name in names],
            "rows": rows,
            "footer": _footer(of_model, heads),
        }


def _by_bits(run):
    """Most bits first; methods of equal bits keep their order."""
    _, bits = run
    weight, activation = (int(part) for part in bits[1:].split("a"))
    return (-weight, -activation)


def _label(name, of_model):
    metric = METRICS[name]
    if metric.network is None:
        return metric.label
    networks = of_model.loc[of_model["metric"] == name, "extractor"].unique()
    suffix = " net" if metric.network == "extractor" else ""
    return f"{metric.label} ({', '.join(networks)}{suffix})"


def _best(of_model, paired):
    """(method, bits, metric) of every best value that differs from the runner-up's by the paired interval."""
    best = set()
    quantized = of_model[(of_model["method"] != "fp") & of_model["value"].notna()]
    for (bits, name), rows in quantized.groupby(["bits", "metric"]):
        ranked = rows.sort_values("value", ascending=METRICS[name].better == "lower")["method"].tolist()
        if len(ranked) < 2:
            continue
        pair = paired[(paired["bits"] == bits) & (paired["metric"] == name)]
        pair = pair[pair[["method", "versus"]].isin(ranked[:2]).all(axis=1)]
        if (pair["better"] == ranked[0]).any():
            best.add((ranked[0], bits, name))
    return best


def with_interval(value: float, half: float) -> str:
    """`value` ± `half`, rounded to two digits of `half`: "12.34 ± 0.56", "(1.234 ± 0.056)e-04"."""
    if not (math.isfinite(value) and math.isfinite(half)):
        return f"{value:.4g}"
    largest = max(abs(value), half)
    if largest and not 1e-2 <= largest < 1e5:
        exponent = math.floor(math.log10(largest))
        return f"({_rounded(value / 10**exponent, half / 10**exponent)})e{exponent:+03d}"
    return _rounded(value, half)


def _rounded(value, half):
    decimals = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 2
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def _footer(of_model, heads):
    protocols = of_model.groupby("metric", sort=False)["protocol"].first()
    common = min(protocols, key=len)
    own = [f"{heads[name]}: {p.removeprefix(common).lstrip('; ')}" for name, p in protocols.items() if p != common]
    sizes = {}
    for (n, seeds), rows in of_model.groupby(["n", "seeds"], sort=False):
        sizes[f"n = {n}, seeds {seeds}"] = [heads[name] for name in rows["metric"].unique()]
    counts = list(sizes)[:1] + [f"{', '.join(labels)}: {size}" for size, labels in list(sizes.items())[1:]]
    lines = [
        f"Protocol: {'; '.join([common, *own])}. {'; '.join(counts)}. "
        "± is half of a 95 % interval: 1.96 bootstrap standard deviations over images (noise-prediction error: over "
        "trajectories, with Student's factor). Only equal n compares. Bold: better than the runner-up at the same "
        "bits, by the paired interval of their difference on the same seeds."
    ]
    notes = of_model[of_model["note"] != ""]
    if len(notes):
        told = [f"{r.method} {r.bits} {heads[r.metric]}: {r.note}" for r in notes.itertuples()]
        lines.append(f"Notes: {'; '.join(told)}.")
    return lines
