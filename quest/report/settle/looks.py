"""Group-sequential tests: after how many seeds a difference may be called decided, and what error that leaves.

A comparison is looked at after 3, 5, 8 and 12 quantization seeds. Four tests at 5 % would err in 10 % of the cases
without a difference. So each look spends a part of alpha (Lan and DeMets, Biometrika 1983): after the share t of the
seeds, alpha ln(1 + (e - 1) t) is spent, which comes near Pocock's equal levels. O'Brien and Fleming's spending leaves
0.00001 for three seeds. With two degrees of freedom Student's factor is then in the hundreds, and nothing stops early.

The boundaries are those of normal scores. Student's t is compared with the same significance levels (Jennison and
Turnbull, Group Sequential Methods, 2000, chapter 4). Its values at two looks agree less than normal scores do, so all
looks together err 15 % more often; STUDENT takes that back. `quest.report.settle.coverage` shows what is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtrit

from quest.report.settle import LOOKS

ALPHA = 0.05  # of a family of comparisons
STUDENT = 0.86  # the share of alpha that is spent, so that Student's t errs with alpha (simulated)
NODES = 200  # of the integrals over the score of one look


def spent(share: float, alpha: float) -> float:
    """The part of alpha that is spent after this share of the seeds."""
    return alpha * math.log1p((math.e - 1) * share)


@cache
def levels(alpha: float) -> tuple[float, ...]:
    """The two-sided significance level of each look, so that Student's t errs in all of them with probability alpha.

    By recursive integration of the normal score (Armitage, McPherson and Rowe, 1969): `density` is that of the sum of
    seeds so far, where no look has decided.
    """
    found, points, density, before = [], np.zeros(1), np.ones(1), 0.0
    for seeds in LOOKS:
        share = seeds / LOOKS[-1]
        step = math.sqrt(share - before)  # deviation of what the new seeds add to the score
        spend = spent(share, STUDENT * alpha) - spent(before, STUDENT * alpha)

        def beyond(bound, points=points, density=density, step=step, share=share):
            limit = bound * math.sqrt(share)
            return float(density @ (ndtr((points - limit) / step) + ndtr((-limit - points) / step)))

        bound = brentq(lambda z, spend=spend, beyond=beyond: beyond(z) - spend, 0.1, 12)
        found.append(2 * float(ndtr(-bound)))
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        limit = bound * math.sqrt(share)
        new = nodes * limit
        kernel = np.exp(-(((new[:, None] - points) / step) ** 2) / 2) / (step * math.sqrt(2 * math.pi))
        points, density, before = new, (kernel @ density) * weights * limit, share
    return tuple(found)


@dataclass(frozen=True)
class Estimate:
    """A difference of two methods over seeds.

    value: the mean over seeds. images: its standard error over images, common to all seeds. seeds: the standard
    deviation between seeds. count, n: numbers of seeds and of images (0: normal quantiles for images).
    """

    value: float
    images: float
    seeds: float
    count: int
    n: int = 0

    @classmethod
    def of(cls, differences: Sequence[float], images: float, n: int = 0) -> "Estimate":
        """From the difference of each seed, two or more."""
        values = np.asarray(differences, np.float64)
        return cls(float(values.mean()), float(images), float(values.std(ddof=1)), len(values), n)

    def half(self, level: float, count: int | None = None) -> float:
        """Half of the interval that errs with probability `level`; as `quest.report.seeds` at 0.05.

        The half widths over images and over seeds are added in squares, each with its own quantile. That is a little
        wider than needed, never narrower. count: another number of seeds with the same deviation.
        """
        count = count or self.count
        over_images = (ndtri(1 - level / 2) if self.n < 2 else stdtrit(self.n - 1, 1 - level / 2)) * self.images
        return float(math.hypot(over_images, stdtrit(count - 1, 1 - level / 2) * self.seeds / math.sqrt(count)))

    def excludes_zero(self, level: float) -> bool:
        return abs(self.value) > self.half(level)

    def within(self, margin: float, level: float) -> bool:
        """Whether the difference is smaller than `margin`: two one-sided tests (TOST), each at half of `level`."""
        return abs(self.value) + self.half(level) < margin

    def seeds_needed(self, margin: float, level: float, most: int = 100) -> int | None:
        """How many seeds would settle it if value and spreads stayed as they are; None if `most` would not."""
        for count in range(self.count, most + 1):
            half = self.half(level, count)
            if abs(self.value) > half or abs(self.value) + half < margin:
                return count
        return None


@dataclass(frozen=True)
class Settled:
    """What the looks say of one comparison. look: the number of seeds where it stopped; level: the one used there."""

    verdict: str  # "lower", "higher", "equivalent" or "open"
    look: int
    level: float
    estimate: Estimate


def settle(family: dict, margin: float, alpha: float = ALPHA) -> dict:
    """Judge a family of comparisons of one endpoint: {key: [Estimate at each look so far]} -> {key: Settled}.

    Differences: Holm's procedure over the family in each look (Ye et al., Statistics in Medicine 2013). Of m
    comparisons that no look has decided yet, each is tested at alpha / m; a decided one leaves its part to the others.
    Equivalence: at alpha / (size of the family), which nothing enlarges, so that each kind of error has an alpha of its
    own. A difference that is surely below the margin counts as equivalent even where it excludes 0.
    """
    done: dict = {}
    undecided, size = set(family), max(1, len(family))
    for place, seeds in enumerate(LOOKS):
        there = [key for key in family if key not in done and place < len(family[key])]
        for key in there:
            estimate, level = family[key][place], 2 * levels(alpha / size)[place]
            if estimate.within(margin, level):
                done[key] = Settled("equivalent", seeds, level, estimate)
        again = True
        while again:
            again, level = False, levels(alpha / max(1, len(undecided)))[place]
            for key in there:
                if key in done or not family[key][place].excludes_zero(level):
                    continue
                estimate = family[key][place]
                done[key] = Settled("lower" if estimate.value < 0 else "higher", seeds, level, estimate)
                undecided.discard(key)
                again = True
    last = alpha / max(1, len(undecided))
    for key in family:
        if key not in done and family[key]:
            place = len(family[key]) - 1
            done[key] = Settled("open", LOOKS[place], levels(last)[place], family[key][place])
    return done
