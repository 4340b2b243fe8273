"""One verdict of two methods, in a method's, a table's and a sentence's words."""

import math

import pytest

from quest.metrics.comparison import Comparison, outcome

NAN = math.nan


@pytest.mark.parametrize(
    "low, high, direction, verdict",
    [
        (-2, -1, "lower", "better"),
        (1, 2, "lower", "worse"),
        (-1, 1, "lower", "neither"),
        (0, 1, "lower", "neither"),
        (-2, -1, "higher", "worse"),
        (1, 2, "higher", "better"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_zero(low, high, direction, verdict):
    found = Comparison((low + high) / 2, low, high, 9, direction)
    assert found.verdict == verdict
    name = found.better("a", "b")
    assert name == {"better": "a", "worse": "b", "neither": "neither"}[verdict]
    assert outcome(name, "a") == verdict


@pytest.mark.parametrize("direction", ["lower", "higher"])
@pytest.mark.parametrize("numbers", [(NAN, NAN, NAN), (-2, -3, -1), (math.inf, NAN, NAN)])
def test_what_has_diverged_never_wins_and_is_never_equal(numbers, direction):
    """Whatever the numbers say: images of a broken cell are finite, and so is their FID."""
    first, second, both = (Comparison(*numbers, 9, direction, d) for d in ((True, False), (False, True), (True, True)))
    assert (first.verdict, second.verdict, both.verdict) == ("diverged", "diverged", "neither")
    assert (first.better("a", "b"), second.better("a", "b")) == ("a diverged", "b diverged")
    assert both.better("a", "b") == "neither (both diverged)"
    assert (first.in_words("b"), second.in_words("b"), both.in_words("b")) == (
        "diverged", "b diverged", "not told apart (both diverged)"
    )  # fmt: skip
    found = [outcome(one.better("a", "b"), "a") for one in (first, second, both)]
    assert found == ["diverged", "rival diverged", "neither"]


def test_a_difference_of_unknown_sides_that_is_not_finite_is_no_tie():
    assert Comparison(NAN, NAN, NAN).verdict == "diverged"


def test_pairs_take_students_interval_and_know_which_side_diverged():
    found = Comparison.of_pairs([2.0, 5.0], [1.0, 2.0])
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2 - 12.706, 2 + 12.706), rel=1e-3)
    assert (found.n, found.verdict) == (2, "neither")
    assert Comparison.of_pairs([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]).verdict == "better"
    assert Comparison.of_pairs([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "higher").verdict == "worse"
    assert Comparison.of_pairs([1.0, NAN], [1.0, 2.0]).diverged == (True, False)
    assert Comparison.of_pairs([1.0, 1.0], [1.0, math.inf]).better("a", "b") == "b diverged"
    with pytest.raises(ValueError, match="two values or more, got 1"):
        Comparison.of_pairs([1.0], [2.0])
