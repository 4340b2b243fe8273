import json
import math

import numpy as np
import pandas as pd
import pytest
from drawn import measured, stored

from quest.metrics import METRICS, compare, intervals
from quest.report import ledger, rendering, tables
from quest.report.cells import read_cells

MODELS = {"scenes-text": ["fid", "clip", "latent_mse", "eps_error"], "scenes-uncond": ["fid", "latent_mse"]}
# Mean of each method's metrics at 4 bits; full precision is at 1.
LEVELS = {"rtn": 4.0, "rtn-mse": 2.0, "quest": 1.5}
BITS = {"w8a8": 0.001, "w4a4": 1.0}
BYTES = {"w32a32": 40_000_000, "w8a8": 10_234_567, "w4a4": 5_123_456}
FOOTPRINT = {
    "bops": 5e10,
    "effective_bits": 4.5,
    "scale_bits": 24,
    "float_fmas": 7,
    "float_additions": 0,
    "weight_scale_bits": 6,
    "branch_macs": 5,
    "branch_bops": 1280,
    "parameters": 9,
    "macs": 8,
    "kernel": "integer",
    "realizable": 0.9,
    "latency_ms": 81.5,
    "batch": 100,
    "threads": 1,
}


def cell(model, method, bits, spread=0.05):
    """Metrics made of a level per method, with resampled values that go together."""
    common = np.random.default_rng(0).normal(size=intervals.RESAMPLES)
    own = np.random.default_rng(len(method) * 100 + len(bits)).normal(size=intervals.RESAMPLES)
    level = 1 + (LEVELS[method] - 1) * BITS[bits] if method != "fp" else 1.0
    values = {
        name: level if METRICS[name].better == "lower" else 30 / level
        for name in MODELS[model]
        if method != "fp" or not METRICS[name].paired
    }
    resampled = {name: value + spread * common + 0.01 * own for name, value in values.items()}
    timesteps = [951, 901, 901, 1]
    calls = [
        {"call": call, "timestep": t, "value": level, "low": level - 0.1, "high": level + 0.1, "n": 16}
        for call, t in enumerate(timesteps)
    ]
    made = {
        "versions": {"python": "3.12.1", "torch": "2.9.0", "scipy": None},
        "machine": {"cpu": "Some CPU", "cores": 2},
    }
    return measured(
        model,
        method,
        bits,
        resampled,
        values,
        eps_error=[] if method == "fp" else calls,
        drawn={"images": "0-499", "trajectories": 16, "timesteps": timesteps},
        footprint=FOOTPRINT | {"bytes": BYTES[bits]},
        sampled=[made | {"commit": "aaa", "dirty": False}],
        provenance=made | {"commit": "bbb", "dirty": True},
    )


@pytest.fixture
def cells():
    runs = [("fp", "w32a32")] + [(method, bits) for method in LEVELS for bits in BITS]
    return [cell(model, method, bits) for model in MODELS for method, bits in runs]


def shown(cells, form="md"):
    """main.md or main.tex of these cells."""
    return rendering.document(form, *tables.main_tables(tables.main_frame(cells), tables.paired_frame(cells)))


def test_main_frame_is_tidy(cells):
    frame = tables.main_frame(cells)
    assert list(frame.columns) == tables.MAIN
    assert len(frame) == sum(len(c["rows"]) for c in cells)
    assert not frame.duplicated(["model", "method", "bits", "metric"]).any()
    row = frame[(frame.model == "scenes-text") & (frame.method == "quest") & (frame.bits == "w4a4")].iloc[0]
    assert (row.metric, row.value, row.n, row.extractor) == ("fid", 1.5, 500, "scenes")
    assert row.seeds == "evaluation 0-499" and row.commit == "aaa / bbb-dirty"
    assert row.versions == "python 3.12.1, torch 2.9.0" and row.machine == "cpu Some CPU, cores 2"
    assert set(frame[frame.metric == "eps_error"].seeds) == {"evaluation 0-15"}
    assert (row.size_mb, row.bops, row.effective_bits, row.kernel, row.realizable) == (
        5.123456,
        5e10,
        4.5,
        "integer",
        0.9,
    )
    assert (row.scale_bits, row.float_fmas, row.float_additions) == (24, 7, 0)
    assert (row.weight_scale_bits, row.branch_macs, row.branch_bops) == (6, 5, 1280)
    assert (row.latency_ms, row.latency_at) == (81.5, "batch 100, 1 thread")
    assert frame[frame.method == "fp"].size_mb.tolist() == [40.0] * (frame.method == "fp").sum()


