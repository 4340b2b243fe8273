"""The report in a browser: its tables sort and filter, and everything that a reader can do works."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

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
  said.paper = getComputedStyle(document.body).backgroundColor;
  document.body.replaceChildren(JSON.stringify(said));
})();
</script>
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize(
    "width, flags, paper",
    [(390, [], "rgb(255, 255, 255)"), (1280, ["--blink-settings=preferredColorScheme=0"], "rgb(20, 23, 26)")],
    ids=["phone", "desktop, dark"],
)
def test_in_a_browser(run, written, tmp_path, width, flags, paper):
    """No error on the console, everything that a reader can do works, and nothing is wider than the window."""
    text = written.read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(text.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
    frame = f"<iframe src=report.html style='width:{width}px;height:800px;border:0'></iframe>"
    # Virtual time runs on while images are decoded, so the probe looks again and again until the page has said all.
    probe = """<script>onload = function look() {
      const said = frames[0].document.body.textContent;
      if (said.startsWith("{")) document.body.textContent = said; else setTimeout(look, 50);
    }</script>"""
    (tmp_path / "phone.html").write_text(f"<!doctype html><body>{frame}{probe}", encoding="utf-8")
    flags = [
        *flags,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=120000"]
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
    assert said["wide"] == 0 and said["paper"] == paper
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
