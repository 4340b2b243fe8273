import math

import numpy as np
import pytest
from drawn import measured, stored
from scipy import stats

from quest.metrics import intervals
from quest.report import seeds

SPREAD = 0.05


def cell(method, value, metric="log_latent_mse", images="0-499"):
    """Resampled values of all cells scatter together."""
    common = np.random.default_rng(0).normal(size=intervals.RESAMPLES)
    own = np.random.default_rng(int(value * 100) if math.isfinite(value) else 0).normal(size=intervals.RESAMPLES)
    resampled = {metric: value + SPREAD * common + 0.1 * SPREAD * own}
    return measured("scenes-text", method, "w4a4", resampled, {metric: value}, images=images)


def cells(**changed):
    of_seed = {0: "", 1: "@1", 2: "@2"}
    levels = {"q-diffusion": (2.0, 2.2, 2.4), "quest": (1.0, 1.3, 1.3)} | changed
    return [cell(m + of_seed[k], v) for m, values in levels.items() for k, v in enumerate(values)]


def row(frame, method, versus):
    return frame[(frame.method == method) & (frame.versus == versus)].iloc[0]


def test_an_interval_over_seeds_holds_both_spreads():
    frame = seeds.seeds_frame(cells())
    assert len(frame) == 3 and set(frame.seeds) == {"0,1,2"} and set(frame.evaluation) == {"0-499"}
    own = row(frame, "quest", "")
    assert own.value == pytest.approx(1.2)
    low, high = stats.t.interval(0.95, 2, 1.2, stats.sem([1.0, 1.3, 1.3]))
    assert own.over_seeds == pytest.approx((high - low) / 2)
    assert own.over_images == pytest.approx(1.96 * SPREAD, rel=0.2)
    assert (own.high - own.low) / 2 == pytest.approx(math.hypot(own.over_images, own.over_seeds))


def test_a_difference_is_taken_seed_by_seed_and_its_images_cancel():
    found = row(seeds.seeds_frame(cells()), "quest", "q-diffusion")
    differences = np.array([-1.0, -0.9, -1.1])
    assert found.value == pytest.approx(differences.mean()) and found.better == "quest"
    assert found.over_seeds == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(differences))
    assert found.over_images < 0.3 * SPREAD * 1.96


def test_a_difference_that_seeds_turn_around_has_no_winner():
    found = row(seeds.seeds_frame(cells(quest=(1.9, 2.4, 2.0))), "quest", "q-diffusion")
    assert found.low < 0 < found.high and found.better == "neither"


@pytest.mark.parametrize(
    "full, better", [(3.0, "neither (both beyond full precision)"), (2.1, "quest"), (0.5, "quest")]
)
def test_methods_that_are_both_beyond_full_precision_are_not_ranked(full, better):
    """The metric errs for both. Their means are 1.2 and 2.2; lower is better."""
    frame = seeds.seeds_frame([cell("fp", full), *cells()])
    assert row(frame, "quest", "q-diffusion").better == better
    assert set(frame.method) == {"quest", "q-diffusion"}


def test_a_method_that_diverged_with_one_seed_has_not_won():
    broken = cells(quest=(1.0, math.nan, 1.3))
    found = row(seeds.seeds_frame(broken), "quest", "q-diffusion")
    assert math.isnan(found.value) and found.better == "quest diverged"
    assert "| quest | q-diffusion | diverged |" in seeds.seeds_table(seeds.seeds_frame(broken)).markdown()
    broken = cells(quest=(math.nan,) * 3, **{"q-diffusion": (2.0, math.inf, 2.4)})
    assert row(seeds.seeds_frame(broken), "quest", "q-diffusion").better == "neither (both diverged)"


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match=r"quest has seeds \[0, 1\]; at least two, here \[0, 1, 2\]"):
        seeds.seeds_frame(cells(quest=(1.0, 1.3)))
    with pytest.raises(ValueError, match="at least two"):
        seeds.seeds_frame([cell("quest", 1.0)])
    with pytest.raises(ValueError, match="quest@4.3: its draw is not its seed; valid: cells such as quest@3"):
        seeds.seeds_frame([*cells(), cell("quest@4.3", 1.0)])
    with pytest.raises(ValueError, match="equal images"):
        seeds.seeds_frame([*cells(quest=(1.0, 1.3)), cell("quest@2", 1.3, images="0-99")])


def test_files(tmp_path):
    seeds.write(stored(cells(), tmp_path), tmp_path / "tables")
    text = (tmp_path / "tables" / "seeds.md").read_text(encoding="utf-8")
    assert "| scenes-text | w4a4 | log10 latent MSE to FP | quest | q-diffusion | -1.00 ± 0.25 |" in text
    assert "Quantization seeds 0,1,2" in text and "n = 500, evaluation seeds 0-499" in text
    assert (tmp_path / "tables" / "seeds.csv").read_text(encoding="utf-8").count("\n") == 4
