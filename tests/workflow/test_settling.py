"""`snakemake settle` from look to look, with scripts that only pretend to sample."""

import json
from pathlib import Path

import pandas as pd
import pytest

from quest.report.settle import LOOKS, SEEDS

# Writes the record of a cell: `good` is far ahead of `plain`, `close` is not told apart from it, and needs all looks.
EVIDENCE = """
import json, random, sys
from pathlib import Path
from quest.report.settle import identity

told = json.loads(sys.argv[sys.argv.index("--told") + 1])
path = Path(sys.argv[sys.argv.index("-o") + 1])
model, row, bits = path.parts[-4:-1]
method, _, numbers = row.partition("@")
draw, _, seed = numbers.partition(".")
seed = seed or draw
value = {"good": 30.0, "plain": 20.0, "close": 20.0, "fp": 0.0}[method]
value += random.Random(row).gauss(0, 0 if method == "fp" else 1)
record = {
    "version": 1, "model": model, "bits": bits, "method": method, "seed": int(seed or 0), "draw": int(draw or 0),
    "isa": "avx2-avx2", "identity": identity(told), "images": told["images"], "n": 4,
    "values": {} if method == "fp" else {"psnr": [value - 1, value, value, value + 1]}, "sets": {},
    "about": told | {"seconds": 3600.0},
}
path.write_text(json.dumps(record))
"""
CONFIG = {
    "name": "default",
    "models": {"scenes-class": {"images": 100, "first": 500}},
    "grid": [{"model": ["scenes-class"], "method": ["fp"], "bits": ["w32a32"]}],
    "methods": {
        "fp": {},
        "adaround": {},
        "plain": {"method": "rtn"},
        "good": {"method": "quest-suite", "init": "adaround"},
        "close": {"method": "rtn-mse"},
    },
    "settle": {"bits": ["w4a4"], "families": {"mine": [["good", "plain"], ["close", "plain"]]}},
}


def made(project, row) -> list[int]:
    """The seeds of a row whose records were made here."""
    folder = project.folder / "results/default/scenes-class"
    return sorted(int(path.parts[-3].partition("@")[2]) for path in folder.glob(f"{row}@*/w4a4/evidence.json"))


def looks(project) -> list[dict]:
    folder = project.folder / "results/default/settle"
    return [json.loads((folder / f"look-{look}.json").read_text(encoding="utf-8")) for look in range(len(LOOKS) + 1)]


@pytest.mark.timeout(900)
def test_pairs_stop_when_decided_and_a_later_run_goes_on_from_the_records(stubbed):
    stubbed.write("workflow/scripts/evidence.py", EVIDENCE)
    stubbed.configure(CONFIG)
    run = stubbed.snakemake("settle", "--config", "hours=5", timeout=800)
    assert run.returncode == 0, run.stdout
    # Three seeds decide one pair. Of the other, four cells of an hour fit into five hours, and the next six do not.
    assert made(stubbed, "good") == list(SEEDS[:3]) and made(stubbed, "close") == list(SEEDS[: LOOKS[1]])
    first = looks(stubbed)
    assert first[2]["out_of_budget"] == ["scenes-class w4a4: close against plain"] and first[1]["wanted"]
    table = pd.read_csv(stubbed.folder / "results/default/settle/settled.csv").set_index("method")
    assert table.loc["good", "verdict"] == "better" and table.loc["close", "verdict"] == "open"
    assert (table.loc["good", "seeds"], table.loc["close", "seeds"]) == (3, 5)
    assert "out of budget: scenes-class w4a4: close against plain" in (
        stubbed.folder / "results/default/settle/look-2.log"
    ).read_text(encoding="utf-8")
    records = list((stubbed.folder / "results/settled").glob("*/*/*.json"))
    assert len(records) == 1 + 3 + 5 + 5  # full precision, good, plain, close

    sample = [
        stubbed.folder / f"results/default/scenes-class/good@{SEEDS[0]}/w4a4/{name}" for name in ("samples-0.npz",)
    ]
    assert " --first 500 " in Path(sample[0]).read_text(encoding="utf-8")

    # On another machine: a fresh clone has the records only, and makes nothing again that is decided.
    for folder in ("results/default", ".snakemake"):
        (stubbed.folder / folder).rename(stubbed.folder / f"old-{Path(folder).name.strip('.')}")
    again = stubbed.snakemake("settle", timeout=800)
    assert again.returncode == 0, again.stdout
    assert made(stubbed, "good") == [] and made(stubbed, "close") == list(SEEDS[LOOKS[1] :])
    table = pd.read_csv(stubbed.folder / "results/default/settle/settled.csv").set_index("method")
    assert table.loc["close", "seeds"] == LOOKS[-1] and table.loc["good", "seeds"] == 3


@pytest.mark.timeout(900)
def test_the_lottery_crosses_draws_and_seeds_and_keeps_the_records(stubbed):
    stubbed.write("workflow/scripts/evidence.py", EVIDENCE)
    rows = {"model": ["scenes-class"], "method": ["good"], "draw": [3, 4], "seed": [3, 4]}
    stubbed.configure(CONFIG | {"settle": CONFIG["settle"] | {"lottery": rows}})
    run = stubbed.snakemake("lottery", timeout=800)
    assert run.returncode == 0, run.stdout
    places = [path.name.split("-")[0] for path in (stubbed.folder / "results/settled").glob("scenes-class/w4a4/*.json")]
    assert sorted(places) == ["good@3.3", "good@3.4", "good@4.3", "good@4.4"]
    made = (stubbed.folder / "results/default/scenes-class/good@4.3/w4a4/model.safetensors").read_text(encoding="utf-8")
    assert "calibration-4.safetensors" in made and '"seed": 3' in made
    table = pd.read_csv(stubbed.folder / "results/default/settle/lottery.csv")
    assert {"calibration draw", "quantization seed", "draw and seed"} <= set(table["source"])


def test_a_config_without_pairs_or_with_no_hours_says_so(stubbed):
    run = stubbed.snakemake("-n", "settle")
    assert run.returncode and "settle: the config has no such key" in run.stdout
    run = stubbed.snakemake("-n", "lottery")
    assert run.returncode and "settle.lottery: the config has no such key" in run.stdout
    run = stubbed.snakemake("-n", "settle", "--config", "hours=-1")
    assert run.returncode and "hours: -1 is no number above 0" in run.stdout