def test_rows_that_different_code_made_are_said(cells, tmp_path, capsys):
    def written():
        tables.write(stored(cells, tmp_path), tmp_path)
        return (tmp_path / "main.md").read_text(encoding="utf-8"), capsys.readouterr().err

    for one in cells:
        one["provenance"] = one["sampled"][0]
    text, said = written()
    assert "Made by" not in text and said == ""
    cells[0]["provenance"] = cells[0]["provenance"] | {"commit": "c" * 40, "dirty": True}
    cells[-1]["sampled"] = [cells[-1]["provenance"] | {"versions": {"torch": "2.8.0"}}]
    text, said = written()
    first, last = text.split("### ")[1:]
    assert "Made by 2 commits (aaa, cccccccccccc-dirty)" in first and "package versions" not in first
    assert "Made by 2 sets of package versions" in last and "commits" not in last
    assert [line.partition(",")[0] for line in said.splitlines()] == [
        "Made by 2 commits (aaa",
        "Made by 2 sets of package versions",
    ]


def test_a_cell_of_unknown_size_is_shown_without(cells):
    cells[0]["footprint"] = {}
    frame = tables.main_frame(cells)
    assert (
        frame[(frame.model == "scenes-text") & (frame.method == "fp")][tables.FOOTPRINT]
        .replace("", np.nan)
        .isna()
        .all()
        .all()
    )
    text = shown(cells)
    assert "| fp | w32a32 | – | – | 1.000" in text and "| quest | w4a4 | 5.123 | 0.05 |" in text


def test_paired_frame_has_every_pair_once_and_full_precision(cells):
    frame = tables.paired_frame(cells)
    assert list(frame.columns) == tables.PAIRED
    fid = frame[(frame.model == "scenes-uncond") & (frame.metric == "fid") & (frame.bits == "w4a4")]
    assert list(zip(fid.method, fid.versus, strict=True)) == [
        ("rtn-mse", "rtn"), ("quest", "rtn"), ("quest", "rtn-mse"), ("rtn", "fp"), ("rtn-mse", "fp"), ("quest", "fp")
    ]  # fmt: skip
    assert fid.difference.tolist() == pytest.approx([-2, -2.5, -0.5, 3, 1, 0.5])
    assert fid.better.tolist() == ["rtn-mse", "quest", "quest", "fp", "fp", "fp"]
    assert "latent_mse" not in set(frame[frame.versus == "fp"].metric)
    clip = frame[(frame.metric == "clip") & (frame.bits == "w4a4") & (frame.versus == "rtn")]
    assert clip.better.tolist() == ["rtn-mse", "quest"] and (clip.difference > 0).all()
    # Noise is common to the two, so the paired interval is far narrower than that of either.
    assert (fid.high - fid.low).max() < 0.1 < 2 * 1.96 * 0.05


def test_paired_rows_are_those_of_compare(cells):
    frame = tables.paired_frame(cells)
    by_key = {(c["model"], c["method"], c["bits"]): c for c in cells}
    a, b = (by_key["scenes-text", method, "w8a8"] for method in ("quest", "rtn"))
    ours = frame[(frame.model == "scenes-text") & (frame.bits == "w8a8") & (frame.method == "quest")]
    ours = ours[ours.versus == "rtn"]
    for row, (metric, found) in zip(ours.itertuples(), compare(a, b).items(), strict=True):
        assert (row.metric, row.difference, row.low, row.high) == (metric, found.estimate, found.low, found.high)


