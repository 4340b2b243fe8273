"""The report is one file that says what the tables say; in a browser its tables sort and filter."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from quest.metrics import METRICS, Cell, measure
from quest.metrics.frechet import Reference, Statistics
from quest.report import figures, page_details, page_images, page_tables, rendering, tables, verdicts
from quest.report import page as report
from quest.runtime.files import dumps

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "workflow/report/report.html.j2"
N, CALLS = 24, 3
NOISE = {"fp": 0.0, "rtn": 0.5, "quest": 0.1}
METHODS = {"fp": "No quantization.", "rtn": "Nearest codes <here>.", "quest": "QuEST (arXiv:2402.03666)."}
MADE = {"commit": "abc", "dirty": False, "versions": {"python": "3.12"}, "machine": {"cpu": "Some CPU"}}


def draw(folder: Path, model: str, method: str, bits: str, write_checkpoint) -> dict:
    """Write the arrays of a cell in two shards, and return its metrics."""
    common, own = np.random.default_rng(0), np.random.default_rng(len(method) + len(bits))
    noise = NOISE[method] * (1 if bits == "w4a4" else 0.1)
    shapes = {"latents": (N, 2, 4, 4), "pool": (N, 6), "spatial": (N, 7), "logits": (N, 5)}
    arrays = {k: (common.normal(size=s) + noise * own.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
    arrays["images"] = (64 * common.random((N, 16, 16, 3)) + 64 * noise * own.random((N, 16, 16, 3))).astype(np.uint8)
    footprint = {"bytes": 1_500_000, "bops": 2e9 if bits == "w4a4" else 8e9, "effective_bits": 4.2, "realizable": 1.0}
    seconds = {"fp": 2.0, "rtn": 1.0, "quest": 4.0}[method]
    placed = {"kernel": "integer", "refused": {}, "deviation": 1e-7} if noise else {}
    cell = folder / model / method / bits
    cell.mkdir(parents=True)
    for shard, index in enumerate((np.arange(N // 2, N), np.arange(N // 2))):
        kept = {"seeds": {"n": len(index)}, "seconds": seconds, "footprint": footprint, "kernel": placed}
        metadata = dumps(kept | {"provenance": MADE})
        features = {name: arrays[name][index] for name in ("pool", "spatial", "logits")}
        if noise and shard == 0:
            features |= {"eps_error": noise * own.random((4, CALLS)), "timesteps": np.array([801, 401, 1])}
        np.savez(cell / f"features-{shard}.npz", index=index, **features, metadata=metadata)
        samples = {name: arrays[name][index] for name in ("images", "latents")}
        np.savez(cell / f"samples-{shard}.npz", index=index, **samples, metadata=metadata)
    if method != "fp":
        (cell / "quantize.log").write_text("unit 1\nunit 2:  0%\runit 2: 100%\n</script><b>done\n", encoding="utf-8")
        header = {"seconds": 12.3, "peak_memory": 456, "init": {"method": "adaround", "bits": "w4a32", "seconds": 65.4}}
        write_checkpoint(cell / "model.safetensors", **header)
    files = [sorted(cell.glob(f"{kind}-*.npz")) for kind in ("features", "samples")]
    full = folder / model / "fp/w32a32"
    fp = None if method == "fp" else Cell.load(sorted(full.glob("features-*")), sorted(full.glob("samples-*")))
    real = np.random.default_rng(9)
    reference = Reference(*(Statistics.from_features(real.normal(size=(200, d))) for d in (6, 7)), {})
    found = measure(Cell.load(*files), reference, fp, extractor="scenes", protocol="ddim 20, eta 0, guidance 3")
    return found | {"model": model, "method": method, "bits": bits, "provenance": MADE}


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("report") / "tiny"
    cells = [("fp", "w32a32"), *((method, bits) for bits in ("w8a8", "w4a4") for method in ("rtn", "quest"))]
    files = []
    for model in ("scenes-uncond", "scenes-class"):
        for method, bits in cells:
            file = folder / model / method / bits / "metrics.json"
            file.parent.parent.mkdir(parents=True, exist_ok=True)
            found = draw(folder, model, method, bits, write_checkpoint)
            file.write_text(dumps(found), encoding="utf-8")
            files.append(file)
    tables.write(files, folder / "tables")
    eps_error = pd.read_csv(folder / "tables/eps_error.csv")
    figures.eps_error_curves(eps_error, folder / "figures/eps_error_vs_timestep.png")
    return folder


@pytest.fixture(scope="module")
def written(run) -> Path:
    file = run / "report.html"
    report.write(run, file, TEMPLATE, methods=METHODS, references=ROOT / "resources/references.bib")
    return file


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
    found = page_details.details(run, main, METHODS)
    assert [(d["model"], d["method"], d["bits"]) for d in found] == list(
        dict.fromkeys(zip(main["model"], main["method"], main["bits"], strict=True))
    )
    by_cell = {(d["model"], d["method"], d["bits"]): d for d in found}
    quest, full = by_cell["scenes-class", "quest", "w4a4"], by_cell["scenes-class", "fp", "w32a32"]
    assert quest["about"] == METHODS["quest"] and json.loads(quest["parts"]["Provenance"]) == MADE
    assert json.loads(quest["parts"]["Recipe"])["init"]["method"] == "adaround"
    assert quest["parts"]["End of quantize.log"] == "unit 1\nunit 2: 100%\n</script><b>done"
    assert set(full["parts"]) == {"Provenance"}  # nothing was quantized
    (kept,) = re.findall(r'<script type="application/json" id="details">(.*?)</script>', written.read_text("utf-8"))
    assert json.loads(kept) == found
    assert list(json.loads(kept)[1]["parts"]) == ["Recipe", "Provenance", "End of quantize.log"]  # in this order


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


# What a reader does, by the page's own buttons, menus and links.
CLICKS = """
<script>
const said = {};
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const table = document.querySelector("#main-table table");
const visible = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const column = (place) => visible().map((row) => row.cells[place]);
const texts = (place) => column(place).map((cell) => cell.textContent);
const choose = (menu, value) => {
  menu.value = value;
  menu.dispatchEvent(new Event("input", { bubbles: true }));
};
(async () => {
  const head = table.tHead.rows[0].cells[3];
  said.before = column(3).map((cell) => cell.dataset.value);
  head.querySelector("button").focus();
  said.focused = document.activeElement === head.querySelector("button");
  head.querySelector("button").click();
  said.once = column(3).map((cell) => cell.dataset.value);
  said.sort = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  said.twice = column(3).map((cell) => cell.dataset.value);
  head.querySelector("button").click();
  said.thrice = column(3).map((cell) => cell.dataset.value);
  const [menu] = document.querySelectorAll("#main-table select");
  choose(menu, "scenes-class");
  said.filtered = texts(0);
  said.count = document.querySelector("#main-table output").textContent;
  choose(menu, "");

  const [ofModel, ofMethod, ofBits] = document.querySelectorAll("#show select");
  choose(ofModel, "scenes-class");
  choose(ofMethod, "rtn");
  choose(ofBits, "W4A4");
  said.page = visible().map((row) => [...row.cells].slice(0, 3).map((cell) => cell.textContent).join(" "));
  said.versus = [...document.querySelectorAll("#paired-table tbody tr:not([hidden])")].map((row) => row.textContent);
  said.strips = [...document.querySelectorAll("#samples figure")]
    .filter((figure) => !figure.closest("[hidden]"))
    .map((figure) => figure.textContent.trim());
  const rtn = visible()[0];
  location.hash = document.querySelector("#main-table tbody tr[hidden]").id;
  await pause(200);
  said.linked = document.querySelector(":target").hidden;
  said.reset = visible().length;

  const opener = rtn.querySelector("button");
  opener.focus();
  opener.click();
  const dialog = document.querySelector("dialog");
  const title = document.querySelector("#cell-title").textContent;
  said.dialog = [dialog.open, dialog.contains(document.activeElement), title];
  said.body = document.querySelector("#cell-body").textContent;
  said.shown = dialog.querySelectorAll("img").length;
  dialog.querySelector("form button").click();
  said.closed = !dialog.open && document.activeElement === opener;

  const [canvas, line] = [document.querySelector("#both"), document.querySelector("#line")];
  const pixels = async (place) => {
    line.value = place;
    line.dispatchEvent(new Event("input", { bubbles: true }));
    // Virtual time does not wait for what the page waits for before it draws: that its images are decoded.
    await Promise.all([...document.querySelectorAll("#samples img")].map((image) => image.decode()));
    await pause(100);
    return canvas.toDataURL();
  };
  said.lines = [await pixels(0), await pixels(100), await pixels(50)];
  said.label = canvas.getAttribute("aria-label");

  for (const details of document.querySelectorAll("details")) details.open = false;
  dispatchEvent(new Event("beforeprint"));
  said.printed = document.querySelectorAll("main details:not([open])").length;
  dispatchEvent(new Event("afterprint"));
  said.unprinted = document.querySelectorAll("main details[open]").length;
  const images = [...document.images];
  for (const details of document.querySelectorAll("details")) details.open = true;
  said.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  await Promise.all(images.map((image) => image.decode()));
  said.images = images.length;
  said.broken = images.filter((image) => !image.naturalWidth).length;
  document.body.replaceChildren(JSON.stringify(said));
})();
</script>
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_in_a_browser(run, written, tmp_path):
    """No error on the console, everything that a reader can do works, and nothing is wider than a phone."""
    text = written.read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(text.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    frame = "<iframe src=report.html style='width:390px;height:800px;border:0'></iframe>"
    read = "document.body.textContent = frames[0].document.body.textContent"
    probe = f"<script>onload = () => setTimeout(() => {{ {read}; }}, 5000)</script>"
    (tmp_path / "phone.html").write_text(f"<!doctype html><body>{frame}{probe}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    command = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "phone.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert "CONSOLE" not in shown.stderr, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    said = json.loads(re.search(r"<body>(\{.*\})", shown.stdout)[1])
    main = pd.read_csv(run / "tables/main.csv")
    fid = sorted(main.loc[main["metric"] == "fid", "value"])
    assert [float(value) for value in said["once"]] == fid and said["sort"] == "ascending" and said["focused"]
    assert [float(value) for value in said["twice"]] == fid[::-1]
    assert said["thrice"] == said["before"] != said["once"]
    assert set(said["filtered"]) == {"scenes-class"} and said["count"] == "5 of 10 rows"
    assert said["images"] > 10 and said["broken"] == 0
    assert said["wide"] == 0
    assert said["page"] == ["scenes-class rtn W4A4"]
    assert len(said["versus"]) > 2 and all("rtn" in row and "W4A4" in row for row in said["versus"])
    assert said["strips"] == ["full precision", "rtn"]
    assert not said["linked"] and said["reset"] == 10  # the link shows its row although the menus had hidden it
    assert said["dialog"] == [True, True, "scenes-class, rtn, W4A4"] and said["closed"] and said["shown"] == 2
    assert all(text in said["body"] for text in ("Link to its row", "adaround", "Some CPU", "unit 2: 100%"))
    assert len(set(said["lines"])) == 3 and said["label"].startswith(
        "scenes-uncond, W4A4: full precision left of the line, quest"
    )
    assert said["printed"] == 0 == said["unprinted"]
