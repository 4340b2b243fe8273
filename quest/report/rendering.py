"""One table in four forms: Markdown, TeX and HTML for readers, CSV for programs. Needs no torch.

A cell holds a value and a text: CSV files hold values, and the other forms show texts. For example:

    >>> cell = interval(0.5, 0.4, 0.6, "best")
    >>> table = Table([Column("method", "text"), Column("FID", direction="lower")], [["quest", cell]])
    >>> print(table.markdown())
    | method | FID ↓ |
    | --- | ---: |
    | quest | **0.50 ± 0.10** |

Each form escapes its own special characters.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from markupsafe import Markup, escape

from quest.runtime.files import write_text

TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"}
TEX |= {"^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "–": "--", "<=": r"$\le$"}
ARROWS = {"lower": "↓", "higher": "↑", "": ""}
NONE = "–"  # the text of a cell without a value


def plus_minus(value: float, low: float, high: float) -> str:
    """Write a value with half of its interval, see `with_interval`."""
    return with_interval(value, (high - low) / 2)


def with_interval(value: float, half: float) -> str:
    """Write `value` ± `half`, rounded to two digits of `half`: "12.34 ± 0.56" or "(1.234 ± 0.056)e-04".

    A value that is not finite is "diverged"; without a finite half, the value stands alone.
    """
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
    """A table cell: its text, the value that sorts it, and a note beside the text.

    mark: "best" is bold; in HTML every mark is the class of the cell.
    """

    text: str
    value: object = None  # None: the text
    mark: str = ""
    note: str = ""


def number(value: float, form: str = ".4g", mark: str = "", note: str = "") -> Cell:
    """Return the cell of a number; NaN and "" become a dash."""
    missing = value == "" or isinstance(value, float) and math.isnan(value)
    return Cell(NONE, math.nan, mark, note) if missing else Cell(format(value, form), value, mark, note)


def interval(value: float, low: float, high: float, mark: str = "", note: str = "") -> Cell:
    """Return the cell of a value ± half of its interval; a value that is not finite is marked as diverged."""
    return Cell(plus_minus(value, low, high), value, mark if math.isfinite(value) else "diverged", note)


MISSING = Cell(NONE, math.nan)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    kind: "text", or "number", which is aligned to the right. direction: which values are better, "lower", "higher" or
    "". choose: whether the HTML table offers a menu of its values.
    """

    label: str
    kind: str = "number"
    direction: str = ""
    choose: bool = False


def columns(*labels: str, texts: int = 0, choose: bool = False) -> list[Column]:
    """Return plain columns; the first `texts` of them hold text, the others numbers."""
    return [Column(label, "text" if place < texts else "number", choose=choose) for place, label in enumerate(labels)]


