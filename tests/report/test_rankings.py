"""Rank correlations of measures and endpoints, and what layer errors say of broken cells."""

import math

import pandas as pd
import pytest

from quest.report import rankings

METHODS = ("rtn", "rtn-mse", "ptq4dm", "q-diffusion", "quest-suite")
RETRIEVAL = {"rtn": 0.1, "rtn-mse": 0.3, "ptq4dm": 0.5, "q-diffusion": 0.7, "quest-suite": 0.9}


def main_frame(kid, psnr, model="emoji-text", bits="w4a4"):
    """Cells of METHODS with these values, and full precision; every cell also shows what was asked to some share."""
    rows = [(model, "fp", "w32a32", "kid_64w", 0.1), (model, "fp", "w32a32", "retrieval", 0.9)]
    for method, one, other in zip(METHODS, kid, psnr, strict=True):
        rows += [(model, method, bits, "kid_64w", one), (model, method, bits, "psnr", other)]
        rows += [(model, method, bits, "retrieval", RETRIEVAL[method])]
    return pd.DataFrame(rows, columns=["model", "method", "bits", "metric", "value"])


def paired_frame(main, metrics):
    """The better one of every two methods, by their values."""
    rows = []
    for metric, direction in metrics.items():
        values = main[(main["metric"] == metric) & (main["method"] != "fp")].set_index("method")["value"]
        for place, versus in enumerate(METHODS):
            for method in METHODS[place + 1 :]:
                better = method if direction * values[method] < direction * values[versus] else versus
                rows.append(("emoji-text", "w4a4", metric, method, versus, better))
    return pd.DataFrame(rows, columns=["model", "bits", "metric", "method", "versus", "better"])


def layer_frame(medians):
    rows = [("emoji-text", method, "w4a4", median) for method, median in zip(METHODS, medians, strict=True)]
    return pd.DataFrame(rows, columns=["model", "method", "bits", "median"])


def only(frame, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    (row,) = frame.itertuples()
    return row


def test_a_measure_that_orders_as_the_endpoint_does_has_rank_correlation_one():
    """Whichever end of each is the better one."""
    main = main_frame([0.5, 0.4, 0.3, 0.2, 0.1], [10, 15, 20, 25, 30])
    paired = paired_frame(main, {"kid_64w": 1, "psnr": -1})
    found = only(rankings.frame(main, paired), measure="psnr", endpoint="kid_64w")
    assert found.rho == pytest.approx(1) and (found.cells, found.agree, found.disagree) == (5, 10, 0)
    assert found.low < 0 < found.rho == found.high == 1  # five methods do not say that it is above 0
    reverse = main_frame([0.1, 0.2, 0.3, 0.4, 0.5], [10, 15, 20, 25, 30])
    paired = paired_frame(reverse, {"kid_64w": 1, "psnr": -1})
    found = only(rankings.frame(reverse, paired), measure="psnr", endpoint="kid_64w")
    assert found.rho == pytest.approx(-1) and (found.agree, found.disagree) == (0, 10)


def test_the_interval_is_that_of_bonett_and_wright():
    low, high = rankings.interval(0.5, 12)
    error = math.sqrt((1 + 0.5**2 / 2) / 9)
    expected = [math.tanh(math.atanh(0.5) + side * 1.96 * error) for side in (-1, 1)]
    assert [low, high] == pytest.approx(expected)
    assert all(map(math.isnan, rankings.interval(0.5, 3)))


def test_equal_values_share_a_rank_and_alone_have_none():
    ties = main_frame([0.5, 0.3, 0.3, 0.2, 0.1], [10, 15, 15, 20, 30])
    assert only(rankings.frame(ties), measure="psnr", endpoint="kid_64w").rho == 1
    equal = rankings.frame(main_frame([0.5] * 5, [10, 15, 20, 25, 30]))
    assert "kid_64w" not in set(equal["endpoint"])


def test_models_are_pooled_and_few_methods_say_nothing():
    main = pd.concat(
        [main_frame([0.5, 0.4, 0.3, 0.2, 0.1], [10, 15, 20, 25, 30], model) for model in ("emoji-text", "photos-class")]
    )
    found = rankings.frame(main)
    pooled = only(found, model=rankings.ALL, measure="psnr", endpoint="kid_64w")
    single = only(found, model="emoji-text", measure="psnr", endpoint="kid_64w")
    assert pooled.cells == 10 and pooled.low > single.low
    assert math.isnan(single.agree)
    few = main[main["method"].isin(("fp", "rtn", "rtn-mse", "ptq4dm"))]
    assert rankings.frame(few).empty


def test_layer_errors_are_a_measure_and_say_which_cells_are_broken(tmp_path):
    main, layers = main_frame([0.5, 0.4, 0.3, 0.2, 0.1], [10, 15, 20, 25, 30]), layer_frame([0.5, 0.3, 0.2, 0.1, 0.05])
    found = only(rankings.frame(main, None, layers), measure="layer_error", endpoint="retrieval")
    assert found.rho == pytest.approx(1)
    broken = rankings.breakage(main, layers)
    assert dict(zip(broken["method"], broken["broken"], strict=True)) == {
        "rtn": True, "rtn-mse": True, "ptq4dm": False, "q-diffusion": False, "quest-suite": False
    }  # fmt: skip
    assert rankings.counts(broken) == {"below 0.15": (0, 2), "above 0.21": (2, 0), "between": (0, 1)}
    rankings.write(main, None, layers, tmp_path)
    text = (tmp_path / "tables" / "rankings.md").read_text(encoding="utf-8")
    assert "above 0.21: 2 of 2 cells broken" in text and "median layer error" in text
    assert (tmp_path / "figures" / "rankings.png").stat().st_size > 5000


def test_layer_errors_of_other_cells_and_negative_distances_are_drawn_without(tmp_path):
    main = main_frame([0.5, 0.4, 0.3, 0.2, -0.1], [10, 15, 20, 25, 30])
    others = layer_frame([0.1] * 5).assign(bits="w8a8")
    rankings.write(main, None, others, tmp_path)
    assert (tmp_path / "figures" / "rankings.png").stat().st_size > 5000


def test_nothing_to_draw_is_an_error(tmp_path):
    main = main_frame([0.5] * 5, [10] * 5)
    with pytest.raises(ValueError, match="no cell has both an endpoint and a measure"):
        rankings.figure(main[main["metric"] == "psnr"], None, tmp_path / "rankings.png")