def test_eps_error_frame_keeps_every_call(cells):
    frame = tables.eps_error_frame(cells)
    assert list(frame.columns) == tables.EPS_ERROR
    assert len(frame) == len(MODELS) * len(LEVELS) * len(BITS) * 4
    one = frame[(frame.model == "scenes-text") & (frame.method == "rtn") & (frame.bits == "w4a4")]
    assert one.timestep.tolist() == [951, 901, 901, 1] and one.call.tolist() == [0, 1, 2, 3]


def test_markdown_says_network_direction_interval_and_protocol(cells):
    text = shown(cells)
    first, second = text.split("### scenes-uncond")
    assert (
        "| method | bits | size [MB] | TBOPs | FID (scenes net) ↓ | CLIP score (scenes-clip) ↑ | latent MSE to FP ↓ |"
        in first
    )
    assert "CLIP" not in second
    assert "FID ↓" not in text
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        ["| fp", "w32a32"], ["| rtn", "w8a8"], ["| rtn-mse", "w8a8"], ["| quest", "w8a8"],
        ["| rtn", "w4a4"], ["| rtn-mse", "w4a4"], ["| quest", "w4a4"]
    ]  # fmt: skip
    assert "–" in rows[0] and "1.000 ± 0.0" in rows[0][4]
    assert rows[0][2:4] == ["40", "0.05"] and rows[1][2:4] == ["10.23", "0.05"]
    for part in ("plms 20, guidance 3", "n = 500, seeds evaluation 0-499", "n = 16", "1.96 bootstrap standard"):
        assert part in first
    assert all(len(row) == len(rows[0]) for row in rows)


def test_bold_only_where_the_paired_interval_excludes_zero(cells):
    lines = shown(cells).splitlines()
    bold = {tuple(line.split(" | ")[:2]) for line in lines if line.startswith("| ") and "**" in line}
    # At 8 bits the methods lie within each other's noise.
    assert bold == {("| quest", "w4a4")}


def test_notes_stand_below_the_table(cells):
    cells[1]["rows"][0]["note"] = "n = 50 <= 64 dimensions: singular covariance"
    text = shown(cells)
    assert "Notes: rtn w8a8 FID (scenes net): n = 50 <= 64 dimensions: singular covariance." in text


def test_a_note_on_every_row_is_told_once(cells):
    for cell in cells:
        for row in cell["rows"]:
            row["note"] = "few images" if row["metric"] == "fid" else ""
    text = shown(cells)
    assert "Notes: FID (scenes net): few images." in text


def test_a_cell_that_diverged_is_named_everywhere_and_never_bold(cells, tmp_path):
    """As measured, and as null in JSON: its FID, the lowest of all, is of clipped images and counts for nothing."""
    for one in cells:
        if (one["model"], one["method"], one["bits"]) == ("scenes-text", "rtn", "w4a4"):
            rows = {row["metric"]: row for row in one["rows"]}
            rows["fid"]["value"] = 0.1
            rows["latent_mse"] |= {"value": None, "low": None, "high": None}
            one["resampled"]["latent_mse"] = [None] * intervals.RESAMPLES
    tables.write(stored(cells, tmp_path), tmp_path)
    paired = pd.read_csv(tmp_path / "paired.csv")
    chosen = (paired.model == "scenes-text") & (paired.bits == "w4a4")
    broken = paired[chosen & ((paired.method == "rtn") | (paired.versus == "rtn"))]
    assert len(broken) == 2 * 4 + 2 and set(broken.better) == {"rtn diverged"}
    assert set(paired[chosen & (paired.method == "quest") & (paired.versus == "rtn-mse")].better) == {"quest"}
    line = next(
        x for x in (tmp_path / "main.md").read_text(encoding="utf-8").splitlines() if x.startswith("| rtn | w4a4")
    )
    assert "| diverged |" in line and "nan" not in line and "**" not in line
    assert "& diverged &" in (tmp_path / "main.tex").read_text(encoding="utf-8")
    best = next(
        x for x in (tmp_path / "main.md").read_text(encoding="utf-8").splitlines() if x.startswith("| quest | w4a4")
    )
    assert best.count("**") == 8  # the four metrics, against rtn-mse


