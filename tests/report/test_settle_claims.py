"""What the verdicts say of the claims and of the ten questions, and the pages that are written of it."""

from pathlib import Path

import pandas as pd
import pytest
from test_settle import FAMILIES, FULL, ROWS, evidence, seeds_of

from quest.report import rankings
from quest.report.settle import claims, facts, levels, ten, verdicts
from workflow.scripts import claims as claims_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def judged():
    return verdicts.frame(evidence(*ROWS), FAMILIES)


def test_a_claim_holds_is_refuted_mixed_or_open(judged):
    def word(pairs, expected=("better",), endpoints=("psnr", "kid_64w")):
        claim = claims.Claim("x", "y", pairs, endpoints, expected)
        return claims.word(claim, claims.of_claim(claim, judged))

    both = "(on photos-class, in KID-64w, PSNR to FP [dB]; 2 of 2 comparisons settled)"
    assert word((("good", "plain"),)) == f"holds {both}"
    assert word((("good", "plain"),), expected=("worse",)) == f"refuted {both}"
    half = "holds in part (on photos-class, in KID-64w; 1 of 2 comparisons settled)"
    assert word((("good", "plain"), ("close", "plain")), endpoints=("kid_64w",)) == half
    assert word((("good", "plain"),), endpoints=("psnr", "agreement")).startswith("mixed (on photos-class, in ")
    assert word((("close", "plain"),), endpoints=("kid_64w",)) == word((("a", "b"),)) == "open"


def test_a_table_of_comparisons_has_a_line_for_each_pair_and_a_sign_for_each_verdict(judged):
    claim = claims.Claim("x", "y", (("close", "plain"), ("good", "plain")), ("psnr", "kid_64w"))
    table = claims.comparisons(claim, claims.of_claim(claim, judged))
    assert [column.label for column in table.columns][4:] == ["KID-64w", "PSNR to FP [dB]"]
    assert [row[:2] for row in table.rows] == [["close", "plain"], ["good", "plain"]]
    verdicts_of = judged[judged["model"] == "photos-class"].set_index(["method", "versus", "endpoint"])["verdict"]
    for method, versus, on, _, *shown in table.rows:
        assert on == "photos-class, W4A4"
        for endpoint, text in zip(("kid_64w", "psnr"), shown, strict=True):
            assert text.split()[3] == claims.SIGNS[verdicts_of[method, versus, endpoint]], text


def test_better_than_full_precision_is_a_flag_and_no_success(judged):
    row = judged[(judged["verdict"] == "better") & (judged["endpoint"] == "psnr")].iloc[:1].assign(versus="fp")
    claim = claims.Claim("x", "y", ((row["method"].item(), "fp"),), ("psnr",), ("better", "equivalent"))
    found = claims.of_claim(claim, row)
    assert claims.word(claim, found) == "open (full precision is surpassed, which flags the metric)"
    assert claims.comparisons(claim, found).rows[0][-1].endswith(" flag")


NO_LAYERS = pd.DataFrame(columns=["checkpoint", "median"])


def test_facts_need_records_of_four_methods(judged):
    """Then PSNR and KID, which move together in these records, are found to rank alike."""
    rows = [one for shift in range(8) for one in seeds_of(f"m{shift}", [float(shift)] * 3)]
    main = facts.means(evidence(FULL, *rows))
    assert set(main[main["metric"] == "psnr"]["method"]) == {f"m{shift}" for shift in range(8)}
    word, lines = facts.distances(main, {})
    assert word == "holds" and "rank correlation 1.00" in lines[0] and "over 8 cells" in lines[0]
    assert facts.of(evidence(*ROWS), judged, {}, NO_LAYERS)["distances"] == ("open", [])
    assert facts.means(evidence(*seeds_of("short", [0.0] * 2))).empty


@pytest.mark.parametrize("medians, said", [((0.1, 0.3), "refuted"), ((0.1, 0.1), "open"), ((0.2, 0.2), "open")])
def test_layer_errors_are_joined_to_records_by_their_checkpoint(medians, said):
    """Both methods show what was asked as often as full precision, so none is broken."""
    rows = [FULL]
    for method, median in zip(("one", "other"), medians, strict=True):
        rows += seeds_of(method, [0.0] * 3, checkpoint=str(median) + method)
    layers = pd.DataFrame({"checkpoint": [str(m) + n for m, n in zip(medians, ("one", "other"), strict=True)]})
    found = facts.of(evidence(*rows), pd.DataFrame(columns=verdicts.COLUMNS), {}, layers.assign(median=medians))
    word, lines = found["layer errors"]
    assert word == said and len(lines) == 3


