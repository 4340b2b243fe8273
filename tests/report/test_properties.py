"""Tables of the three properties from made-up measurements."""

import math

import pytest

from quest.report import properties, property_figures

SENSITIVITY = {
    "model": "m",
    "bits": "w4a4",
    "rows": [
        {"layer_class": c, "lowered": w, "layers": 2, "parameters": 0.5, "macs": 0.25, "errors": [e, 3 * e]}
        for c, e in (("boundary", 0.1), ("shortcut", 0.2), ("all", 0.3))
        for w in ("weights and activations", "activations")
    ],
}
TEMPORAL = {
    "model": "m",
    "bits": "w4a4",
    "timesteps": [801, 401, 1],
    "errors": [
        {"quantized": q, "ranges": r, "errors": [0.1, 0.2]}
        for q in ("time embedding", "all but time embedding", "all")
        for r in ("static", "one for each timestep")
    ],
    "distances": [
        {"ranges": r, "what": w, "values": v}
        for r in ("static", "QuEST")
        for w, v in {"error": [1.0, 2.0, 3.0], "apart": [4.0, 4.0, 4.0], "apart_quantized": [4.0, 5.0, 6.0]}.items()
    ]
    + [{"ranges": r, "what": "nearest", "values": [0, 2, 2]} for r in ("static", "QuEST")],
}
STATISTICS = {"max / p99": [0.0, 0.2], "kurtosis": [1.0, 2.0], "standard deviation": [0.0, 0.1]}


def activations(after: float) -> dict:
    histogram = {"layers": 3, "histogram": [0.5, 0.5]}
    moved = {name: [v + after for v in values] for name, values in STATISTICS.items()}
    denoisers = {"full precision": STATISTICS, "before finetuning": STATISTICS, "after finetuning": moved}
    classes = {
        name: {"boundary": values | histogram, "shortcut": values | histogram} for name, values in denoisers.items()
    }
    return {"model": "m", "bits": "w4a4", "edges": [-1, 0, 1], "denoisers": classes}


def test_sensitivity_has_a_row_and_an_interval_for_each_class():
    frame = properties.sensitivity_frame([SENSITIVITY]).set_index(["layer_class", "lowered"])
    row = frame.loc[("shortcut", "activations")]
    assert (row["value"], row["n"], row["macs"]) == (pytest.approx(0.4), 2, 0.25)
    assert row["high"] - row["value"] == pytest.approx(12.706 * 0.2, rel=1e-3)  # Student's factor for two values


def test_embeddings_say_which_timestep_they_look_like():
    frame = properties.embeddings_frame([TEMPORAL])
    assert frame[frame["ranges"] == "QuEST"]["nearest"].tolist() == [801, 1, 1]
    assert len(properties.temporal_frame([TEMPORAL])) == 6


def test_ranges_are_compared_on_the_same_trajectories():
    errors = [
        {"quantized": "all", "ranges": ranges, "errors": [1 + less, 5 + less]}
        for ranges, less in zip(properties.RANGE_KINDS, (0.0, -0.5), strict=True)
    ]
    (row,) = properties.range_frame([TEMPORAL | {"errors": errors}]).to_dict("records")
    assert (row["value"], row["low"], row["high"]) == (-0.5, -0.5, -0.5)


def test_changes_are_paired_by_trajectory():
    frame = properties.change_frame([activations(math.log(2))])
    after = frame[(frame["denoiser"] == "after finetuning") & (frame["layer_class"] == "boundary")]
    assert after["against"].unique().tolist() == ["before finetuning"]
    # Twice as large on every trajectory: no spread, although trajectories differ.
    assert after[["value", "low", "high"]].to_numpy() == pytest.approx(2.0)
    before = frame[frame["denoiser"] == "before finetuning"]
    assert before["value"].tolist() == pytest.approx([1] * 6)


def test_figures_are_drawn(tmp_path):
    property_figures.histograms([activations(0.1)], tmp_path / "a.png")
    property_figures.imbalance(properties.activation_frame([activations(0.1)]), tmp_path / "b.png")
    property_figures.temporal(
        properties.temporal_frame([TEMPORAL]), properties.embeddings_frame([TEMPORAL]), tmp_path / "c.png"
    )
    property_figures.sensitivity(properties.sensitivity_frame([SENSITIVITY]), tmp_path / "d.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abcd")
