"""Cells from files, their metrics, and paired comparison of two of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from quest.metrics import METRICS, OF_TRAJECTORIES, Cell, compare, index_ranges, measure
from quest.metrics.frechet import Reference, Statistics, frechet_distance
from quest.metrics.inception_score import splits_note
from quest.metrics.intervals import interval
from quest.metrics.kernel_distance import kernel_distance, resampled_kernel_distances

HASH = "0123456789abcdef"
SAID = {"extractor": "scenes", "clip": "scenes-clip", "protocol": "DDIM 5", "reference_sha256": HASH}
N, TIMESTEPS = 200, [901, 601, 601, 301, 1]


def draw_cell(noise=0.0, seed=0, n=N, clip=True, guided=True):
    """A synthetic cell: what seed-paired models share, and each one's own deviation of size `noise`."""
    common, own = np.random.default_rng(123), np.random.default_rng(seed)

    def around(*shape):
        return (common.normal(size=shape) + noise * own.normal(size=shape)).astype(np.float32)

    pixels = 128 + 40 * around(n, 8, 8, 3)
    names = ["pool", "spatial", "logits"] + (["clip_image", "clip_text"] if clip else [])
    return Cell(
        index=np.arange(n),
        features={name: around(n, 12 if name != "logits" else 5) for name in names},
        images=pixels.round().clip(0, 255).astype(np.uint8),
        latents=around(n, 3, 4, 4),
        eps_error=(noise**2 * (1 + own.random((16, len(TIMESTEPS))))).astype(np.float32),
        guided_eps_error=(noise**2 * (2 + own.random((16, len(TIMESTEPS))))).astype(np.float32) if guided else None,
        timesteps=np.array(TIMESTEPS),
    )


@pytest.fixture(scope="module")
def reference():
    pool, spatial = (Statistics.from_features(np.random.default_rng(s).normal(size=(5000, 12))) for s in (7, 8))
    return Reference(pool, spatial, {})


@pytest.fixture(scope="module")
def measured(reference):
    fp = draw_cell()
    cells = {"fp": None, "good": draw_cell(0.2, seed=1), "twin": draw_cell(0.2, seed=2), "bad": draw_cell(0.6, seed=3)}
    return {
        name: measure(
            cell or fp,
            reference,
            cell and fp,
            extractor="scenes",
            clip="scenes-clip",
            protocol="DDIM 5",
            reference_sha256=HASH,
        )
        for name, cell in cells.items()
    }


def by_metric(rows):
    return {row["metric"]: row for row in rows}


def test_full_precision_has_no_paired_metrics(measured):
    assert [row["metric"] for row in measured["fp"]["rows"]] == ["fid", "sfid", "is", "clip", "retrieval"]
    # Neither real images' features nor Inception: no precision and recall, no distance at infinity.
    assert [row["metric"] for row in measured["good"]["rows"]] == [
        name
        for name, metric in METRICS.items()
        if name not in ("precision", "recall", "fid_infinity", "agreement") and not metric.lite0
    ]
    assert measured["fp"]["eps_error"] == []


def test_distances_on_lite0_have_their_own_names(reference):
    fp, cell = draw_cell(), draw_cell(0.2, seed=1)
    for one in (fp, cell):
        one.features["maps"] = one.features["spatial"].astype(np.float16)
    real = np.random.default_rng(7).normal(size=(300, 12)).astype(np.float32)
    said = SAID | {"extractor": "lite0-photos", "clip": None}
    rows = by_metric(measure(cell, replace(reference, features=real), fp, **said)["rows"])
    assert not {"fid", "sfid", "fid_to_fp"} & set(rows)
    assert not any("FID" in METRICS[name].label for name in rows)
    assert rows["kid_64w"]["value"] == pytest.approx(kernel_distance(cell.features["pool"], real))
    assert rows["kid_64w"]["low"] < rows["kid_64w"]["value"] < rows["kid_64w"]["high"]
    pool, fp_pool = (Statistics.from_features(c.features["pool"]) for c in (cell, fp))
    assert rows["fd_64w"]["value"] == pytest.approx(frechet_distance(pool, reference.pool))
    assert rows["fd_64w_to_fp"]["value"] == pytest.approx(frechet_distance(pool, fp_pool))
    moved = (cell.features["maps"].astype(np.float64) - fp.features["maps"]) ** 2
    assert rows["lite0_distance"]["value"] == pytest.approx(moved.sum(axis=1).mean())


