"""Sentences and tables that answer a question from the results of a run: which row is better in which metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from quest.metrics import METRICS
from quest.metrics.comparison import Comparison
from quest.report import rendering
from quest.report.evidence import Evidence, differences
from quest.report.rendering import NONE, Table, columns, plus_minus
from quest.report.tables import SHOWN

NOT_RUN = "NOT RUN"


@dataclass
class Answer:
    """One section: a question, and the sentences, tables and names of figures that answer it."""

    question: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table | str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> None:
        """Add a table; its first column is text."""
        self.tables.append(Table(columns(*heads, texts=1), rows, notes=notes))

    def markdown(self) -> str:
        images = [f"![{name}](figures/{name}.png)" for name in self.figures]
        text = "\n".join(f"- {line}" for line in self.lines)
        return rendering.document("md", f"## {self.question}", text, *self.tables, *images)


def shown(evidence: Evidence) -> list[str]:
    """Return the metrics of SHOWN that the model of the questions has."""
    measured = {row["metric"] for cell in evidence.cells.values() for row in cell["rows"]}
    return [name for name in SHOWN if name in measured]


def against(evidence: Evidence, row: str, versus: str) -> str:
    """Return a sentence that says whether `row` is better than `versus`."""
    compared = differences(evidence, row, versus)
    verdicts = not_run((row, versus), evidence.cells) if compared is None else in_words(compared, versus)
    return f"{row} against {versus}: {verdicts}."


def in_words(compared: dict[str, Comparison], versus: str) -> str:
    """Return the verdicts and differences of all metrics."""
    return ", ".join(with_number(one, f"{one.in_words(versus)} in {METRICS[m].label}") for m, one in compared.items())


def not_run(names: Sequence[str], results: dict) -> str:
    return f"{NOT_RUN} ({', '.join(name for name in names if name not in results)})"


def with_number(one: Comparison, text: str, form: str = "{1} ({0})") -> str:
    """Return the text with the difference; without it if a method diverged."""
    return text if one.verdict == "diverged" else form.format(plus_minus(one.estimate, one.low, one.high), text)


def comparisons(evidence: Evidence, rows: Sequence[str], versus: str) -> Table | str:
    """Return a table that compares rows with `versus`: differences with intervals and verdicts, size and time."""
    metrics = shown(evidence)
    heads = ["row", *(f"{METRICS[m].label}, minus {versus}" for m in metrics), "size [MB]", "seconds"]
    missing = [row for row in (versus, *rows) if row not in evidence.cells]
    if versus in missing:
        return f"{NOT_RUN}: {', '.join(missing)}."
    lines = []
    for row in (row for row in (versus, *rows) if row not in missing):
        size = evidence.cells[row]["footprint"].get("bytes", math.nan) / 1e6
        cost = [f"{size:.3f}", seconds(evidence, row)]
        texts = {m: value(evidence.cells[row], m) for m in metrics}
        if row != versus:
            compared = differences(evidence, row, versus)
            texts = {m: with_number(one, one.in_words(versus), "{0} ({1})") for m, one in compared.items()}
        lines.append([row, *(texts.get(m, NONE) for m in metrics), *cost])
    below = f"The first row is {versus} itself, with its own values; the others are differences."
    if missing:
        below += f" {NOT_RUN}: {', '.join(missing)}."
    return Table(columns(*heads, texts=1), lines, notes=[below])


def value(cell: dict, metric: str) -> str:
    """Return the value of a metric with its interval, or a dash."""
    row = next((r for r in cell["rows"] if r["metric"] == metric), None)
    return plus_minus(row["value"], row["low"], row["high"]) if row else NONE


def seconds(evidence: Evidence, row: str) -> str:
    """Return the seconds that quantizing a row took, plus those of the checkpoint it started from."""
    if (effort := evidence.efforts.get(row)) is None:
        return NONE
    before = effort["seconds_before"]
    return count(effort["seconds"]) + (f" + {before:.0f}" if before > 0 else "")


def count(value: float) -> str:
    """Return a whole number with commas, or a dash for what a checkpoint does not state."""
    return f"{value:,.0f}" if math.isfinite(value) else NONE
