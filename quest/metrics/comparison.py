"""Two methods compared in one metric: a difference, its interval, and the one verdict that every table and text shows.

Needs no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quest.metrics.intervals import student


@dataclass(frozen=True)
class Comparison:
    """The difference "first minus second" with its paired 95 % interval.

    n: draws behind it. direction: "lower" or "higher" is better. diverged: whether the first and the second method
    produced values that are not finite; with these there is no difference to speak of, and the method has lost.
    """

    estimate: float
    low: float
    high: float
    n: int = 0
    direction: str = "lower"
    diverged: tuple[bool, bool] = (False, False)

    @classmethod
    def of_pairs(cls, first: Sequence[float], second: Sequence[float], direction: str = "lower") -> "Comparison":
        """Of values measured in pairs, by Student's t. Raises ValueError for fewer than two pairs."""
        mean, low, high = student([a - b for a, b in zip(first, second, strict=True)])
        first_diverged, second_diverged = (not all(map(math.isfinite, values)) for values in (first, second))
        return cls(mean, low, high, len(first), direction, (first_diverged, second_diverged))

    @property
    def columns(self) -> dict[str, float]:
        """As tables have it."""
        return {"difference": self.estimate, "low": self.low, "high": self.high}

    @property
    def verdict(self) -> str:
        """Of the first method: "better" or "worse" where the interval excludes 0, else "neither"; "diverged" where one
        of the two has diverged. Where both have, "neither"."""
        first, second = self.diverged
        if first != second or not (first or math.isfinite(self.estimate)):
            return "diverged"
        if first or not (self.low > 0 or self.high < 0):
            return "neither"
        return "better" if (self.high < 0) == (self.direction == "lower") else "worse"

    def better(self, first: str, second: str) -> str:
        """Column `better` of a table: the better one's name, "neither", or "NAME diverged"; `outcome` reads it."""
        diverged = f"{second if self.diverged[1] else first} diverged"
        neither = "neither (both diverged)" if all(self.diverged) else "neither"
        return {"better": first, "worse": second, "diverged": diverged, "neither": neither}[self.verdict]

    def told(self, second: str) -> str:
        """The verdict in a sentence about the first method."""
        if self.verdict == "neither":
            return "not told apart" + (" (both diverged)" if all(self.diverged) else "")
        return f"{second} diverged" if self.diverged == (False, True) else self.verdict


def outcome(better: str, first: str) -> str:
    """What a column `better` says of the first method: a verdict, or "rival diverged" where the second has diverged."""
    name = better.removesuffix(" diverged")
    if better.startswith("neither"):
        return "neither"
    if name != better:
        return "diverged" if name == first else "rival diverged"
    return "better" if name == first else "worse"


def has_diverged(cell: dict) -> bool:
    """Whether a cell, as `quest.metrics.measure` returns it, has a metric that is not finite.

    It then counts as diverged in all its metrics: images are clipped to finite values, and what FID says of those is no
    property of the method.
    """
    return not all(math.isfinite(row["value"]) for row in cell["rows"])
