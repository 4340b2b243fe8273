import numpy as np
import pandas as pd
import pytest
from PIL import Image

from quest.report import figures
from quest.report.style import COLOURS

METHODS = {"rtn": [1.2, 60.0], "rtn-mse": [1.1, 12.0], "quest": [1.05, 4.0]}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def shows(path, colour):
    """Whether a figure holds at least a few pixels of exactly this colour ("#rrggbb")."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (pixels(path) == rgb).all(axis=2).sum() > 5


@pytest.fixture
def main():
    fp = {"method": "fp", "bits": "w32a32", "metric": "fid", "value": 1.0, "low": 0.9, "high": 1.1}
    rows = [fp] + [
        {"method": method, "bits": bits, "metric": metric, "value": value, "low": 0.9 * value, "high": 1.1 * value}
        for method, values in METHODS.items()
        for bits, value in zip(("w8a8", "w4a4"), values, strict=True)
        for metric in ("fid", "latent_mse")
    ]
    frame = pd.DataFrame([row | {"model": m, "n": 500, "extractor": "scenes"} for m in ("a", "b") for row in rows])
    frame.loc[frame["metric"] == "latent_mse", "extractor"] = np.nan  # as pandas reads an empty cell of main.csv
    return frame


@pytest.fixture
def eps_error():
    rows = [
        {"method": method, "bits": bits, "call": call, "timestep": t, "value": x, "low": 0.5 * x, "high": 2 * x}
        for method, values in METHODS.items()
        for bits, x in zip(("w8a8", "w4a4"), values, strict=True)
        for call, t in enumerate([951, 901, 901, 1])
    ]
    return pd.DataFrame([row | {"model": m, "n": 16} for m in ("a", "b") for row in rows])


def test_sample_grid_shows_every_pixel_as_it_is(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, size=(2, 3, 8, 8, 3), dtype=np.uint8)
    figures.sample_grid([("full precision", images[0]), ("quest", images[1])], tmp_path / "grid.png", "a, W4A4")
    drawn = pixels(tmp_path / "grid.png")
    enlarged = images.repeat(2, axis=2).repeat(2, axis=3)  # [rows, N, 16, 16, 3]
    step = 2 * 8 + 4
    # Where the first image begins, every other one follows at a distance of one image and one gap.
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (16, 16, 3))[:, :, 0]
    (top, left), *more = np.argwhere((windows == enlarged[0, 0]).all(axis=(2, 3, 4)))
    assert not more
    for row in range(2):
        for column in range(3):
            y, x = top + row * step, left + column * step
            assert np.array_equal(drawn[y : y + 16, x : x + 16], enlarged[row, column])
    # Labels are dark on white, left of the images.
    assert (drawn[top:, : left - 4].min(axis=2) < 128).any() and (drawn[:4] == 255).all()


def test_sample_grid_refuses_images_of_two_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 8, 8, 3\), \(3, 8, 8, 3\)\]"):
        rows = [(str(n), np.zeros((n, 8, 8, 3), np.uint8)) for n in (2, 3)]
        figures.sample_grid(rows, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_metric_vs_bits_draws_every_method(main, tmp_path):
    figures.metric_vs_bits(main, "fid", tmp_path / "fid.png")
    assert all(shows(tmp_path / "fid.png", colour) for colour in COLOURS[:3])
    assert not shows(tmp_path / "fid.png", COLOURS[3])
    figures.metric_vs_bits(main[main["method"] != "quest"], "latent_mse", tmp_path / "mse.png")
    assert not shows(tmp_path / "mse.png", COLOURS[2])


def test_metric_vs_bits_survives_a_collapsed_method(main, tmp_path):
    main.loc[(main.method == "rtn") & (main.bits == "w4a4"), ["value", "low", "high"]] = np.nan
    figures.metric_vs_bits(main, "latent_mse", tmp_path / "mse.png")
    assert shows(tmp_path / "mse.png", COLOURS[2])


def test_metric_vs_bits_bad_input(main, tmp_path):
    with pytest.raises(ValueError, match="metric: 'FID' is not one of kid_64w, fd_64w"):
        figures.metric_vs_bits(main, "FID", tmp_path / "x.png")
    with pytest.raises(ValueError, match="no row of metric 'clip'"):
        figures.metric_vs_bits(main, "clip", tmp_path / "x.png")


def test_eps_error_curves_draw_every_method_and_a_missing_cell(eps_error, tmp_path):
    frame = eps_error[~((eps_error.model == "b") & (eps_error.bits == "w8a8"))]
    figures.eps_error_curves(frame, tmp_path / "eps.png")
    assert all(shows(tmp_path / "eps.png", colour) for colour in COLOURS[:3])


def test_activation_ranges_follow_the_range(tmp_path):
    rows = [
        {"model": "a", "layer_class": name, "timestep": t, "low": -1.0, "high": 1 + width * t / 1000}
        for name, width in (("conv", 0), ("attention", 5))
        for t in range(1, 1000, 50)
    ]
    figures.activation_ranges(pd.DataFrame(rows), tmp_path / "ranges.png")
    drawn = pixels(tmp_path / "ranges.png")
    edge = (drawn == [0x00, 0x72, 0xB2]).all(axis=2)  # lines of the lowest and the highest input
    half = edge.shape[1] // 2
    highest = [np.argmax(part[:, part.any(axis=0)], axis=0) for part in (edge[:, :half], edge[:, half:])]
    assert np.ptp(highest[0]) <= 2  # a constant range is a straight line
    assert highest[1][-5] > highest[1][5] + 50  # noise on the left, so this one falls to the right


@pytest.mark.parametrize("count", [1, 5, 9])
def test_the_marks_of_all_methods_lie_within_their_panel(count):
    methods = [f"m{place}" for place in range(count)]
    assert all(abs(figures._beside(["w4a4"], place, methods)).max() < 0.5 for place in range(count))
