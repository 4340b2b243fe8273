"""Records of cells, the verdicts that follow from them, and what the next look asks for. No model is needed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from quest.__main__ import main as command_line
from quest.metrics import Cell
from quest.report.settle import LOOKS, SEEDS, cells, lottery, plan, verdicts

ROOT = Path(__file__).parents[2]
N, DRAWN = 120, 40
ISA = "avx2-avx2"


def record(method, shift=0.0, seed=3, draw=None, model="photos-class", isa=ISA, n=N, **told):
    """A record whose PSNR lies `shift` above 20 and whose KID lies as much below 1; images share most noise."""
    draw = seed if draw is None else draw
    own = np.random.default_rng([*method.encode(), seed, draw, *isa.encode()])
    common = np.random.default_rng(1).normal(size=n)
    told = {"recipes": [["rtn", {} if method != "seeded" else {"seed": seed}, "w4a4"]]} | told
    values = {} if method == "fp" else {"psnr": (20 + shift + common + 0.1 * own.normal(size=n)).round(6).tolist()}
    values["agreement"] = (np.arange(n) % 10 < 8).astype(float).tolist()
    resampled = (1 - shift + 0.01 * np.random.default_rng(2).normal(size=DRAWN)).tolist()
    return {
        "version": 1,
        "model": model,
        "bits": "w32a32" if method == "fp" else "w4a4",
        "method": method,
        "seed": seed,
        "draw": draw,
        "isa": isa,
        "identity": cells.identity(told | {"method": method}),
        "images": f"0-{n - 1}",
        "n": n,
        "values": values,
        "sets": {"kid_64w": [1 - shift, resampled]},
        "about": told | {"seconds": 100.0},
    }


def evidence(*records):
    return [cells._checked(one, cells.place(one, Path())) for one in records]


def seeds_of(method, shifts, **settings):
    return [record(method, shift, seed, **settings) for seed, shift in zip(SEEDS, shifts, strict=False)]


FULL = record("fp", seed=0)
GOOD, CLOSE = [2.0, 2.1, 1.9, 2.05, 1.95], [0.0, 0.1, -0.1, 0.05, -0.05]


def families(**pairs):
    return {name: {"bits": ["w4a4"], "pairs": one} for name, one in pairs.items()}


FAMILIES = families(rivals=[["good", "plain"], ["close", "plain"]], four_bits=[["good", "fp"]])
ROWS = [FULL, *seeds_of("good", GOOD), *seeds_of("plain", [0.0] * 5), *seeds_of("close", CLOSE)]


def row_of(frame, **wanted):
    (found,) = frame[(frame[list(wanted)] == pd.Series(wanted)).all(axis=1)].itertuples()
    return found


@pytest.fixture(scope="module")
def judged():
    return verdicts.frame(evidence(*ROWS), FAMILIES)


def test_a_family_is_judged_at_its_bits_only():
    rows = evidence(*ROWS)
    assert set(verdicts.frame(rows, FAMILIES)["bits"]) == {"w4a4"}
    assert not len(verdicts.frame(rows, {"rivals": FAMILIES["rivals"] | {"bits": ["w8a8"]}}))


def test_methods_nearer_to_each_other_than_full_precision_is_to_itself_stay_open():
    apart = {"psnr": 10**-2 - 10**-2.2, "kid_64w": 2.0}  # errors at 20 and 22 dB; KIDs differ by 2
    for factor, said in ((0.9, "better"), (1.1, "open")):
        floors = {"photos-class": {name: factor * one for name, one in apart.items()}}
        judged = verdicts.frame(evidence(*ROWS), FAMILIES, floors=floors)
        for endpoint in apart:
            row = row_of(judged, family="rivals", method="good", endpoint=endpoint)
            assert row.verdict == said and ("below the floor" in row.note) == (said == "open")
    assert row_of(judged, family="rivals", method="close", endpoint="kid_64w").verdict != "better"


def test_older_records_without_an_endpoint_are_left_out_of_it_alone():
    older, newer = (
        [record(name, 0, seed, isa=isa) for name in ("good", "plain") for seed in SEEDS[:3]] for isa in "ab"
    )
    for one in (*older, newer[0]):  # newer[0] is the first seed of `good`
        del one["values"]["agreement"]
    found = verdicts.frame(evidence(FULL, *older, *newer[1:]), families(rivals=[["good", "plain"]]))
    assert row_of(found, endpoint="psnr").isa == "a" and row_of(found, endpoint="psnr").seeds == 3
    assert "agreement" not in set(found["endpoint"])  # the first seed lacks it
    newer[0]["values"]["agreement"] = newer[1]["values"]["agreement"]
    found = verdicts.frame(evidence(FULL, *older, *newer), families(rivals=[["good", "plain"]]))
    assert row_of(found, endpoint="agreement").isa == "b" and row_of(found, endpoint="psnr").isa == "a"


def test_a_cell_leaves_its_value_for_every_image_and_its_resamples(tmp_path):
    rng = np.random.default_rng(0)
    latents, images = rng.normal(size=(8, 2, 4, 4)), rng.integers(0, 255, (8, 6, 6, 3)).astype(np.uint8)
    features = {"class_logits": np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1]], "labels": np.array([0, 1, 2, 0, 1, 2, 1, 2])}
    fp = Cell(np.arange(8), features, images, latents)
    errors = rng.random((4, 3))
    own = Cell(np.arange(8), features, images // 2, latents + 0.1, eps_error=errors, guided_eps_error=2 * errors)
    measured = {
        "model": "photos-class", "method": "rtn@4", "bits": "w4a4",
        "rows": [{"metric": "kid_64w", "value": 0.25}], "resampled": {"kid_64w": [0.2, 0.3]},
        "sampled": [{"core": {"isa": "avx2", "torch": "AVX2"}}], "drawn": {"images": "0-7"},
    }  # fmt: skip
    content = cells.content(own, fp, measured, 4, 4, {"recipes": [["rtn", {}, "w4a4"]]}, {"seconds": 5})
    path = cells.write(content, tmp_path)
    assert path.relative_to(tmp_path).as_posix().startswith("photos-class/w4a4/rtn@4.4-avx2-avx2-")
    (read,) = cells.read(tmp_path)
    assert read.values["agreement"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0] and read.value("agreement") == 0.75
    assert read.values["log_latent_mse"] == pytest.approx([-2.0] * 8, abs=1e-5)
    assert read.values["guided_eps_error"] == pytest.approx(2 * errors.mean(axis=1), rel=1e-5)
    assert read.value("kid_64w") == 0.25 and read.sets["kid_64w"][1].tolist() == [0.2, 0.3]
    assert len(read.values["psnr"]) == 8 and read.isa == "avx2-avx2"
    # Full precision has no distances to itself.
    assert set(cells.per_image(fp, None)) == {"agreement"}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r.pop("values"), "lacks values"),
        (lambda r: r.update(version=2), "version 2"),
        (lambda r: r.update(seed=9), "its name should be"),
        (lambda r: r["values"].update(psnr=[1.0]), "1 values for 120 images"),
        (lambda r: r["values"].update(psnr=["a"] * N), "psnr is no list of numbers"),
        (lambda r: r["values"].update(beauty=[1.0] * N), "unknown endpoint beauty"),
        (lambda r: r.update(sets={"kid_64w": 4}), "no record"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_name(tmp_path, change, words):
    path = cells.write(record("good"), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path.name}: no record of a cell: .*{words}|{path.name}.*{words}"):
        cells.read(tmp_path)


def test_verdicts_are_of_methods_over_seeds(judged):
    psnr = row_of(judged, endpoint="psnr", method="good")
    assert (psnr.verdict, psnr.seeds, psnr.n) == ("better", 3, N)
    assert psnr.value == pytest.approx(np.mean(GOOD[:3]), abs=0.03) and psnr.low < psnr.value < psnr.high
    kid = row_of(judged, endpoint="kid_64w", method="good", versus="plain")
    assert kid.verdict == "better" and kid.value < 0 and kid.full_precision == 1.0
    # The second pair waits: five seeds do not tell it apart, and it is told how many would.
    close = row_of(judged, endpoint="kid_64w", method="close")
    assert (close.verdict, close.seeds) == ("open", 5) and not close.needed <= 5
    same = row_of(judged, endpoint="agreement", method="close")
    assert (same.verdict, same.value) == ("equivalent", 0.0)


def test_full_precision_is_a_rival_without_seeds_and_better_than_it_is_a_flag(judged):
    kid = row_of(judged, family="four_bits", endpoint="kid_64w")
    assert (kid.versus, kid.verdict) == ("fp", "better") and "a flag, not a success" in kid.note
    assert set(judged[judged["versus"] == "fp"].endpoint) == {"agreement", "kid_64w"}  # no distances to itself


def test_a_seed_counts_where_both_ran_on_the_same_instruction_sets():
    other = [one | {"isa": "amx-avx512"} for one in seeds_of("plain", [0.0] * 3)]
    assert not len(verdicts.frame(evidence(*seeds_of("good", GOOD), *other), FAMILIES))
    both = [
        *seeds_of("good", GOOD[:3]),
        *other,
        *seeds_of("plain", [0.0] * 2),
        record("good", 2.0, 5, isa="amx-avx512"),
    ]
    found = row_of(verdicts.frame(evidence(*both), FAMILIES), endpoint="psnr")
    assert found.seeds == 3 and found.isa == "amx-avx512, avx2-avx2"


def test_of_several_instruction_sets_the_pair_that_was_recorded_first_counts():
    older, newer = (
        [record(name, shift, seed, isa=isa) for name, shift in (("good", 1.0), ("plain", 0.0)) for seed in SEEDS[:3]]
        for isa in ("b", "a")  # the first by name is the newer one
    )
    for day, records in (("2026-11-29", older), ("2026-11-30", newer)):
        for one in records:
            one["about"]["date"] = day
    found = verdicts.frame(evidence(FULL, *older, *newer), families(rivals=[["good", "plain"]]))
    assert set(found["isa"]) == {"b"}
    _, cells_of_good = next(one for one in verdicts.of_first_look(evidence(*older, *newer)) if one[0][2] == "good")
    assert [cell.isa for cell in cells_of_good] == ["b"] * 3


def test_two_seeds_are_no_verdict_and_a_gap_in_the_seeds_ends_them():
    few = evidence(*seeds_of("good", GOOD[:2]), *seeds_of("plain", [0.0] * 2))
    found = row_of(verdicts.frame(few, FAMILIES), endpoint="psnr")
    assert found.verdict == "open" and found.note == "2 of the 3 seeds of the first look" and math.isnan(found.value)
    gap = [one for one in ROWS if not (one["method"] == "plain" and one["seed"] == SEEDS[3])]
    assert row_of(verdicts.frame(evidence(*gap), FAMILIES), endpoint="kid_64w", method="close").seeds == 3


def test_what_diverged_is_named_and_does_not_spoil_its_family():
    broken = [record("close", 0.0, seed) for seed in SEEDS[:3]]
    broken[1]["values"]["psnr"][5] = None
    broken = [json.loads(json.dumps(one)) for one in broken]
    broken[1]["values"]["psnr"][5] = math.nan
    rest = [one for one in ROWS if one["method"] != "close"]
    found = verdicts.frame(evidence(*rest, *broken), FAMILIES)
    assert set(found[found["method"] == "close"].verdict) == {"diverged"}  # in all its endpoints
    assert row_of(found, endpoint="psnr", method="good").verdict == "better"


def test_the_mean_of_all_models_is_judged_seed_by_seed():
    second = [one | {"model": "scenes-class"} for one in ROWS]
    found = verdicts.frame(evidence(*ROWS, *second), FAMILIES)
    pooled = row_of(found, model=verdicts.ALL, endpoint="psnr", method="good")
    single = row_of(found, model="photos-class", endpoint="psnr", method="good")
    assert pooled.value == pytest.approx(single.value) and pooled.over_seeds == pytest.approx(single.over_seeds)
    assert pooled.over_images == pytest.approx(single.over_images / math.sqrt(2))


def identities(*records):
    return {(one["model"], one["bits"], one["method"]): one["identity"] for one in records}


def test_the_first_look_asks_for_all_rows_and_later_ones_for_what_is_open(judged):
    rows = identities(*ROWS)
    first = plan.next_look([], verdicts.frame([], FAMILIES), FAMILIES, rows, 0, None)
    assert first.wanted[0] == "photos-class/fp/w32a32" and len(first.wanted) == 1 + 3 * LOOKS[0]
    assert f"photos-class/good@{SEEDS[2]}/w4a4" in first.wanted
    later = plan.next_look(evidence(*ROWS), judged, {"rivals": FAMILIES["rivals"]}, rows, 2, None)
    assert set(later.wanted) == {
        f"photos-class/{name}@{seed}/w4a4" for name in ("close", "plain") for seed in SEEDS[5 : LOOKS[2]]
    }
    assert later.seconds == pytest.approx(100 * len(later.wanted)) and not later.left_out
    text = "\n".join(plan.lines(judged, later, 2))
    assert "open: photos-class w4a4 kid_64w, close against plain" in text and "6 cells to make" in text
    assert plan.next_look(evidence(*ROWS), judged, FAMILIES, rows, len(LOOKS), None).wanted == []


def test_pairs_beyond_the_hours_are_left_out_by_name(judged):
    rows = identities(*ROWS)
    none = plan.next_look(evidence(*ROWS), judged, FAMILIES, rows, 2, seconds_left=100.0)
    assert none.wanted == [] and none.left_out == ["photos-class w4a4: close against plain"]
    assert "out of budget: photos-class w4a4: close against plain" in plan.lines(judged, none, 2)


def test_cells_of_another_recipe_are_made_again():
    rows = identities(*ROWS) | {("photos-class", "w4a4", "plain"): "another"}
    judged = verdicts.frame(evidence(*ROWS), FAMILIES, rows)
    assert not len(judged[judged["versus"] == "plain"])
    wanted = plan.next_look(evidence(*ROWS), judged, FAMILIES, rows, 0, None).wanted
    assert set(wanted) == {f"photos-class/{n}@{s}/w4a4" for n in ("good", "plain", "close") for s in SEEDS[:3]}


def test_each_source_of_chance_is_estimated_from_cells_that_differ_in_nothing_else():
    rows = [record("plain", shift, seed) for seed, shift in enumerate((0.0, 1.0, 2.0))]
    rows += [record("plain", 0.5, 0, isa="amx-avx512")]
    rows += [record("seeded", shift, seed, draw=0) for seed, shift in ((1, 0.0), (2, 0.2))]
    found = lottery.frame(evidence(*rows))
    deviation = found[found["endpoint"] == "kid_64w"].set_index(["source", "method"])["deviation"]
    assert deviation["draw and seed", "plain"] == pytest.approx(1.0)
    assert deviation["processor", "plain"] == pytest.approx(0.5 / math.sqrt(2))
    # Rows that name their seed have the recipe of `plain`, and its calibration draw 0.
    assert deviation["quantization seed", "plain"] == pytest.approx(np.std([0.0, 0.0, 0.2], ddof=1))
    assert deviation["images", "plain"] == pytest.approx(np.std(rows[0]["sets"]["kid_64w"][1], ddof=1))
    # Seeds 1 and 2 with their own draws, and with draw 0.
    draws = [np.var([1.0, 0.0], ddof=1), np.var([2.0, 0.2], ddof=1)]
    assert deviation["calibration draw", "plain"] == pytest.approx(math.sqrt(np.mean(draws)))
    assert "processor" not in set(lottery.frame(evidence(*rows[:3]))["source"])
    assert found["noise_gap"].tolist() == pytest.approx((1.96 * math.sqrt(2) * found["deviation"]).tolist())
    summary = lottery.summary(found).set_index(["endpoint", "source"])
    assert summary.loc[("kid_64w", "draw and seed"), "median"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "block, words",
    [
        (None, r"settle: None is not of type 'object'"),
        ({"families": {"x": [["a", "b"]]}}, r"settle: key 'bits' is missing"),
        ({"bits": ["w4a4"], "families": {"x": {"bits": ["w8a8"]}}}, r"settle\.families\.x: key 'pairs' is missing"),
        ({"bits": ["w4a4"], "families": {"x": 3}}, r"settle\.families\.x: 3 is not of type 'array'"),
    ],
)
def test_a_config_without_families_is_refused_by_its_file_and_key(tmp_path, block, words):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"settle": block}), encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"mine\.yaml: {words}"):
        command_line(["settle", str(tmp_path), "--config", str(file)])


def test_what_a_reader_of_the_log_is_told_of_open_pairs(judged):
    rows = judged[judged["method"] == "close"].iloc[:2].assign(verdict="open", seeds=5, needed=[7.0, math.nan])
    said = plan.lines(rows.assign(note="below the floor"), plan.Next([], [], 0.0), len(LOOKS))
    assert said[1].endswith("close against plain: 2 more seeds at the present mean and spread")
    assert said[2].endswith("close against plain: below the floor")


def test_anyone_recomputes_the_verdicts_without_torch(tmp_path):
    for one in ROWS:
        cells.write(one, tmp_path / "settled")
    (tmp_path / "settle.yaml").write_text(
        json.dumps({"settle": {"bits": ["w4a4"], "families": FAMILIES}}), encoding="utf-8"
    )
    arguments = ["settle", str(tmp_path / "settled"), "--config", str(tmp_path / "settle.yaml"), "-o", str(tmp_path)]
    code = f"import sys; from quest.__main__ import main; main({arguments!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "| rivals | photos-class | w4a4 | PSNR to FP [dB] | good | plain | better | 3 |" in done.stdout
    assert len(pd.read_csv(tmp_path / "settled.csv")) == len(verdicts.frame(evidence(*ROWS), FAMILIES))
    with pytest.raises(SystemExit, match="settle: .*nowhere: no such folder"):
        command_line(["settle", str(tmp_path / "nowhere")])
