"""One table in four forms, each with what it has to escape."""

import csv
import math

import pandas as pd
import pytest

from quest.report import rendering
from quest.report.rendering import MISSING, Cell, Column, Table, columns, interval, number


@pytest.fixture
def table():
    heads = [*columns("a|b_c", texts=1, choose=True), Column("FID (adm net)", direction="lower"), Column("n")]
    rows = [
        ["x <y> & 5 %", interval(1.234567, 1.2, 1.3, "best", "1.5"), number(7, "d")],
        [Cell("{z}$^~\\", mark="slower"), interval(math.nan, math.nan, math.nan), MISSING],
    ]
    return Table(heads, rows, "Title", ["± is half.", "<= 4 #"])


def test_markdown(table):
    assert table.markdown() == (
        "### Title\n\n"
        "| a\\|b_c | FID (adm net) ↓ | n |\n"
        "| --- | ---: | ---: |\n"
        "| x <y> & 5 % | **1.235 ± 0.050** (1.5) | 7 |\n"
        "| {z}$^~\\ | diverged | – |\n\n"
        "± is half.\n<= 4 #"
    )


def test_latex(table):
    text = table.latex()
    assert r"\begin{tabular}{lrr}" in text and r"\caption{Title. $\pm$ is half. $\le$ 4 \#}" in text
    assert r"a|b\_c & \shortstack{FID $\downarrow$\\(adm net)} & n \\" in text
    assert r"x <y> \& 5 \% & \textbf{1.235 $\pm$ 0.050} (1.5) & 7 \\" in text
    assert r"\{z\}\$\^{}\~{}\textbackslash{} & diverged & -- \\" in text


def test_csv_has_values_that_programs_read_back(table):
    assert list(csv.reader(table.csv().splitlines())) == [
        ["a|b_c", "FID (adm net)", "n"], ["x <y> & 5 %", "1.234567", "7"], ["{z}$^~\\", "nan", "nan"]
    ]  # fmt: skip


def test_csv_of_a_frame_is_that_of_pandas(tmp_path):
    frame = pd.DataFrame(
        {
            "text": ['a, "b"', "", "c\nd"],
            "float": [0.1 + 0.2, math.nan, 1e-300],
            "whole": [1, 2, 3],
            "mixed": ["x", 1.5, None],
            "sometimes": [500, math.nan, 16],
            "yes": [True, False, True],
        }
    )
    rendering.write(tmp_path / "ours.csv", frame)
    frame.to_csv(tmp_path / "theirs.csv", index=False, na_rep="nan")
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "theirs.csv").read_bytes()


def test_html(table):
    text = table.html('A "caption"', "one")
    assert '<div class="table" id="one">' in text and "<caption>A &#34;caption&#34;</caption>" in text
    assert '<th scope="col" data-kind="text" data-choose>a|b_c</th>' in text
    assert '<td class="number best" data-value="1.234567">1.235 ± 0.050<small>1.5</small></td>' in text
    assert "<td>x &lt;y&gt; &amp; 5 %</td>" in text and '<td class="slower">' in text
    assert '<td class="number diverged" data-value="">diverged</td>' in text  # sorted last


def test_a_file_has_the_form_of_its_suffix(tmp_path, table):
    rendering.write(tmp_path / "a.md", table, "And a text.")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == f"{table.markdown()}\n\nAnd a text.\n"
    rendering.write(tmp_path / "a.txt", table, form="csv")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == f"{table.csv()}\n"


@pytest.mark.parametrize(
    "value, half, text",
    [
        (12.3449, 0.5612, "12.34 ± 0.56"),
        (1234.4, 120.3, "1234 ± 120"),
        (0.000123449, 0.0000056, "(1.234 ± 0.056)e-04"),
        (2345678.0, 45678.0, "(2.346 ± 0.046)e+06"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (float("nan"), float("nan"), "diverged"),
        (1.25, float("nan"), "1.25"),
    ],
)
def test_rounding(value, half, text):
    assert rendering.with_interval(value, half) == text