def test_class_agreement_is_the_share_of_images_that_show_their_class(reference):
    cell = draw_cell(0.2, seed=1)
    labels = np.arange(N) % 10
    seen = np.where(np.arange(N) < 150, labels, (labels + 1) % 10)
    cell.features.update({"class_logits": np.eye(10, dtype=np.float32)[seen], "labels": labels})
    row = by_metric(measure(cell, reference, None, **SAID)["rows"])["agreement"]
    assert row["value"] == 0.75 and row["n"] == N and 0.68 < row["low"] < 0.75 < row["high"] < 0.82


def test_log_latent_mse_of_identical_latents_is_finite(reference):
    fp, cell = draw_cell(), draw_cell(0.2, seed=1)
    cell.latents[0] = fp.latents[0]
    row = by_metric(measure(cell, reference, fp, **SAID)["rows"])["log_latent_mse"]
    errors = ((cell.latents - fp.latents).astype(np.float64) ** 2).mean(axis=(1, 2, 3))
    assert row["value"] == pytest.approx((np.log10(errors[1:]).sum() - 10) / N, rel=1e-4)


def test_rows_are_complete_and_survive_json(measured):
    for cell in measured.values():
        assert json.loads(json.dumps(cell)) == cell
        for row in cell["rows"]:
            assert list(row) == ["metric", "value", "low", "high", "n", "extractor", "protocol", "reference", "note"]
            assert row["low"] < row["value"] < row["high"]
            assert row["n"] == (16 if row["metric"] in OF_TRAJECTORIES else N)
            assert row["protocol"].startswith("DDIM 5")
    rows = by_metric(measured["good"]["rows"])
    assert rows["fid"]["extractor"] == rows["is"]["extractor"] == rows["fid_to_fp"]["extractor"] == "scenes"
    assert rows["clip"]["extractor"] == "scenes-clip" and rows["psnr"]["extractor"] == ""
    assert rows["is"]["protocol"] == "DDIM 5; 1 split"
    assert rows["fid"]["reference"] == rows["sfid"]["reference"] == "0123456789ab"
    assert rows["fid_to_fp"]["reference"] == rows["clip"]["reference"] == ""


def test_values_are_those_of_the_metrics(measured, reference):
    cell, fp, rows = draw_cell(0.2, seed=1), draw_cell(), by_metric(measured["good"]["rows"])
    pool, fp_pool = (Statistics.from_features(c.features["pool"]) for c in (cell, fp))
    assert rows["fid"]["value"] == pytest.approx(frechet_distance(pool, reference.pool))
    assert rows["fid_to_fp"]["value"] == pytest.approx(frechet_distance(pool, fp_pool))
    assert rows["latent_mse"]["value"] == pytest.approx(np.mean((cell.latents - fp.latents) ** 2), rel=1e-5)
    assert rows["eps_error"]["value"] == pytest.approx(cell.eps_error.mean(), rel=1e-5)
    assert rows["guided_eps_error"]["value"] == pytest.approx(cell.guided_eps_error.mean(), rel=1e-5)


def test_the_guided_error_is_compared_in_pairs_where_both_have_it(measured, reference):
    found = compare(measured["good"], measured["bad"])["guided_eps_error"]
    assert (found.verdict, found.n) == ("better", 16)
    without = measure(draw_cell(0.2, seed=1, guided=False), reference, draw_cell(), **SAID)
    assert "guided_eps_error" not in by_metric(without["rows"]) | compare(without, measured["bad"])


