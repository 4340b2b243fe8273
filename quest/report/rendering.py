"""One table in four forms: Markdown, TeX and HTML for people, CSV for programs. Needs no torch.

A cell holds its value and its text; columns say what the numbers mean, and what a form needs is escaped here.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from markupsafe import Markup, escape

from quest.runtime.files import atomic

TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"}
TEX |= {"^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "–": "--", "<=": r"$\le$"}
ARROWS = {"lower": "↓", "higher": "↑", "": ""}
NONE = "–"  # in a cell without a value


def plus_minus(value: float, low: float, high: float) -> str:
    """A value and half of its interval, as `with_interval` writes them."""
    return with_interval(value, (high - low) / 2)


def with_interval(value: float, half: float) -> str:
    """`value` ± `half`, rounded to two digits of `half`: "12.34 ± 0.56", "(1.234 ± 0.056)e-04"; else "diverged"."""
    if not math.isfinite(value):
        return "diverged"
    if not math.isfinite(half):
        return f"{value:.4g}"
    largest = max(abs(value), half)
    if largest and not 1e-2 <= largest < 1e5:
        exponent = math.floor(math.log10(largest))
        return f"({_rounded(value / 10**exponent, half / 10**exponent)})e{exponent:+03d}"
    return _rounded(value, half)


def _rounded(value, half):
    decimals = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 2
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


@dataclass(frozen=True)
class Cell:
    """What a cell says and is sorted by; mark: "best" is bold, each mark is a class in HTML; note: beside the text."""

    text: str
    value: object = None  # None: the text
    mark: str = ""
    note: str = ""


def number(value: float, form: str = ".4g", mark: str = "", note: str = "") -> Cell:
    """A number, or a dash where there is none."""
    missing = value == "" or isinstance(value, float) and math.isnan(value)
    return Cell(NONE, math.nan, mark, note) if missing else Cell(format(value, form), value, mark, note)


def interval(value: float, low: float, high: float, mark: str = "", note: str = "") -> Cell:
    """A value ± half of its interval, sorted by the value; one that is not finite has diverged."""
    return Cell(plus_minus(value, low, high), value, mark if math.isfinite(value) else "diverged", note)


MISSING = Cell(NONE, math.nan)


@dataclass(frozen=True)
class Column:
    """kind: "text" or "number", which is aligned to the right. direction: what is better, "lower", "higher" or "".

    choose: in HTML, a menu of its values.
    """

    label: str
    kind: str = "number"
    direction: str = ""
    choose: bool = False


def columns(*labels: str, texts: int = 0, choose: bool = False) -> list[Column]:
    """Plain columns, of which the first `texts` are text."""
    return [Column(label, "text" if place < texts else "number", choose=choose) for place, label in enumerate(labels)]


@dataclass
class Table:
    """Rows of cells (a str is a cell of that text) under columns; title, notes: above and below it.

    caption: of the TeX table, in place of title and notes.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]] = field(default_factory=list)
    title: str = ""
    notes: Sequence[str] = ()
    caption: str = ""

    @classmethod
    def of_frame(cls, frame: pd.DataFrame) -> "Table":
        """Every column of a frame; numbers in four digits, texts of few kinds with a menu."""
        kinds = {name: pd.api.types.is_numeric_dtype(frame[name]) for name in frame}
        heads = [
            Column(name, "number" if numeric else "text", choose=not numeric and frame[name].nunique() <= 12)
            for name, numeric in kinds.items()
        ]
        rows = [
            [
                number(value, "d" if isinstance(value, int) else ".4g") if kinds[name] else Cell(_plain(value))
                for name, value in record.items()
            ]
            for record in frame.to_dict("records")
        ]
        return cls(heads, rows)

    def _cells(self) -> Iterable[list[Cell]]:
        for row in self.rows:
            yield [Cell(cell) if isinstance(cell, str) else cell for cell in row]

    def markdown(self) -> str:
        """Title, table and notes, a blank line between them."""
        lines = [[f"{column.label} {ARROWS[column.direction]}".rstrip() for column in self.columns]]
        lines += [["---" if column.kind == "text" else "---:" for column in self.columns]]
        for cells in self._cells():
            texts = [f"**{cell.text}**" if cell.mark == "best" else cell.text for cell in cells]
            lines.append([f"{t} ({c.note})" if c.note else t for t, c in zip(texts, cells, strict=True)])
        escaped = [[text.replace("|", r"\|").replace("\n", " ") for text in texts] for texts in lines]
        table = "\n".join("| " + " | ".join(texts) + " |" for texts in escaped)
        return "\n\n".join(filter(None, [f"### {self.title}" if self.title else "", table, "\n".join(self.notes)]))

    def latex(self) -> str:
        """For papers; needs the package booktabs. What stands in parentheses after a label goes below it."""
        heads, rows = [], []
        for column in self.columns:
            name, _, network = tex(column.label).partition(" (") if column.direction else (tex(column.label), "", "")
            arrow = {"lower": r" $\downarrow$", "higher": r" $\uparrow$", "": ""}[column.direction]
            heads.append(rf"\shortstack{{{name}{arrow}\\({network}}}" if network else f"{name}{arrow}")
        for cells in self._cells():
            texts = [rf"\textbf{{{tex(c.text)}}}" if c.mark == "best" else tex(c.text) for c in cells]
            rows.append([f"{t} ({tex(c.note)})" if c.note else t for t, c in zip(texts, cells, strict=True)])
        caption = self.caption or " ".join([f"{self.title}.", *self.notes])
        kinds = "".join("l" if column.kind == "text" else "r" for column in self.columns)
        return "\n".join(
            [
                r"\begin{table*}[t]",
                r"\centering\small",
                rf"\caption{{{tex(caption)}}}",
                rf"\begin{{tabular}}{{{kinds}}}",
                r"\toprule",
                " & ".join(heads) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table*}",
            ]
        )

    def csv(self) -> str:
        """Values as they are, "nan" where there is none."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([column.label for column in self.columns])
        for cells in self._cells():
            lines.writerow(["nan" if pd.isna(v := _value(cell)) else v for cell in cells])
        return text.getvalue().removesuffix("\n")

    def html(self, caption: str, id: str) -> Markup:
        """A table that the script of the page sorts and filters."""
        heads, rows = [], []
        for column in self.columns:
            better, label = column.direction, escape(column.label)
            arrow = f' <span title="{better} is better">{ARROWS[better]}</span>' if better else ""
            data = (f' data-better="{better}"' if better else "") + (" data-choose" if column.choose else "")
            heads.append(f'<th scope="col" data-kind="{column.kind}"{data}>{label}{arrow}</th>')
        for cells in self._cells():
            row = []
            for column, cell in zip(self.columns, cells, strict=True):
                value, mark = _value(cell), escape(cell.mark)
                sort = "" if pd.isna(value) else escape(value)
                shown = f' class="{mark}"' if mark else ""
                if column.kind == "number":
                    shown = f' class="number{" " if mark else ""}{mark}" data-value="{sort}"'
                note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
                row.append(f"<td{shown}>{escape(cell.text)}{note}</td>")
            rows.append(f"<tr>{''.join(row)}</tr>\n")
        return Markup(
            f'<div class="table" id="{escape(id)}">\n'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
            f"<table data-sortable>\n<caption>{escape(caption)}</caption>\n"
            "<thead><tr>\n" + "\n".join(heads) + "\n</tr></thead>\n<tbody>\n" + "".join(rows) + "</tbody>\n"
            "</table>\n</div>\n</div>\n"
        )


def _value(cell):
    return cell.text if cell.value is None else cell.value


def _plain(value):
    return "nan" if pd.isna(value) else str(value)


def tex(text: str) -> str:
    """Plain text as TeX."""
    return "".join(TEX.get(part, part) for part in re.split(r"(<=|.)", text, flags=re.DOTALL) if part)


def document(form: str, *parts: Table | str) -> str:
    """Tables and texts as "md", "tex" or "csv", which holds one table."""
    form = {"md": "markdown", "tex": "latex", "csv": "csv"}[form]
    return "\n\n".join(part if isinstance(part, str) else getattr(part, form)() for part in parts)


def write(path: str | Path, *parts: Table | str | pd.DataFrame, form: str = "") -> None:
    """Write a `document` of this form (default: the path's suffix); a frame is a table of its columns."""
    parts = [Table.of_frame(part) if isinstance(part, pd.DataFrame) else part for part in parts]
    with atomic(path) as file:
        file.write_text(document(form or Path(path).suffix[1:], *parts) + "\n", encoding="utf-8")
