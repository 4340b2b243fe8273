import numpy as np
import pandas as pd
import pytest
from drawn import measured, stored

from quest.metrics import intervals
from quest.report import ledger, paper

COMMON = np.random.default_rng(0).normal(size=intervals.RESAMPLES)


def cell(model, method, bits, **values):
    """Resampled values of all cells scatter together."""
    resampled = {name: value + COMMON for name, value in values.items()}
    return measured(model, method, bits, resampled, values, half=2, footprint={"bytes": 3 * 2**20})


CELLS = [
    cell("scenes-uncond", "fp", "w32a32", fid=280.0),
    cell("scenes-uncond", "quest-suite", "w8a8", fid=290.0, sfid=9.0, latent_mse=0.5),
    cell("scenes-uncond", "quest-suite", "w4a8", fid=300.0),
    cell("scenes-class", "quest-suite", "w4a4", fid=400.0),
    cell("scenes-class", "quest-paper", "w4a4", fid=450.0),
    cell("scenes-class", "quest-tla-only", "w4a4", fid=500.0, sfid=20.0),
    cell("scenes-class", "quest-tla-only-no-global", "w4a4", fid=510.0, sfid=19.0),
    cell("lsun-bedrooms", "quest-official", "w4a4", fid=11.0),
]
SPENT = {
    ("scenes-uncond", "quest-suite", "w4a8"): {
        "seconds": 360.0,
        "seconds_before": 720.0,
        "peak_memory": 2000,
        "peak_memory_before": 1000,
        "iterations": 300,
    }
}


def made(number, cells=CELLS[:-1]):
    of_key = {(one["model"], one["method"], one["bits"]): one for one in cells}
    return paper.table(number, of_key, SPENT, ledger.published())


def line(frame, **wanted):
    (found,) = frame[(frame[list(wanted)] == pd.Series(wanted)).all(axis=1)].itertuples()
    return found


def test_a_measured_number_stands_beside_what_the_paper_prints_of_another_model():
    frame = made(3)
    quest = dict(row="quest", bits="w8a8", quantity="fid")
    bedrooms, churches = (line(frame, **quest, stands_for=f"lsun-{name}") for name in ("bedrooms", "churches"))
    assert bedrooms.model == churches.model == "scenes-uncond"
    assert (bedrooms.value, bedrooms.low, bedrooms.high, bedrooms.n) == (290.0, 288.0, 292.0, 500)
    assert (bedrooms.extractor, bedrooms.published_extractor, bedrooms.published_n) == ("scenes", "adm", "50000")
    assert (bedrooms.published, churches.published) == ("3.03", "6.55")
    text = paper.for_people(3, frame).markdown()
    assert "PAPER, lsun-bedrooms: FID (adm)" in text and "| FID (scenes net) |" in text
    assert (
        "| scenes-uncond | quest (quest-suite) | w8a8 | 3 | 290.0 ± 2.0 | 0.5 ± 2.0 | 279.1 | 3.03 | 330.6 | 6.55 |"
        in text
    )
    assert "| scenes-uncond | fp | w32a32 | 3 | 280.0 ± 2.0 | – | 1045.6 | 2.95 | 1125.4 | 4.02 |" in text
    not_run = "NOT RUN | NOT RUN | NOT RUN"
    assert f"| scenes-uncond | ptqd | w4a4 | {not_run} | 148.4 | N/A | 189.9 | N/A |" in text
    assert "(scenes-uncond for lsun-bedrooms, scenes-uncond for lsun-churches): the two are not to be compared" in text


def test_the_papers_own_model_takes_the_place_of_its_stand_in():
    frame = made(3, CELLS)
    assert dict(zip(frame["stands_for"], frame["model"], strict=True)) == {
        "lsun-bedrooms": "lsun-bedrooms",
        "lsun-churches": "scenes-uncond",
    }
    official = line(frame, method="quest-official", bits="w4a4", quantity="fid")
    assert (official.value, official.published, official.row) == (11.0, "5.64", "quest")
    text = paper.for_people(10, made(10, CELLS[-1:])).markdown()
    assert "not to be compared" not in text and "said by the ledger" in text
    assert "| lsun-bedrooms | quest | w8a8 | NOT RUN | NOT RUN | NOT RUN | 6.86 | 2.27 |" in text