def test_eps_error_by_call_keeps_repeated_timesteps(measured):
    rows = measured["good"]["eps_error"]
    assert [row["call"] for row in rows] == [0, 1, 2, 3, 4] and [row["timestep"] for row in rows] == TIMESTEPS
    errors = draw_cell(0.2, seed=1).eps_error
    assert [row["value"] for row in rows] == pytest.approx(errors.mean(axis=0), rel=1e-5)
    assert all(row["low"] < row["value"] < row["high"] and row["n"] == 16 for row in rows)


def test_better_cell_is_told_from_worse_and_not_from_its_twin(measured):
    against_bad = compare(measured["good"], measured["bad"])
    for name in ("psnr", "latent_mse", "fid_to_fp", "eps_error", "fid"):
        found = against_bad[name]
        assert found.verdict == "better", name
        assert found.low < found.estimate < found.high and found.low * found.high > 0
    assert against_bad["psnr"].estimate > 0 > against_bad["latent_mse"].estimate
    against_twin = compare(measured["good"], measured["twin"])
    for name in ("psnr", "latent_mse", "fid_to_fp", "fid", "sfid"):
        assert against_twin[name].verdict == "neither", name


def test_comparison_is_antisymmetric(measured):
    there, back = (compare(measured[a], measured[b]) for a, b in [("good", "bad"), ("bad", "good")])
    for one, other in zip(there.values(), back.values(), strict=True):
        assert one.estimate == -other.estimate and one.low == pytest.approx(-other.high)
        assert {one.verdict, other.verdict} in ({"better", "worse"}, {"neither"})


def test_comparison_with_full_precision_has_the_unpaired_metrics(measured):
    found = compare(measured["bad"], measured["fp"])
    assert list(found) == ["fid", "sfid", "is", "clip", "retrieval"]
    assert found["fid"].verdict == "worse"
    own = compare(measured["fp"], measured["fp"])
    assert all(one.verdict == "neither" and one.high == 0 for one in own.values())


def test_paired_interval_is_narrower_than_the_intervals_of_the_two(measured):
    found = compare(measured["good"], measured["twin"])["fid"]
    alone = [by_metric(measured[name]["rows"])["fid"] for name in ("good", "twin")]
    assert found.high - found.low < 0.7 * math.hypot(*(r["high"] - r["low"] for r in alone))


def test_a_cell_with_one_latent_that_is_not_finite_loses_in_every_metric(measured, reference):
    broken, good = draw_cell(0.2, seed=1), measured["good"]
    broken.latents[7, 0, 0, 0] = np.nan
    cell = measure(broken, reference, draw_cell(), **SAID)
    there, back, itself = compare(cell, good), compare(good, cell), compare(cell, cell)
    assert {"fid", "psnr", "latent_mse"} <= set(there)
    assert math.isfinite(there["fid"].estimate) and math.isnan(there["latent_mse"].estimate)
    for name in there:
        assert there[name].verdict == back[name].verdict == "diverged"
        assert there[name].better("a", "b") == back[name].better("b", "a") == "a diverged"
        assert itself[name].verdict == "neither" and itself[name].better("a", "b") == "neither (both diverged)"


def test_clip_only_where_there_are_captions(reference):
    rows = measure(draw_cell(clip=False), reference, None, extractor="scenes")["rows"]
    assert [row["metric"] for row in rows] == ["fid", "sfid", "is"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extractor", ["scenes", "adm", "torch-fidelity", "clean"])
@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 11, 50, 99])
def test_few_images_give_finite_intervals_and_are_said(reference, extractor, n):
    cell = draw_cell(0.2, seed=1, n=n)
    measured = measure(cell, reference, draw_cell(n=n), extractor=extractor, clip="scenes-clip")
    json.dumps(measured, allow_nan=False)
    rows = by_metric(measured["rows"])
    assert "singular covariance" in rows["fid"]["note"] or n > 12
    if extractor == "clean":
        return
    note = rows["is"]["note"]
    if extractor == "torch-fidelity":
        # 10 splits: of one image below 20 images, of less than 10 below 100.
        of = "1 image" if n < 20 else f"{n // 10} images"
        assert note == f"a split of {of}, whose score is near 1 whatever is in it; n = 100 would do"
    else:
        assert (note == "") == (n >= 10) and (n >= 10 or f"a split of {n} images" in note)