def test_latex_is_balanced_and_escaped(cells):
    cells[1]["rows"][0]["note"] = "100 % of a_b"
    text = shown(cells, "tex")
    for environment in ("table*", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") == 2
    assert text.count("{") == text.count("}")
    assert all(text.count(rule) == 2 for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"100 \% of a\_b" in text and "±" not in text
    assert r"\shortstack{FID $\downarrow$\\(scenes net)}" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 7 and all(line.count(" & ") == 7 and line.endswith(r"\\") for line in body)
    assert body[-1].count(r"\textbf{") >= 3


@pytest.fixture
def of_the_paper(cells):
    """The cells of scenes-uncond as if they were of the paper's bedrooms, and those of quest of quest-paper."""
    fingerprint = {"sampler": "ddim", "steps": 200, "eta": 1.0, "n": 50_000, "extractor": "adm"}
    drawn = [one for one in cells if one["model"] == "scenes-uncond"]
    names = {"quest": "quest-paper"}
    return [
        one | {"model": "lsun-bedrooms", "method": names.get(one["method"], one["method"]), "fingerprint": fingerprint}
        for one in drawn
    ]


def test_published_numbers_stand_beside_ours(of_the_paper):
    main = tables.main_frame(of_the_paper)
    assert main[(main.method == "quest-paper") & (main.bits == "w4a4") & (main.metric == "fid")].published.tolist() == [
        5.64
    ]
    text = shown(of_the_paper)
    row = next(line for line in text.splitlines() if line.startswith("| quest-paper | w4a4"))
    assert row.split(" | ")[4].endswith("(5.64)") and "(" not in row.split(" | ")[5]
    assert "In parentheses: the number of arXiv:2402.03666v6" in text
    assert "(5.64)" in shown(of_the_paper, "tex")


def test_ledger_counts_verdicts_and_shows_what_was_run(of_the_paper):
    verdicts = ledger.ledger(of_the_paper, ledger.published())
    text = rendering.document("md", *tables.ledger_tables(verdicts))
    counts = dict(
        line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith(("| lsun-b", "| sd14"))
    )
    run = verdicts[(verdicts.verdict != "NOT RUN") & (verdicts.model == "lsun-bedrooms")]
    assert counts["sd14"].startswith("0 | 0 | 0 | 0 | ") and set(run.verdict) <= {"DRIFT", "NOT COMPARABLE"}
    assert sum(map(int, counts["lsun-bedrooms"].split(" | "))) == (verdicts.model == "lsun-bedrooms").sum()
    shown = [line for line in text.splitlines() if line.startswith("| quest")]
    assert len(shown) == (run.method == "quest-paper").sum() > 0 and any("DRIFT | -73.4% ±" in line for line in shown)
    tex = rendering.document("tex", *tables.ledger_tables(verdicts))
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 2 and tex.count("{") == tex.count("}")
    assert r"\%" in tex and "±" not in tex


def test_files(cells, tmp_path):
    cells[1]["rows"][1].update(value=math.nan, low=math.nan, high=math.nan)  # a method that broke down
    tables.write(stored(cells, tmp_path), tmp_path / "tables")
    written = sorted(file.name for file in (tmp_path / "tables").iterdir())
    ledgers = ["ledger.csv", "ledger.md", "ledger.tex"]
    assert written == ["eps_error.csv", *ledgers, "main.csv", "main.md", "main.tex", "paired.csv"]
    main = pd.read_csv(tmp_path / "tables" / "main.csv", keep_default_na=False, na_values=["nan"])
    assert main["value"].isna().sum() == 1
    assert main["published"].isna().all()  # nothing is published of models that the suite drew itself
    pd.testing.assert_frame_equal(main, tables.main_frame(cells), check_dtype=False)


def test_bad_input(cells, tmp_path):
    def file(content, name="metrics.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / name

    with pytest.raises(ValueError, match="metrics.json: not JSON: "):
        read_cells([file("{")])
    with pytest.raises(ValueError, match="metrics.json: lacks resampled, provenance"):
        read_cells([file({k: v for k, v in cells[0].items() if k not in ("resampled", "provenance")})])
    with pytest.raises(ValueError, match="other.json: scenes-text fp w32a32 is also in .*metrics.json"):
        read_cells([file(cells[0]), file(cells[0], "other.json")])
    cells[0]["rows"][0]["metric"] = "FID"
    with pytest.raises(ValueError, match=r"rows\[0\].metric: 'FID' is not one of \['kid_64w', 'fd_64w'"):
        read_cells([file(cells[0])])
    cells[1]["drawn"]["images"] = "0-399"
    with pytest.raises(ValueError, match="scenes-text w8a8: rtn-mse against rtn: .*equal images"):
        tables.paired_frame(cells)


def test_a_cell_may_have_another_draw_than_its_seed(cells, tmp_path):
    cells[0]["method"] = "quest-suite@4.3"
    assert read_cells(stored(cells[:1], tmp_path))[0]["method"] == "quest-suite@4.3"


@pytest.mark.parametrize("name, beyond, short_of", [("fid", 0.5, 1.5), ("clip", 31.0, 29.0)])
def test_a_value_beyond_full_precision_is_not_the_best(name, beyond, short_of):
    full = {"fid": 1.0, "clip": 30.0}[name]
    paired = pd.DataFrame([{"bits": "w4a4", "metric": name, "method": "quest", "versus": "rtn", "better": "quest"}])
    worst = {"fid": 9.0, "clip": 9.0}[name]

    def best(value):
        rows = [("fp", "w32a32", name, full), ("rtn", "w4a4", name, worst), ("quest", "w4a4", name, value)]
        return tables.best_values(pd.DataFrame(rows, columns=["method", "bits", "metric", "value"]), paired)

    assert best(short_of) == {("quest", "w4a4", name)}
    assert best(beyond) == set()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda cell: cell["rows"][0].update(value="4"), r"rows\[0\].value: '4' is not of type 'number'"),
        (lambda cell: cell["rows"][0].update(low=True), r"rows\[0\].low: True is not of type 'number'"),
        (lambda cell: cell["rows"][0].update(n=1.5), r"rows\[0\].n: 1.5 is not of type 'integer'"),
        (lambda cell: cell["rows"][0].pop("note"), r"rows\[0\]: lacks note"),
        (lambda cell: cell.update(rows={}), "rows: {} is not of type 'array'"),
        (lambda cell: cell["rows"].append("fid"), "'fid'"),
        (lambda cell: cell["resampled"].clear(), "rows are of fid, clip, resampled values of "),
        (lambda cell: cell.update(resampled=[1.0]), r"resampled: \[1.0\] is not of type 'object'"),
        (lambda cell: cell["resampled"]["clip"].append("4"), "resampled.clip is no list of numbers, as many as .* fid"),
        (lambda cell: cell["resampled"]["clip"].pop(), "resampled.clip is no list of numbers, as many as those of fid"),
        (lambda cell: cell["provenance"].update(versions=["a"]), "provenance.versions: "),
        (lambda cell: cell.update(method="a/b"), "method: 'a/b' does not match"),
    ],
)
def test_a_field_of_another_kind_is_named(cells, tmp_path, change, words):
    change(cells[0])
    with pytest.raises(ValueError, match=f"metrics.json: .*{words}"):
        read_cells(stored(cells[:1], tmp_path))