@dataclass
class Table:
    """Rows of cells under columns; a str is a cell with that text. The title is above the table, the notes below it.

    caption: the TeX table shows it instead of title and notes.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]] = field(default_factory=list)
    title: str = ""
    notes: Sequence[str] = ()
    caption: str = ""

    @classmethod
    def of_frame(cls, frame: pd.DataFrame) -> "Table":
        """Make a table of a frame: numbers have four digits, and text columns of up to 12 values have a menu."""
        kinds = {name: pd.api.types.is_numeric_dtype(frame[name]) for name in frame}
        heads = [
            Column(name, "number" if numeric else "text", choose=not numeric and frame[name].nunique() <= 12)
            for name, numeric in kinds.items()
        ]

        def cell(name, value):
            if kinds[name]:
                return number(value, "d" if isinstance(value, int) else ".4g")
            return Cell("nan" if pd.isna(value) else str(value))

        rows = [[cell(name, value) for name, value in record.items()] for record in frame.to_dict("records")]
        return cls(heads, rows)

    def _cells(self) -> Iterable[list[Cell]]:
        for row in self.rows:
            yield [Cell(cell) if isinstance(cell, str) else cell for cell in row]

    def markdown(self) -> str:
        """Return title, table and notes in Markdown, separated by blank lines."""
        lines = [[f"{column.label} {ARROWS[column.direction]}".rstrip() for column in self.columns]]
        lines += [["---" if column.kind == "text" else "---:" for column in self.columns]]
        for cells in self._cells():
            texts = [f"**{cell.text}**" if cell.mark == "best" else cell.text for cell in cells]
            lines.append([f"{t} ({c.note})" if c.note else t for t, c in zip(texts, cells, strict=True)])
        escaped = [[text.replace("|", r"\|").replace("\n", " ") for text in texts] for texts in lines]
        table = "\n".join("| " + " | ".join(texts) + " |" for texts in escaped)
        return "\n\n".join(filter(None, [f"### {self.title}" if self.title else "", table, "\n".join(self.notes)]))

    def latex(self) -> str:
        """Return a TeX table for the package booktabs. Text in parentheses behind a label is put below the label."""
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
        """Return the values as CSV; a missing one is "nan"."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([column.label for column in self.columns])
        for cells in self._cells():
            lines.writerow(["nan" if pd.isna(v := _value(cell)) else v for cell in cells])
        return text.getvalue().removesuffix("\n")

    def html(self, caption: str, id: str) -> Markup:
        """Return an HTML table that the script of the page can sort and filter, and whose rows can be linked to.

        The id of a row is that of the table and the row's first cells of text, with a number where two are equal.
        """
        heads, rows, ids = [], [], Counter()
        texts = next((n for n, column in enumerate(self.columns) if column.kind != "text"), len(self.columns))
        for column in self.columns:
            better, data = column.direction, " data-choose" if column.choose else ""
            arrow = f' <span title="{better} is better">{ARROWS[better]}</span>' if better else ""
            data = f' data-better="{better}"{data}' if better else data
            heads.append(f'<th scope="col" data-kind="{column.kind}"{data}>{escape(column.label)}{arrow}</th>')
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
            name = re.sub(r"[^\w@]+", "-", " ".join([id, "row", *(cell.text for cell in cells[:texts])]).lower())
            ids[name] += 1
            name += f"-{ids[name]}" if ids[name] > 1 else ""
            rows.append(f'<tr id="{escape(name)}">{"".join(row)}</tr>\n')
        return Markup(
            f'<div class="table" id="{escape(id)}">\n'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
            f"<table data-sortable>\n<caption>{escape(caption)}</caption>\n"
            "<thead><tr>\n" + "\n".join(heads) + "\n</tr></thead>\n<tbody>\n" + "".join(rows) + "</tbody>\n"
            "</table>\n</div>\n</div>\n"
        )


def _value(cell):
    return cell.text if cell.value is None else cell.value


def tex(text: str) -> str:
    """Escape plain text for TeX."""
    return "".join(TEX.get(part, part) for part in re.split(r"(<=|.)", text, flags=re.DOTALL) if part)


def document(form: str, *parts: Table | str) -> str:
    """Join tables and texts in the form "md", "tex" or "csv"; a csv document has a single table."""
    form = {"md": "markdown", "tex": "latex", "csv": "csv"}[form]
    return "\n\n".join(part if isinstance(part, str) else getattr(part, form)() for part in parts)


def read_csv(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a csv file that `write` wrote: "nan" is NaN, and an empty cell is an empty text.

    Raises ValueError, which names the file, for other columns than these.
    """
    frame = pd.read_csv(path, keep_default_na=False, na_values=["nan"])
    if columns is not None and list(frame.columns) != list(columns):
        raise ValueError(f"{path}: columns are {', '.join(frame.columns)}; needed: {', '.join(columns)}")
    return frame


def write(path: str | Path, *parts: Table | str | pd.DataFrame, form: str = "") -> None:
    """Write a `document` in this form (default: the suffix of the path); a frame becomes a table of its columns."""
    parts = [Table.of_frame(part) if isinstance(part, pd.DataFrame) else part for part in parts]
    write_text(path, document(form or Path(path).suffix[1:], *parts) + "\n")