@pytest.mark.parametrize("agreement, said", [(0.2, "holds"), (0.8, "refuted")])
def test_layer_errors_hold_where_both_sides_have_rows(agreement, said):
    """Full precision and one method show what was asked in 9 of 10 images; the other one has a layer error above."""
    cells = [("fp", "w32a32", 0.9), ("fine", "w4a4", 0.9), ("other", "w4a4", agreement)]
    main = pd.DataFrame([("m", *cell) for cell in cells], columns=["model", "method", "bits", "value"])
    layers = pd.DataFrame({"model": "m", "bits": "w4a4", "method": ["fine", "other"], "median": [0.1, 0.3]})
    assert facts.layer_errors(main.assign(metric="agreement"), layers)[0] == said


def test_models_that_are_worse_than_full_precision_do_not_say_that_none_is_better(judged):
    worse = judged.iloc[:1].assign(versus="fp", verdict="worse", model="photos-class")
    word, lines = facts.beyond(pd.concat([worse, worse.assign(model=verdicts.ALL)]), {})
    assert word == "open" and lines == ["0 of 1 settled comparisons with full precision seem better than it"]


def test_the_page_of_claims_is_what_the_records_say():
    """`python -m workflow.scripts.claims` writes it anew after records were added."""
    text, answers, found, runs, _ = claims_script.made()
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == text
    assert (ROOT / "docs" / "questions.md").read_text(encoding="utf-8") == answers
    kept = pd.read_csv(ROOT / "docs" / "assets" / "lottery.csv")
    assert kept["deviation"].tolist() == pytest.approx(found["deviation"].tolist())
    ranked = pd.concat([rankings.frame(*tables) for tables in runs.values()])
    kept = pd.read_csv(ROOT / "docs" / "assets" / "rankings.csv")
    assert kept["rho"].tolist() == pytest.approx(ranked["rho"].tolist())


def test_the_pages_are_replaced_and_never_half_written(tmp_path, monkeypatch):
    frame = pd.DataFrame({"rho": [1.0]})
    monkeypatch.setattr(claims_script, "ROOT", tmp_path)
    monkeypatch.setattr(claims_script, "made", lambda: ("new", "new", frame, {"main.csv": (frame, frame)}, frame))
    monkeypatch.setattr(rankings, "frame", lambda *_: frame)
    monkeypatch.setattr(rankings, "figure", lambda *_: None)
    monkeypatch.setattr(levels, "figure", lambda *_: None)
    monkeypatch.setattr(levels, "granularity_figure", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["claims"])
    (tmp_path / "docs").mkdir()
    for name in ("claims", "questions"):
        (tmp_path / f"docs/{name}.md").write_text("stale", encoding="utf-8")
        (tmp_path / name).hardlink_to(tmp_path / f"docs/{name}.md")  # would change if that were written in place
    claims_script.main()
    for name in ("claims", "questions"):
        texts = [file.read_text(encoding="utf-8") for file in (tmp_path / f"docs/{name}.md", tmp_path / name)]
        assert texts == ["new", "stale"]


def test_conclusions_come_first_and_only_from_records(judged):
    tuned = pd.DataFrame({"model": ["imagenet"], "both": [0.34]})
    main = pd.DataFrame(columns=["model", "method", "bits", "size_mb"])
    text = "these are results of scenes-class at W4A4. \n- quest-cma-tla against quest-suite: worse (-1 ± 0.5).\n"
    sources = ten.Sources({"tuned.csv": tuned, "main.csv": main}, text)
    one = ten.Question("Is it ahead?", "It is.", "It is not.", (("good", "plain"),), needs="more", answer="By design.")
    assert "**It depends on the model and the endpoint.**" in ten._section(1, one, judged, {}, sources)
    psnr = judged[judged["endpoint"] == "psnr"]
    assert ten._section(1, one, psnr, {}, sources).split("\n")[2].startswith("**It is.**")
    reverse = psnr.assign(verdict=psnr["verdict"].replace({"better": "worse"}))
    assert "**It is not.**" in ten._section(1, one, reverse, {}, sources)
    nothing = ten._section(1, one, psnr.iloc[:0], {}, sources)
    assert "**By design.**" in nothing and "- needs: more" in nothing
    found = ten.finding(("quest-cma-tla", "quest-suite"), text)
    assert found.startswith("scenes-class at W4A4, quest-cma-tla against quest-suite: worse")
    with pytest.raises(ValueError, match="compares quest-joint with quest-suite nowhere"):
        ten.finding(("quest-joint", "quest-suite"), text)
    assert "34% on imagenet" in ten.shares(sources)[0] and ten.sizes(sources) == []