def test_a_last_split_of_few_is_said():
    assert splits_note(50_000, "adm") == "" == splits_note(100, "torch-fidelity")
    assert splits_note(50_001, "adm").endswith("n = 55000 would do")


def test_one_draw_has_no_interval_and_says_so(reference):
    cell, fp = draw_cell(0.2, seed=1, n=50), draw_cell(n=50)
    one = replace(cell, eps_error=cell.eps_error[:1])
    row = by_metric(measure(one, reference, fp, extractor="scenes")["rows"])["eps_error"]
    assert math.isfinite(row["value"]) and math.isnan(row["low"])
    assert row["note"] == "n = 1: no interval, 2 would do"
    with pytest.raises(ValueError, match="1 image: metrics have an interval, which needs 2 or more"):
        measure(draw_cell(n=1), reference, None, extractor="scenes")


def test_resamples_without_a_value_are_left_out_of_an_interval():
    drawn = np.random.default_rng(0).normal(size=50)
    assert interval(0.0, np.append(drawn, np.nan)) == pytest.approx(interval(0.0, drawn), rel=1e-12)
    assert all(np.isnan(interval(0.0, np.full(5, np.nan))))
    many = np.stack([np.append(drawn, np.nan), np.append(drawn, 1.0)], 1)
    assert interval(np.zeros(2), many, 9)[1][0] == pytest.approx(interval(0.0, drawn, 9)[1])


@pytest.mark.filterwarnings("error")
def test_a_resample_without_a_pair_has_no_kernel_distance():
    features = np.random.default_rng(0).normal(size=(2, 4))
    found = resampled_kernel_distances(features, features + 1, np.array([[1.0, 1.0], [2.0, 0.0]]))
    assert math.isfinite(found[0]) and math.isnan(found[1])


def test_small_n_is_said_in_the_row(reference):
    rows = by_metric(measure(draw_cell(n=10), reference, None, extractor="scenes")["rows"])
    assert rows["fid"]["note"] == "n = 10 <= 12 dimensions: singular covariance" and rows["is"]["note"] == ""


def test_identical_images_and_broken_latents_are_said_in_the_row(reference):
    cell, fp = draw_cell(0.2, seed=1, n=50), draw_cell(n=50)
    cell.images[:2] = fp.images[:2]
    cell.latents[3, 0, 0, 0] = np.nan
    rows = by_metric(measure(cell, reference, fp, extractor="scenes")["rows"])
    assert "2 of 50 images identical" in rows["psnr"]["note"] and math.isfinite(rows["psnr"]["value"])
    assert rows["latent_mse"]["note"] == "diverged; 1 of 50 latents not finite" and math.isnan(
        rows["latent_mse"]["value"]
    )


def test_a_cell_without_a_denoiser_has_no_values_and_loses(measured, reference):
    """Its images are black, so a distance of them would be finite and mean nothing."""
    fp = draw_cell()
    black = replace(draw_cell(0.2, seed=1), images=np.zeros_like(fp.images), diverged="iteration 3: the loss is nan")
    broken = measure(black, reference, fp, **SAID)
    assert [row["metric"] for row in broken["rows"]] == [row["metric"] for row in measured["good"]["rows"]]
    for row in broken["rows"]:
        assert math.isnan(row["value"]) and math.isnan(row["low"]) and math.isnan(row["high"])
        assert row["note"] == "diverged; iteration 3: the loss is nan"
    for other in ("good", "fp"):
        compared = compare(broken, measured[other])
        assert compared and {one.verdict for one in compared.values()} == {"diverged"}


