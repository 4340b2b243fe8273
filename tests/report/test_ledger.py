"""The published numbers' file, and every verdict on cells made for it."""

import hashlib
import json
import math

import pandas as pd
import pytest

from quest.config import parse_bits
from quest.diffusion import models
from quest.diffusion.models import MODELS
from quest.metrics import METRICS
from quest.report import ledger

BEDROOMS = {"model": "lsun-bedrooms", "weights": "00", "sampler": "ddim", "steps": 200, "eta": 1.0, "n": 50_000}
BEDROOMS |= {"extractor": "adm", "reference": "ff", "seeds": "evaluation 0-49999"}
SD = {"model": "sd14", "weights": "00", "sampler": "plms", "steps": 50, "guidance": 7.5, "n": 10_000}
SD |= {"clip": "ViT-B-16", "extractor": "adm", "prompts": "aa"}


def cell(fingerprint, method, bits, **values):
    """A metrics.json with these metrics: value, or (value, half width of the interval)."""
    rows = []
    for metric, value in values.items():
        value, half = value if isinstance(value, tuple) else (value, 0.02)
        rows.append({"metric": metric, "value": value, "low": value - half, "high": value + half, "n": 50_000})
    return {"model": fingerprint["model"], "method": method, "bits": bits, "rows": rows, "fingerprint": fingerprint}


def number(metric="fid", value=3.03, protocol="sampler=ddim; steps=200; eta=1; n=50000; extractor=adm", **other):
    row = {"source": ledger.PAPER, "table": "Table 3", "model": "lsun-bedrooms", "method": "quest", "bits": "w8a8"}
    return pd.DataFrame([row | {"metric": metric, "value": value, "protocol": protocol, "note": ""} | other])


def verdict(numbers, *cells):
    row = ledger.ledger(cells, numbers).iloc[0]
    assert row.verdict in ledger.VERDICTS
    return row.verdict, row.why


@pytest.fixture(scope="module")
def numbers():
    return ledger.published()


def test_published_numbers_have_their_form(numbers):
    assert len(numbers) > 350
    assert (numbers.source != "").all() and (numbers.model != "").all() and (numbers.method != "").all()
    for bits in set(numbers.bits) - {"unknown", "w32a32"}:
        weight, _, activation = bits[1:].partition("a")
        assert 2 <= int(weight) <= 8 and int(activation) in (4, 6, 8, 32)
    assert parse_bits("w32a32") and set(numbers[numbers.method == "fp"].bits) == {"w32a32"}
    stated = {key for protocol in numbers.protocol for key in ledger.protocol_says(protocol)}
    assert stated <= {"sampler", "steps", "eta", "guidance", "n", "extractor", "clip", "prompts"}
    # No number without a value but those that the source gives as failed, and nothing recalled.
    assert numbers[numbers.value.isna()].note.str.contains("N/A in the source").all()
    assert not numbers.note.str.contains("recall").any()
    assert (numbers[numbers.metric.isin(["fid", "sfid", "is", "clip"])].value.dropna() > 0).all()


@pytest.mark.parametrize(
    "table, model, method, bits, metric, value",
    [
        ("Table 3", "lsun-bedrooms", "fp", "w32a32", "fid", 2.95),
        ("Table 3", "lsun-bedrooms", "quest", "w4a4", "fid", 5.64),
        ("Table 3", "lsun-churches", "ptq4dm", "w8a8", "fid", 63.93),
        ("Table 3", "lsun-churches", "quest", "w4a8", "fid", 7.33),
        ("Table 4", "imagenet", "quest", "w4a4", "is", 202.45),
        ("Table 4", "imagenet", "ptqd", "w4a8", "sfid", 7.98),
        ("Table 4", "imagenet", "efficient-dm", "w8a8", "size_mib", 435.0),
        ("Table 5", "sd14", "quest", "w4a4", "clip", 28.85),
        ("Table 6", "lsun-bedrooms", "quest", "w4a8", "gpu_hours", 15.25),
        ("Table 8", "lsun-bedrooms", "full-finetune", "w4a4", "fid", 6.36),
        ("Table 9", "imagenet", "tfmq-dm", "w4a8", "fid", 10.29),
        ("Table 10", "lsun-bedrooms", "quest", "w8a8", "sfid", 6.86),
        ("Table 11", "cifar10", "quest", "w4a4", "fid", 9.37),
    ],
)
def test_published_values(numbers, table, model, method, bits, metric, value):
    found = numbers[(numbers.source == ledger.PAPER) & (numbers.table == table) & (numbers.model == model)]
    found = found[(found.method == method) & (found.bits == bits) & (found.metric == metric)]
    assert found.value.tolist() == [value]


def test_doubts_are_said(numbers):
    doubtful = numbers[numbers.note.str.contains("doubtful")]
    of_paper = doubtful[doubtful.source == ledger.PAPER]
    assert {"Table 2", "Table 7", "Table 8"} <= set(of_paper.table)
    w4a4 = of_paper[(of_paper.table == "Table 3") & (of_paper.method == "quest")]
    assert w4a4.value.tolist() == [5.64] and "11.36" in w4a4.note.iloc[0]
    same = numbers[(numbers.table == "Table 4") & (numbers.method == "q-diffusion") & (numbers.metric == "sfid")]
    assert same[same.note.str.contains("doubtful")].value.tolist() == [9.29, 9.29]


