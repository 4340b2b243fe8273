"""The report is one file that says what the tables say."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawn import MADE, METHODS, NOISE

from quest.metrics import METRICS, Cell
from quest.report import page as report
from quest.report import page_images, page_tables, rendering, tables, verdicts
from quest.runtime.files import dumps

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "workflow/report/report.html.j2"


class Page(html.parser.HTMLParser):
    """What a page holds: tables by the id of their box, every address, ids, headings and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.addresses, self.ids, self.sections, self.alts = {}, [], [], {}, []
        self.matrices = []
        self.box = self.row = self.cell = self.section = None
        self.open = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in ("meta", "link", "img", "br", "input") and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        self.addresses += [given[name] for name in ("href", "src", "xlink:href", "srcset", "action") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.alts += [given.get("alt", "")] if tag == "img" else []
        if given.get("class") == "table":
            self.box = self.tables.setdefault(given["id"], [])
        elif given.get("class") == "matrix":
            self.matrices.append([])
            self.box = self.matrices[-1]
        elif tag == "section":
            self.section = given["id"]
            self.sections[self.section] = ""
        elif tag == "tr":
            self.row = []
            self.box.append(self.row)
        elif tag in ("th", "td"):
            self.cell = {"value": given.get("data-value"), "class": given.get("class", ""), "text": ""}
            self.row.append(self.cell)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell["text"] += data
        if self.section:
            self.sections[self.section] += data

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def texts(row):
    return [cell["text"].strip() for cell in row]


def test_everything_is_in_the_one_file(written, page):
    inside = [address for address in page.addresses if address.startswith("#")]
    assert set(inside) <= {f"#{identity}" for identity in page.ids}
    assert all(address.startswith(("#", "data:")) for address in page.addresses), set(page.addresses) - set(inside)
    assert len(page.ids) == len(set(page.ids))
    text = written.read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "fetch(" not in text
    assert all(page.alts) and sum(address.startswith("data:image/webp") for address in page.addresses) > 10
    assert text.count("<svg") > 10


def test_the_main_table_has_the_numbers_of_the_csv(run, page):
    main = pd.read_csv(run / "tables/main.csv", keep_default_na=False, na_values=["nan"])
    head, *rows = page.tables["main-table"]
    metrics = [name for name in METRICS if name in set(main["metric"])]
    assert texts(head)[:3] == ["model", "method", "bits"] and texts(head)[3].startswith("FID (scenes net)")
    shown = {(*texts(row)[:2], texts(row)[2].lower()): row[3:] for row in rows}
    assert len(shown) == len(rows) == 10
    for (model, method, bits, metric), row in main.groupby(["model", "method", "bits", "metric"]):
        cell = shown[model, method, bits][metrics.index(metric)]
        value, low, high = row.iloc[0][["value", "low", "high"]]
        assert float(cell["value"]) == value and cell["text"] == rendering.with_interval(value, (high - low) / 2)
    paired = pd.read_csv(run / "tables/paired.csv")
    for model in ("scenes-uncond", "scenes-class"):
        best = tables.best_values(main[main["model"] == model], paired[paired["model"] == model])
        bold = {
            (method, bits, metrics[place])
            for (of, method, bits), cells in shown.items()
            for place, cell in enumerate(cells)
            if of == model and "best" in cell["class"].split()
        }
        assert bold == best and best


def test_the_paired_table_has_every_row_of_the_csv(run, page):
    paired = pd.read_csv(run / "tables/paired.csv")
    _, *rows = page.tables["paired-table"]
    assert [float(row[5]["value"]) for row in rows] == paired["difference"].tolist()
    assert [row[6]["text"] for row in rows] == paired["better"].tolist()
    marks = {"quest": "better", "rtn": "worse", "fp": "worse", "neither": ""}
    marks |= {f"neither ({doubt})": "" for doubt in ("beyond full precision", "both beyond full precision")}
    for row, better, method in zip(rows, paired["better"], paired["method"], strict=True):
        expected = "better" if better == method else marks[better]
        assert row[5]["class"].replace("number", "").strip() == expected


def test_what_diverged_has_a_mark_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DRAWN", ())
    monkeypatch.setattr(report, "AGAINST_COST", ())
    full = shutil.copytree(run, tmp_path / "tiny")
    for method, model in (("rtn", "scenes-uncond"), ("quest", "scenes-class")):
        file = full / model / method / "w4a4" / "metrics.json"
        cell = json.loads(file.read_text(encoding="utf-8"))
        for row in cell["rows"]:
            row["value"] = float("nan") if row["metric"] == "latent_mse" else row["value"]
        file.write_text(dumps(cell), encoding="utf-8")
    files = sorted(full.glob("*/*/*/metrics.json"), key=lambda file: list(NOISE).index(file.parts[-3]))
    tables.write(files, full / "tables")
    report.write(full, tmp_path / "report.html", TEMPLATE)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "one of the two diverged" in page.sections["verdicts"]
    marks = texts(next(row for matrix in page.matrices for row in matrix if texts(row)[0] in ("rtn", "quest")))
    assert set(marks[1:]) == {"✕✕"}  # on each of the two models, in every metric
    said = "quest diverged on 1 of 2 models (scenes-class); rtn diverged on 1 of 2 models (scenes-uncond)."
    assert said in page.sections["verdicts"]
    _, *rows = page.tables["main-table"]
    assert {(r[0]["text"], r[1]["text"]) for r in rows if any("diverged" in c["text"] for c in r)} == {
        ("scenes-uncond", "rtn"), ("scenes-class", "quest")
    }  # fmt: skip


def test_published_numbers_stand_beside_ours(run):
    main = pd.read_csv(run / "tables/main.csv", keep_default_na=False, na_values=["nan"])
    main.loc[0, "published"] = 2.95
    cell = dict(zip(("model", "method", "bits", "metric"), main.loc[0], strict=False))
    judged = pd.DataFrame([cell | {"verdict": "NOT COMPARABLE"}])
    paired = pd.read_csv(run / "tables/paired.csv")
    table = page_tables.main_table(main, paired, judged)
    assert table.rows[0][3].note == "paper 2.95: NOT COMPARABLE"
    assert sum(isinstance(cell, rendering.Cell) and cell.note != "" for row in table.rows for cell in row) == 1


def test_cost_and_speed_come_from_checkpoints_and_samples(page):
    _, *rows = page.tables["cost-table"]
    assert texts(rows[0]) == ["scenes-uncond", "rtn", "W4A4", "12.3", "456", "adaround W4A32", "65.4", ""]
    assert len(rows) == 8
    _, *rows = page.tables["speed-table"]
    by_cell = {tuple(texts(row)[:3]): row for row in rows}
    assert texts(by_cell["scenes-class", "fp", "W32A32"])[3:7] == ["float32", "100%", "16.7", "–"]
    assert texts(by_cell["scenes-class", "rtn", "W4A4"])[3:7] == ["integer", "100%", "8.3", "2.00"]
    assert "slower" not in by_cell["scenes-class", "rtn", "W4A4"][6]["class"]
    assert "slower" in by_cell["scenes-class", "quest", "W4A4"][6]["class"]  # red where quantization does not pay


def test_every_cell_has_its_recipe_provenance_and_log(run, written):
    main = pd.read_csv(run / "tables/main.csv")
    found = report.details(run, main, METHODS)
    assert [(d["model"], d["method"], d["bits"]) for d in found] == list(
        dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    )
    by_cell = {(d["model"], d["method"], d["bits"]): d for d in found}
    quest, full = by_cell["scenes-class", "quest", "w4a4"], by_cell["scenes-class", "fp", "w32a32"]
    assert quest["about"] == METHODS["quest"] and json.loads(quest["parts"]["Provenance"]) == MADE
    assert json.loads(quest["parts"]["Recipe"])["init"]["method"] == "adaround"
    assert quest["parts"]["End of quantize.log"] == "unit 1\nunit 2: 100%\n</script><b>done"
    assert quest["parts"]["Benchmark of quantize"] == "13 s\n1,456 MB of memory at most"
    assert set(full["parts"]) == {"Provenance"}  # nothing was quantized
    (kept,) = re.findall(r'<script type="application/json" id="details">(.*?)</script>', written.read_text("utf-8"))
    assert json.loads(kept) == found
    titles = ["Recipe", "Provenance", "Benchmark of quantize", "End of quantize.log"]  # in this order
    assert list(json.loads(kept)[1]["parts"]) == titles


def test_rows_can_be_linked_to():
    table = rendering.Table(rendering.columns("model", "x", texts=1), [["a b", rendering.number(1)], ["a b", "2"]])
    assert re.findall(r'<tr id="(.*?)"', table.html("caption", "t")) == ["t-row-a-b", "t-row-a-b-2"]


def test_what_was_not_run_says_so(page):
    for section, target in (
        ("speed", "snakemake kernels"),
        ("ablations", "snakemake ablations"),
        ("questions", "snakemake questions"),
        ("seeds", "snakemake seeds"),
        ("sensitivity", "snakemake questions"),
    ):
        assert "NOT RUN" in page.sections[section] and target in page.sections[section]
    assert "One quantization seed" in page.sections["verdicts"]


def test_what_other_rules_made_is_taken(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DRAWN", ("fid",))
    monkeypatch.setattr(report, "AGAINST_COST", ())
    full = shutil.copytree(run, tmp_path / "tiny")
    columns = {"model": "scenes-class", "bits": "w4a4", "metric": "fid_to_fp", "method": "quest"}
    seeds = columns | {"versus": "rtn", "value": -2.0, "low": -3.0, "high": -1.0, "seeds": "0,1,2", "better": "quest"}
    pd.DataFrame([seeds, seeds | {"metric": "log_latent_mse", "better": "neither"}]).to_csv(full / "tables/seeds.csv")
    pd.DataFrame([{"switch": "no groups", "difference": 0.25}]).to_csv(full / "tables/ablations.csv", index=False)
    shutil.copy(full / "figures/eps_error_vs_timestep.png", full / "figures/sensitivity.png")
    (full / "questions").mkdir()
    shutil.copy(full / "figures/sensitivity.png", full / "questions/one.png")
    (full / "questions/questions.md").write_text(
        "# One?\n\n|a|b|\n|-|-|\n|1|2|\n\n![why](one.png) [log](../x.log) <b>\n",
        encoding="utf-8",
    )
    kernels = tmp_path / "Some CPU.csv"
    pd.DataFrame([{"shape": "conv 3x3", "speedup": 0.8}, {"shape": "linear", "speedup": 2.5}]).to_csv(
        kernels, index=False
    )
    file = tmp_path / "report.html"
    report.write(full, file, TEMPLATE, kernels=[kernels])
    page = Page(file.read_text(encoding="utf-8"))
    assert "NOT RUN" not in "".join(page.sections[name] for name in ("speed", "ablations", "questions", "seeds"))
    assert "One quantization seed" not in page.sections["verdicts"]
    said = page.sections["verdicts"]
    said = said[said.rindex("In words") :]
    assert said.split()[2] == "W4A4" and "W8A8" not in said
    assert "In FID to FP, quest is better than rtn on scenes-class." in said
    assert "In log10 latent MSE to FP, quest is not told apart from rtn on scenes-class." in said
    assert texts(page.matrices[-1][0])[:3] == ["", "log10 latent MSE to FP", "FID to FP"]
    assert texts(page.matrices[-1][1])[:3] == ["rtn", "○", "▲"]
    assert texts(page.tables["ablations-table"][1]) == ["no groups", "0.25"]
    slow, fast = page.tables["kernels-1"][1:]
    assert all("slower" in cell["class"] for cell in slow) and not any("slower" in cell["class"] for cell in fast)
    assert "<h3>One?</h3>" in file.read_text(encoding="utf-8") and "&lt;b&gt;" in file.read_text(encoding="utf-8")
    assert all(address.startswith(("#", "data:")) for address in page.addresses)


def test_questions_that_show_a_missing_image(tmp_path):
    (tmp_path / "questions.md").write_text("![](none.png)", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="questions.md: shows none.png"):
        report.markdown(tmp_path / "questions.md")


def test_verdicts_take_the_fewest_bits_first(run, page):
    paired = pd.read_csv(run / "tables/paired.csv")
    assert [found["bits"] for found in verdicts.verdict_sentences(paired, "quest")] == ["w4a4", "w8a8"]
    assert "In log10 latent MSE to FP" in page.sections["verdicts"]
    assert len(page.matrices) == 2 and [texts(row)[0] for row in page.matrices[0]] == ["", "rtn", "full precision"]


def test_the_farthest_pairs_are_those_of_the_features(run):
    cells = {}
    for method, bits in (("fp", "w32a32"), ("rtn", "w4a4")):
        folder = run / "scenes-class" / method / bits
        cells[method, bits] = Cell.load(sorted(folder.glob("features-*")), sorted(folder.glob("samples-*")))
    ours, full = cells["rtn", "w4a4"].features["pool"], cells["fp", "w32a32"].features["pool"]
    distance = {seed: float(np.sqrt(((a - b) ** 2).sum())) for seed, (a, b) in enumerate(zip(ours, full, strict=True))}
    (found,) = page_images.farthest("scenes-class", cells, ["w8a8", "w4a4"])
    expected = sorted(distance, key=distance.get, reverse=True)[: page_images.PAIRS]
    assert found["seeds"] == expected
    assert found["distances"] == pytest.approx([distance[seed] for seed in expected])


def test_a_strip_is_lossless(run):
    import base64
    import io

    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    made = page_images.strip(images)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["uri"].partition(",")[2]))))
    assert sheet.shape == (16, 3 * 16 + 2 * 2, 4) and (made["width"], made["height"]) == (52, 16)
    assert all((sheet[:, 18 * place : 18 * place + 16, :3] == images[place]).all() for place in range(3))
    assert page_images.strip(np.zeros((2, 256, 256, 3), np.uint8))["height"] == page_images.SIDE


def test_a_run_without_tables_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="main.csv"):
        report.write(tmp_path, tmp_path / "report.html", TEMPLATE)


def test_every_method_is_described_and_every_reference_cited():
    from workflow.scripts.report import REFERENCES, descriptions

    said = descriptions()
    cited = re.findall(r"eprint\s*=\s*\{(.*?)\}", REFERENCES.read_text(encoding="utf-8"))
    assert all(len(text) > 20 for text in said.values())
    named = set(re.findall(r"arXiv:(\d{4}\.\d{5})", " ".join(said.values())))
    assert named == set(cited)