def test_rows_of_ablations_bring_their_model_and_bits_along():
    frame = made(6)
    tla = line(frame, row="+ TLA", bits="w4a4", quantity="fid")
    assert (tla.model, tla.method, tla.value, tla.published) == ("scenes-class", "quest-tla-only", 500.0, "")
    both = line(frame, model="scenes-uncond", row="+ TLA + CMA", quantity="hours_in_all")
    assert (both.value, both.published, both.machine) == (0.3, "15.25", "cpu Some CPU")
    assert line(frame, model="scenes-uncond", row="+ TLA", bits="w4a8", quantity="fid").status == "NOT RUN"
    text = paper.for_people(6, frame).markdown()
    assert (
        "| scenes-uncond | + TLA + CMA (quest-suite) | w4a8 | 0.3 | 2000 | 3 | 300.0 ± 2.0 | – | 15.25 | 12178 | "
        "148.4 | 3.26 |" in text
    )
    assert "| scenes-class | + TLA + CMA (quest-paper) | w4a4 | – | – | 3 | 450.0 ± 2.0 |" in text
    assert "one process on cpu Some CPU" in text


def test_changes_are_paired():
    frame = made(7)
    change = line(frame, row="TLA without L_G", quantity="fid_change")
    assert change.value == 10.0 and change.high - change.low < 1e-6  # all cells scatter together
    assert line(frame, row="TLA without L_G", quantity="sfid_change").value == -1.0
    assert line(frame, row="TLA without L_G", quantity="fid").published == "8.99"
    alone = line(frame, row="TLA, L_G alone", quantity="fid_change")
    assert (alone.status, alone.published) == ("NOT RUN", "7.13")
    assert line(frame, row="TLA", quantity="fid_change").status == ""


@pytest.mark.parametrize("number, rows", [(2, 6), (7, 8), (11, 6)])
def test_a_table_of_nothing_reads_not_run(number, rows):
    """Tables 2 and 7 without rows of ablations, whose model the paper does not name, and CIFAR-10 without weights."""
    frame = made(number, CELLS[:2])
    assert set(frame["status"]) == {"NOT RUN"} and (frame["published"] != "").any()
    body = paper.for_people(number, frame).markdown().splitlines()[4 : 4 + rows]
    assert all(text.startswith("| – |") and "NOT RUN" in text for text in body)
    assert "not to be compared" not in paper.for_people(number, frame).markdown()


def test_every_published_row_of_the_tables_is_shown():
    """Nothing of the paper's tables 2 to 11 is lost: each number stands in its table."""
    numbers = ledger.published()
    own = numbers[(numbers["source"] == ledger.PAPER) & numbers["table"].str.match("(text on )?Table")]
    shown = {number: made(number) for number in paper.TABLES}
    for row in own.itertuples():
        frame = shown[int(row.table.split()[-1])]
        printed = "N/A" if np.isnan(row.value) else f"{row.value:g}"
        found = frame[(frame["stands_for"] == row.model) & (frame["published"] == printed)]
        assert len(found), row


def test_files(tmp_path):
    paper.write(stored(CELLS, tmp_path), tmp_path / "tables")
    names = {f"table{number}.{kind}" for number in range(2, 12) for kind in ("csv", "md", "tex")}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == names
    tex = (tmp_path / "tables" / "table6.tex").read_text(encoding="utf-8")
    assert r"scenes-class & + TLA + CMA (quest-paper) & w4a4 & -- & -- & 3 & 450.0 $\pm$ 2.0 & --" in tex
    assert tex.count(r"\begin{tabular}{lllrr") == 1
    again = pd.read_csv(tmp_path / "tables" / "table3.csv", keep_default_na=False, na_values=["nan"])
    assert line(again, method="quest-official", bits="w4a4", quantity="fid").value == 11.0
