import math

import numpy as np
import pandas as pd
import pytest
from drawn import measured, stored
from safetensors.numpy import save_file

from quest.metrics import intervals
from quest.quantization.header import effort
from quest.report import ablations, figures

N = 500
BLOCK = {
    "model": "scenes-class",
    "bits": "w4a4",
    "against": "quest",
    "rows": {
        "quest-groups-1": {"time_groups": 1},
        "q-diffusion-groups": {"time_groups": 20, "of": "q-diffusion"},
        "full-finetune": {"method": "full-finetune", "init": "adaround"},
    },
}
LEVELS = {"quest": 1.0, "q-diffusion": 2.0, "quest-groups-1": 1.5, "q-diffusion-groups": 1.7, "full-finetune": 1.002}


def cell(method, value, images="0-499"):
    """Resampled values of all cells scatter together."""
    common = np.random.default_rng(0).normal(size=intervals.RESAMPLES)
    own = np.random.default_rng(int(value * 1000)).normal(size=intervals.RESAMPLES)
    resampled = {"log_latent_mse": value + 0.05 * common + 0.005 * own, "is": 40 - value + 0.05 * common + 0.005 * own}
    values = {name: float(draws.mean()) for name, draws in resampled.items()}
    size = {"bytes": 1_500_000, "bops": 1, "effective_bits": 4.5, "kernel": "integer", "realizable": 0.5}
    return measured("scenes-class", method, "w4a4", resampled, values, images=images, footprint=size)


STAGES = [{"stage": s, "parameters": 9, "iterations": 100, "batch": 16} for s in ("first", "second")]
TOOK = {"peak_memory": 1200, "cost": {"stages": STAGES}}


@pytest.fixture
def frame(tmp_path, write_checkpoint):
    paths = stored([cell(name, value) for name, value in LEVELS.items()], tmp_path)
    for i, path in enumerate(paths):
        write_checkpoint(path.with_name("model.safetensors"), seconds=100.0 + i, init={"seconds": 230.0}, **TOOK)
    return ablations.write(paths, BLOCK, tmp_path / "tables/ablations.csv", tmp_path / "tables/ablations.md")


def of(frame, row, versus, metric="log_latent_mse"):
    (found,) = frame[(frame["row"] == row) & (frame["versus"] == versus) & (frame["metric"] == metric)].itertuples()
    return found


def test_rows_are_compared_with_the_recipe_they_change(frame, tmp_path):
    assert set(zip(frame["row"], frame["versus"], strict=True)) == {
        ("quest", ""),
        ("q-diffusion", "quest"),
        ("quest-groups-1", "quest"),
        ("q-diffusion-groups", "quest"),
        ("q-diffusion-groups", "q-diffusion"),
        ("full-finetune", "quest"),
    }
    groups = of(frame, "quest-groups-1", "quest")
    assert groups.difference == pytest.approx(0.5, abs=0.01) and groups.better == "quest"
    # What all cells share cancels in a difference, and in it alone.
    assert (groups.difference_high - groups.difference_low) < 0.3 * (groups.high - groups.low)
    assert groups.changes == "time_groups=1" and groups.seeds == "evaluation 0-499"
    assert (groups.seconds, groups.seconds_before, groups.iterations, groups.peak_memory) == (102.0, 230.0, 200, 1200)
    assert (groups.size_mb, groups.realizable) == (1.5, 0.5)
    own = of(frame, "q-diffusion-groups", "q-diffusion")
    assert own.better == "q-diffusion-groups" and own.changes == "of=q-diffusion; time_groups=20"
    assert of(frame, "q-diffusion-groups", "quest").better == "quest"
    assert of(frame, "full-finetune", "quest").better == "neither"
    assert of(frame, "quest-groups-1", "quest", "is").better == "quest"
    assert math.isnan(of(frame, "quest", "").difference)
    again = pd.read_csv(tmp_path / "tables/ablations.csv", keep_default_na=False, na_values=["nan"])
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)


def test_the_table_for_people_says_better_only_where_the_interval_does(frame, tmp_path):
    lines = (tmp_path / "tables/ablations.md").read_text(encoding="utf-8").splitlines()
    words = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert " worse |" in words["quest-groups-1"] and "| 50% |" in words["quest-groups-1"]
    assert "worse" not in words["full-finetune"] and "better" not in words["full-finetune"]
    assert words["quest"].count("| – |") and "log10 latent MSE to FP | minus that of quest" in words["row"]
    assert "4 comparisons" in lines[-1]


def test_the_figure_has_a_line_for_every_row(frame, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.paired_differences(frame, "quest", "log_latent_mse", tmp_path / "ablations.png")
    (axes,) = drawn[0].axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["q-diffusion", "quest-groups-1", "q-diffusion-groups", "full-finetune"]
    legend = {text.get_text() for text in drawn[0].legends[0].get_texts()}
    assert legend == {"worse", "not told apart"}
    with pytest.raises(ValueError, match="no difference to 'rtn' in 'log_latent_mse'"):
        figures.paired_differences(frame, "rtn", "log_latent_mse", tmp_path / "ablations.png")


def test_what_cannot_be_compared_is_an_error(tmp_path):
    spent = [{"seconds": 1.0, "seconds_before": 0.0, "peak_memory": 1, "iterations": 0}]
    with pytest.raises(ValueError, match="quest-groups-1: nothing to compare with, there is no cell of quest"):
        ablations.ablations_frame([cell("quest-groups-1", 1.0)], spent, BLOCK)
    with pytest.raises(ValueError, match="quest-groups-1 against quest: .*equal images"):
        ablations.ablations_frame([cell("quest", 1.0), cell("quest-groups-1", 1.0, images="0-99")], spent * 2, BLOCK)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors is not a quantized checkpoint: its header lacks 'quest'"):
        effort(tmp_path / "a.safetensors")


@pytest.mark.parametrize("init", [{}, {"init": {}}])
def test_effort_of_a_checkpoint_that_starts_from_nothing(tmp_path, write_checkpoint, init):
    write_checkpoint(tmp_path / "a.safetensors", seconds=7.0, **TOOK, **init)
    assert effort(tmp_path / "a.safetensors")["seconds_before"] == 0.0


@pytest.mark.parametrize(
    "told, field",
    [
        ({}, "cost.stages"),
        ({"cost": {"stages": [{"stage": "first"}]}}, "cost"),
        (TOOK | {"seconds": "7"}, "seconds"),
        (TOOK | {"peak_memory": -1}, "peak_memory"),
        (TOOK | {"init": {"seconds": "7"}}, "init"),
    ],
)
def test_a_header_that_does_not_tell_the_effort_is_refused_by_file_and_field(tmp_path, write_checkpoint, told, field):
    write_checkpoint(tmp_path / "a.safetensors", **told)
    with pytest.raises(ValueError, match=rf"a\.safetensors: header field {field} is .*; valid: "):
        effort(tmp_path / "a.safetensors")