def test_numbers_better_than_full_precision_are_flagged(numbers):
    """Where a source has full precision under the same protocol: of SVDQuant's released tables, all and no others."""
    of_code = numbers[numbers.source.str.contains("deepcompressor")]
    keys = ["model", "metric", "protocol"]
    full = of_code[of_code.method == "fp"].set_index(keys)["value"]
    quantized = of_code[(of_code.method != "fp") & of_code.metric.isin(["fid", "image_reward"])]
    gains = [row.value - full[tuple(row[key] for key in keys)] for _, row in quantized.iterrows()]
    better = [gain < 0 if metric == "fid" else gain > 0 for gain, metric in zip(gains, quantized.metric, strict=True)]
    assert quantized.note.str.contains("better than full precision").tolist() == better
    assert len(quantized) == 62 and sum(better) > 20


@pytest.mark.parametrize(
    "ours, half, expected, why",
    [
        (3.08, 0.02, "PASS", "+1.7% ± 0.7%"),  # within 2 %
        (3.20, 0.20, "PASS", "+5.6% ± 6.6%"),  # the published value lies in the interval
        (3.20, 0.05, "DRIFT", "+5.6% ± 1.7%"),
        (2.80, 0.05, "DRIFT", "-7.6% ± 1.7%"),
        (3.05, 0.60, "INCONCLUSIVE", "+0.7% ± 19.8%, needs ± 10.0% or less"),
        (5.00, 0.60, "DRIFT", "+65.0% ± 19.8%"),  # wide, and still too far away
        (math.nan, 0.02, "DRIFT", "ours is not finite"),
    ],
)
def test_verdicts_of_comparable_cells(ours, half, expected, why):
    assert verdict(number(), cell(BEDROOMS, "quest-official", "w8a8", fid=(ours, half))) == (expected, why)


def test_clip_scores_have_a_tolerance_of_their_own():
    stated = "sampler=plms; steps=50; guidance=7.5; n=10000; clip=ViT-B-16; prompts=COCO2014 val"
    sd = number("clip", 31.47, stated, model="sd14", table="Table 5")
    for ours, half, expected in ((31.50, 0.01, "PASS"), (31.57, 0.05, "DRIFT"), (31.47, 0.4, "INCONCLUSIVE")):
        assert verdict(sd, cell(SD, "quest-official", "w8a8", clip=(ours, half)))[0] == expected
    row = ledger.ledger([cell(SD, "quest-official", "w8a8", clip=31.47)], sd).iloc[0]
    # Whose list of prompts is named there and hashed here cannot be compared; PLMS has no eta to state.
    assert row.not_stated == "weights"
    assert verdict(sd, cell(SD | {"clip": "ViT-L-14"}, "quest-official", "w8a8", clip=31.47)) == (
        "NOT COMPARABLE",
        "clip: ViT-L-14 here, ViT-B-16 in the source",
    )


def test_other_protocols_are_not_comparable_and_it_says_in_what():
    other = BEDROOMS | {"n": 500, "extractor": "clean", "eta": 0.0}
    found = verdict(number(), cell(other, "quest-official", "w8a8", fid=3.03))
    assert found == (
        "NOT COMPARABLE",
        "eta: 0.0 here, 1 in the source; n: 500 here, 50000 in the source; extractor: clean here, adm in the source",
    )
    # What the metric does not depend on does not count: another CLIP says nothing of a distance.
    fine = verdict(number(), cell(BEDROOMS | {"clip": "ViT-L-14"}, "quest-official", "w8a8", fid=3.03))
    assert fine[0] == "PASS"
    guided = number(protocol="sampler=ddim; steps=200; guidance=3; n=50000")
    assert (
        verdict(guided, cell(BEDROOMS, "quest-official", "w8a8", fid=3.03))[1] == "guidance: none here, 3 in the source"
    )


def test_a_cell_without_a_fingerprint_is_not_comparable():
    """The schema of metrics.json allows it."""
    without = cell(BEDROOMS, "quest-official", "w8a8", fid=3.03)
    del without["fingerprint"]
    found, why = verdict(number(), without)
    assert found == "NOT COMPARABLE" and "steps: none here, 200 in the source" in why


def test_adm_and_torch_fidelity_share_distances_but_not_inception_scores():
    ours = cell(BEDROOMS | {"extractor": "torch-fidelity"}, "quest-official", "w8a8", **{"fid": 3.03, "is": 2.27})
    assert verdict(number(), ours)[0] == "PASS"
    assert verdict(number("is", 2.27), ours)[1] == "extractor: torch-fidelity here, adm in the source"


