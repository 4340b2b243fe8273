"""What full precision does to itself is no verdict, and what is beyond full precision is no success."""

import pytest

from quest.metrics.comparison import Comparison, outcome
from quest.metrics.floors import doubted, linear


def found(values, floors, direction="lower", metric="latent_mse", names=("a", "b")):
    """The comparison of two cells whose interval excludes 0."""
    difference = values[0] - values[1]
    cells = tuple({"method": name, "floors": floors} for name in names)
    comparison = Comparison(difference, difference - 1e-9, difference + 1e-9, 9, direction)
    return doubted(comparison, metric, values, cells)


@pytest.mark.parametrize("floor, better", [(0.0, "a"), (0.09, "a"), (0.11, "neither (below the floor)")])
def test_a_difference_below_the_floor_is_no_verdict(floor, better):
    assert found((0.2, 0.3), {"latent_mse": floor}).better("a", "b") == better
    assert found((0.2, 0.3), {"psnr": floor}).better("a", "b") == "a"  # another metric's floor
    assert outcome(better, "a") == ("better" if better == "a" else "neither")


@pytest.mark.parametrize("metric, factor", [("psnr", -10), ("log_latent_mse", 1)])
def test_decibels_and_logarithms_are_compared_as_errors(metric, factor):
    """Errors of 0.01 and 0.02 are 0.01 apart, however their logarithms are written."""
    values = (factor * -2.0, factor * -1.69897)
    direction = "higher" if factor < 0 else "lower"
    assert [linear(metric, value) for value in values] == pytest.approx([0.01, 0.02], rel=1e-5)
    for floor, verdict in ((0.009, "better"), (0.011, "neither")):
        assert found(values, {metric: floor}, direction, metric).verdict == verdict


def test_beyond_full_precision_is_a_flag_on_either_side():
    for values, names, flagged in (
        ((0.2, 0.3), ("a", "fp"), True),
        ((0.3, 0.2), ("a", "fp"), False),
        ((0.3, 0.2), ("fp", "a"), True),
        ((0.2, 0.3), ("fp", "a"), False),
    ):
        one = found(values, {}, metric="fid", names=names)
        assert (outcome(one.better(*names), names[0]) == "flag") == flagged
        assert (one.verdict == "neither") == flagged
    assert found((0.2, 0.3), {}, names=("a", "fp")).in_words("fp") == "not told apart (beyond full precision)"
