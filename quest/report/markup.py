"""Numbers with their intervals and tables, in Markdown and TeX. Needs no torch."""

import math
from collections.abc import Sequence


def plus_minus(value: float, low: float, high: float) -> str:
    """A value and half of its interval, as `with_interval` writes them."""
    return with_interval(value, (high - low) / 2)


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


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table in Markdown; the first `texts` columns are text, the others numbers."""
    return "\n".join(map(markdown_row, [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]))


def markdown_row(texts: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(texts) + " |"


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]], columns: str, caption: str) -> str:
    """A table of booktabs; heads are TeX already, rows and caption plain."""
    return "\n".join(
        [
            r"\begin{table*}[t]",
            r"\centering\small",
            rf"\caption{{{tex(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *(" & ".join(map(tex, row)) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def tex(text: str) -> str:
    """Plain text as TeX."""
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