def test_only_equal_seeds_and_n_are_compared(measured, reference):
    fp, cell = draw_cell(), draw_cell(0.2, seed=1, n=150)
    with pytest.raises(ValueError, match="the cell has 0-149, full precision 0-199"):
        measure(cell, reference, fp, extractor="scenes")
    short = measure(
        cell,
        reference,
        draw_cell(n=150),
        extractor="scenes",
        clip="scenes-clip",
        protocol="DDIM 5",
        reference_sha256=HASH,
    )
    with pytest.raises(ValueError, match="equal images are compared, got 0-199 and 0-149"):
        compare(measured["good"], short)
    other = measure(
        fp, reference, None, extractor="scenes", clip="scenes-clip", protocol="DDIM 6", reference_sha256=HASH
    )
    with pytest.raises(ValueError, match="equal protocol are compared, got DDIM 5 and DDIM 6"):
        compare(measured["good"], other)
    elsewhere = measure(fp, reference, None, **SAID | {"reference_sha256": ""})
    with pytest.raises(ValueError, match="fid: only cells of equal reference are compared, got 0123456789ab and $"):
        compare(measured["good"], elsewhere)
    calls = draw_cell(0.2, seed=1)
    calls.timesteps[0] = 951
    calls = measure(
        calls, reference, fp, extractor="scenes", clip="scenes-clip", protocol="DDIM 5", reference_sha256=HASH
    )
    with pytest.raises(ValueError, match="eps_error: only cells of equal timesteps"):
        compare(measured["good"], calls)
    with pytest.raises(ValueError, match="no eps_error"):
        measure(Cell(fp.index, fp.features, fp.images, fp.latents), reference, fp, extractor="scenes")


def test_protocols_of_inception_are_said_in_the_row(reference):
    cell = draw_cell(clip=False)
    said = {name: by_metric(measure(cell, reference, None, extractor=name)["rows"]) for name in ("adm", "clean")}
    assert said["adm"]["fid"]["protocol"] == said["adm"]["sfid"]["protocol"] == "resize TensorFlow bilinear"
    assert said["adm"]["is"]["protocol"] == "resize TensorFlow bilinear; 1 split"
    assert said["clean"]["fid"]["protocol"] == "resize Pillow bicubic" and "is" not in said["clean"]
    shuffled = by_metric(measure(cell, reference, None, extractor="torch-fidelity")["rows"])["is"]
    assert shuffled["protocol"] == "resize TensorFlow bilinear; 10 splits of shuffled images"
    assert shuffled["value"] != said["adm"]["is"]["value"]


def test_precision_and_recall_where_there_are_features_of_real_images(reference):
    cell = draw_cell(clip=False)
    real = Reference(reference.pool, reference.spatial, {}, features=draw_cell(seed=9).features["pool"][:100])
    rows = by_metric(measure(cell, real, None, extractor="adm")["rows"])
    for row in (rows["precision"], rows["recall"]):
        assert row["protocol"] == "resize TensorFlow bilinear; k = 3, 100 real images"
        assert row["low"] < row["value"] <= row["high"] and row["value"] > 0.5  # half of the samples are those images
    assert rows["recall"]["n"] == len(cell.index)
    few = replace(cell, index=cell.index[:7], features={k: v[:7] for k, v in cell.features.items()})
    assert "recall" not in by_metric(measure(few, real, None, extractor="adm")["rows"])


def test_distance_at_infinity_lies_below_that_at_n_and_has_its_interval(reference):
    cell = Cell(np.arange(12_000), {"pool": np.random.default_rng(0).normal(size=(12_000, 12)) * 1.1}, None, None)
    cell.features.update(spatial=cell.features["pool"], logits=cell.features["pool"])
    rows = by_metric(measure(cell, reference, None, extractor="adm")["rows"])
    fid, infinite = rows["fid"], rows["fid_infinity"]
    assert infinite["value"] < fid["value"]
    assert infinite["high"] - infinite["low"] == pytest.approx(fid["high"] - fid["low"])


def test_features_alone_are_measured(reference):
    cell = replace(draw_cell(0.2, n=30), images=None, latents=None)
    rows = by_metric(measure(cell, reference, draw_cell(n=30), extractor="scenes")["rows"])
    assert "psnr" not in rows and "latent_mse" not in rows and {"fid", "fid_to_fp", "eps_error"} <= set(rows)


def test_index_ranges():
    assert index_ranges(np.arange(500)) == "0-499"
    assert index_ranges(np.array([0, 1, 2, 7, 9, 10])) == "0-2,7,9-10"