def test_not_run_and_no_number_in_the_source():
    assert verdict(number()) == ("NOT RUN", "")
    assert verdict(number(), cell(BEDROOMS, "quest-official", "w4a8", fid=3.03)) == ("NOT RUN", "")
    assert verdict(number("sfid", 6.86), cell(BEDROOMS, "quest-official", "w8a8", fid=3)) == (
        "NOT RUN",
        "the cell has no sfid",
    )
    failed = verdict(number(value=math.nan), cell(BEDROOMS, "quest-official", "w8a8", fid=200.0))
    assert failed == ("NOT COMPARABLE", "the source has no number here")


def test_what_the_source_does_not_state_is_listed():
    row = ledger.ledger([cell(BEDROOMS, "quest-official", "w8a8", fid=3.03)], number(protocol="sampler=ddim")).iloc[0]
    assert row.verdict == "PASS" and row.not_stated == "weights, steps, eta, n, extractor, reference"


def test_zoo_models_never_stand_against_published_numbers(numbers):
    drawn = {name for name, model in MODELS.items() if model.extractor == "scenes" or model.origin is None}
    zoo = cell({"model": "scenes-uncond"}, "quest-official", "w8a8", fid=3.03)
    frame = ledger.ledger([zoo], numbers)
    assert not drawn & set(frame.model) and set(frame.verdict) == {"NOT RUN"}
    assert set(frame.metric) <= set(METRICS) and set(frame.model) == {m for m in MODELS if m not in drawn}
    assert ledger.ledger([zoo], number(model="scenes-uncond")).empty
    assert not {key[0] for key in ledger.beside(numbers)} & drawn


def test_beside_prefers_the_tables_of_results(numbers):
    beside = ledger.beside(numbers)
    assert beside["lsun-bedrooms", "quest-paper", "w4a8", "fid"] == 3.26  # not 3.82 of Table 8
    assert beside["imagenet", "tfmq-dm", "w8a8", "fid"] == 10.79
    assert ("lsun-bedrooms", "quest-paper", "w4a4", "sfid") not in beside


def test_every_shipped_model_has_a_fingerprint():
    shipped = [name for name, model in MODELS.items() if model.origin is None and model.folder.is_dir()]
    assert {"photos-class", "photos-dit", "emoji-text", "scenes-text"} <= set(shipped)
    hashes = [ledger.fingerprint(MODELS[name], "0-299", 300)["weights"] for name in shipped]
    assert len(set(hashes)) == len(shipped)


def test_fingerprint_of_a_shipped_and_of_a_published_model(tmp_path, monkeypatch):
    shipped = ledger.fingerprint(MODELS["scenes-uncond"], "0-499", 500, "f" * 64)
    assert len(shipped["weights"]) == 64 and shipped["eta"] == 1.0 and shipped["steps"] == 40
    assert "guidance" not in shipped and "clip" not in shipped and shipped["seeds"] == "evaluation 0-499"
    assert shipped["reference"] == "f" * 64 and len(shipped["extractor_sha256"]) == 64
    monkeypatch.setattr(ledger, "PREPARED", tmp_path)
    (tmp_path / "sd14").mkdir()
    captions = hashlib.sha256(b"captions").hexdigest()
    origin = {"sha256": "0" * 64, "captions": {"file": "captions.txt", "sha256": captions}}
    (tmp_path / "sd14" / "origin.json").write_text(json.dumps(origin), encoding="utf-8")
    found = ledger.fingerprint(models.MODELS["sd14"], "0-9999", 10_000)
    assert found["weights"] == "0" * 64 and found["prompts"] == captions and found["guidance"] == 7.5
    assert "eta" not in found and "reference" not in found and found["clip_sha256"].startswith("5806e77c")
    assert json.loads(json.dumps(found)) == found


def test_bad_files(tmp_path):
    file = tmp_path / "published.csv"
    header = ",".join(ledger.COLUMNS)
    for content, told in {
        "paper,value\n": "columns are paper, value; needed: source, table",
        f"{header}\na,b,m,quest,w4a8,fid,3.0x,,\n": r"published.csv, line 2: could not convert string",
        f"{header}\na,b,m,quest,w4a8,fid,3.0,n=5; n=6,\n": "line 2: protocol 'n=5; n=6': write it as key=value",
        f"{header}\na,b,m,quest,w4a8,fid,3,n=5,\na,b,m,quest,w4a8,fid,4,n=5,\n": "line 3: this number is there twice",
    }.items():
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            ledger.published(file)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "many"])
def test_a_published_number_is_finite(tmp_path, value):
    row = ["paper", "1", "sd14", "quest", "w4a4", "fid", value, "", ""]
    file = tmp_path / "published.csv"
    file.write_text(f"{','.join(ledger.COLUMNS)}\n{','.join(row)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="published.csv, line 2"):
        ledger.published(file)


@pytest.mark.parametrize("told", ["[]", "{}", '{"sha256": "abc"}', '{"sha256": 4}', '{"captions": 3}', "{", "NaN"])
def test_an_origin_without_a_hash_is_named(tmp_path, monkeypatch, told):
    monkeypatch.setattr(ledger, "PREPARED", tmp_path)
    (tmp_path / "sd14").mkdir()
    (tmp_path / "sd14/origin.json").write_text(told, encoding="utf-8")
    with pytest.raises(ValueError, match=r"sd14/origin\.json: "):
        ledger._origin(MODELS["sd14"])
