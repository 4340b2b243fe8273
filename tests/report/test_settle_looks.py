"""Looks at a growing number of seeds: what they spend, when they decide, and how often they err."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from quest.metrics import METRICS
from quest.report.settle import LOOKS, RECORDS, SEEDS, coverage, looks, verdicts
from quest.report.settle.looks import Estimate, levels, settle

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3, 0.01])
def test_students_t_errs_with_alpha_in_all_looks_together(alpha):
    seeds = np.random.default_rng(1).normal(size=(200_000, LOOKS[-1]))
    crossed = np.zeros(len(seeds), bool)
    for k, level in zip(LOOKS, levels(alpha), strict=True):
        t = seeds[:, :k].mean(axis=1) / (seeds[:, :k].std(axis=1, ddof=1) / math.sqrt(k))
        crossed |= np.abs(t) > stdtrit(k - 1, 1 - level / 2)
    assert 0.94 * alpha < crossed.mean() < alpha + 3 * math.sqrt(alpha / len(seeds))


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3])
def test_the_levels_of_all_looks_together_spend_their_share(alpha):
    """Against a simulation of normal scores, look by look."""
    seeds = np.random.default_rng(0).normal(size=(200_000, LOOKS[-1])).cumsum(axis=1)
    scores = np.abs(np.stack([seeds[:, k - 1] / math.sqrt(k) for k in LOOKS], axis=1))
    crossed = scores > [-ndtri(level / 2) for level in levels(alpha)]
    share = np.maximum.accumulate(crossed, axis=1).mean(axis=0)
    planned = [looks.spent(k / LOOKS[-1], looks.STUDENT * alpha) for k in LOOKS]
    assert planned[-1] == pytest.approx(looks.STUDENT * alpha)
    assert share == pytest.approx(planned, abs=5 * math.sqrt(alpha / len(scores)))


def test_the_interval_of_one_look_is_that_of_the_table_over_seeds():
    """sqrt(images^2 + seeds^2), each with its quantile, as `quest.report.seeds` says."""
    estimate = Estimate.of([1.0, 2.0, 4.5], images=0.3, n=500)
    seeds = stdtrit(2, 0.975) * np.std([1.0, 2.0, 4.5], ddof=1) / math.sqrt(3)
    assert estimate.half(0.05) == pytest.approx(math.hypot(stdtrit(499, 0.975) * 0.3, seeds))
    assert estimate.half(0.01) > estimate.half(0.05) > estimate.half(0.05, count=8)


def looked(*values, images=0.0, upto=12):
    """Estimates of all looks that so many seeds allow."""
    return [Estimate.of(values[:k], images) for k in LOOKS if k <= upto]


STEADY = [1, -1, 0.5, -0.5, 0, 0.2, -0.2, 0.1, -0.1, 0.4, -0.4, 0]  # deviations of seeds, mean 0


def seeds(mean, spread):
    return [mean + spread * one for one in STEADY]


def test_a_clear_difference_stops_at_the_first_look_and_a_small_one_later_or_never():
    found = settle({"clear": looked(*seeds(10, 0.1))}, margin=0.01)["clear"]
    assert (found.verdict, found.look, found.level) == ("higher", 3, levels(0.05)[0])
    assert settle({"other way": looked(*seeds(-10, 0.1))}, 0.01)["other way"].verdict == "lower"
    later = settle({"small": looked(*seeds(1.0, 1.0))}, margin=0.01)["small"]
    assert later.verdict == "higher" and later.look in (5, 8, 12)
    never = settle({"none": looked(*seeds(0.05, 1.0))}, margin=0.01)["none"]
    assert (never.verdict, never.look) == ("open", 12)
    early = settle({"few": looked(*seeds(0.05, 1.0), upto=5)}, margin=0.01)["few"]
    assert (early.verdict, early.look) == ("open", 5)


def test_what_is_surely_smaller_than_what_matters_is_equivalent_even_if_it_is_not_zero():
    found = settle({"tiny": looked(*seeds(0.1, 0.001))}, margin=1.0)["tiny"]
    assert (found.verdict, found.look) == ("equivalent", 3)
    assert settle({"tiny": looked(*seeds(0.1, 0.001))}, margin=0.01)["tiny"].verdict == "higher"
    # An error over images that all seeds share cannot be averaged away.
    assert settle({"tiny": looked(*seeds(0.1, 0.001), images=1.0)}, margin=1.0)["tiny"].verdict == "open"


def test_a_decided_pair_leaves_its_part_of_alpha_to_the_others():
    """Holm: at a third of alpha the second one stays open; with the first two decided it is not."""
    borderline = seeds(1.0, 0.82)
    alone = {"borderline": looked(*borderline, upto=3)}
    level = next(m for m in range(1, 200) if not Estimate.of(borderline[:3], 0.0).excludes_zero(levels(0.05 / m)[0]))
    assert settle(alone, 1e-9)["borderline"].verdict == ("open" if level == 1 else "higher")
    family = alone | {i: looked(*seeds(1e6, 1), upto=3) for i in range(5)}
    noise = {f"noise {i}": looked(*seeds(0.01, 1), upto=3) for i in range(5)}
    assert settle(family, 1e-9)["borderline"].verdict == settle(alone, 1e-9)["borderline"].verdict
    strict = settle(alone | noise, 1e-9)["borderline"]
    assert strict.verdict == "open" and strict.level == levels(0.05 / 6)[0]


def test_how_many_seeds_an_open_comparison_needs():
    estimate = Estimate.of(seeds(0.5, 1.0)[:5], images=0.0)
    level = levels(0.05)[1]
    needed = estimate.seeds_needed(0.01, level)
    assert needed > 5 and abs(estimate.value) > estimate.half(level, needed)
    assert abs(estimate.value) <= estimate.half(level, needed - 1)
    assert Estimate(0.5, images=1.0, seeds=1.0, count=5).seeds_needed(0.01, level) is None  # more images, not seeds


@pytest.mark.parametrize("scenario", [0, 3, 8], ids=str)
def test_the_error_stays_below_alpha_with_three_seeds_and_heavy_tails(scenario):
    found = coverage.simulate(coverage.SCENARIOS[scenario], trials=1500, seed=1)
    assert found["difference"] == 0 and found["naive"] > 0.1
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)
    assert found["false_difference"] < limit and found["covered"] > 1 - limit


def test_equivalence_errs_below_alpha_where_the_difference_just_matters():
    at_margin = next(s for s in coverage.SCENARIOS if s["difference"] == s["margin"] == 2.0)
    assert coverage.simulate(at_margin, trials=1500, seed=1)["false_equivalence"] < 0.05 + 0.017


def test_the_protocol_says_what_the_code_does():
    text = (ROOT / "PROTOCOL.md").read_text(encoding="utf-8")
    assert text.startswith("# Protocol, version 2\n") and f"carry the number {RECORDS}" in text
    table = {line.split("|")[1].strip(" `"): line.split("|")[3] for line in text.splitlines() if line.startswith("| `")}
    assert {name: float(cell.split()[0]) for name, cell in table.items()} == verdicts.MARGINS
    assert set(verdicts.MARGINS) <= set(METRICS)
    assert f"**Seeds {SEEDS[0]} to {SEEDS[-1]}**" in text
    assert "**{}, {}, {} and {} seeds**".format(*LOOKS) in text
    (said,) = re.findall(r"the four levels are ([\d., ]+\d) and ([\d.]+\d);", text.replace("\n", " "))
    assert [*said[0].split(", "), said[1]] == [f"{level:.4f}" for level in levels(0.05)]
    assert f"the first is {levels(0.05 / 3)[0]:.4f}" in text.replace("\n", " ")
