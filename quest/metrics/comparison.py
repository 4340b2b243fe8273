"""The comparison of two methods in one metric. Every table and every text takes its verdict from here. No torch.

>>> Comparison(estimate=-1.2, low=-2.0, high=-0.4, direction="lower").verdict  # the whole interval is below 0
'better'
>>> Comparison(estimate=-1.2, low=-2.9, high=0.5, direction="lower").verdict  # the interval holds 0
'neither'
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quest.metrics.intervals import student

BEYOND = "beyond full precision"  # a doubt: quantizing cannot improve a model, so the metric errs
BELOW = "below the floor"  # a doubt: full precision is as far from itself, see `quest.metrics.floors`


@dataclass(frozen=True)
class Comparison:
    """The difference "first minus second" with its paired 95 % interval.

    The interval is paired: both methods were measured on the same images or trajectories, so the variation that they
    share cancels in the difference. n: number of pairs. direction: which values are better, "lower" or "higher".
    diverged: whether the first and the second method produced values that are not finite. A method that diverged loses,
    whatever the estimate is. doubt: why neither wins although the interval excludes 0, such as BEYOND and BELOW.
    """

    estimate: float
    low: float
    high: float
    n: int = 0
    direction: str = "lower"
    diverged: tuple[bool, bool] = (False, False)
    doubt: str = ""

    @classmethod
    def of_pairs(cls, first: Sequence[float], second: Sequence[float], direction: str = "lower") -> "Comparison":
        """Compare values measured in pairs, [n] each, by Student's t. Raises ValueError for fewer than two pairs."""
        mean, low, high = student([a - b for a, b in zip(first, second, strict=True)])
        first_diverged, second_diverged = (not all(map(math.isfinite, values)) for values in (first, second))
        return cls(mean, low, high, len(first), direction, (first_diverged, second_diverged))

    @property
    def columns(self) -> dict[str, float]:
        """The estimate and its interval under the names of table columns."""
        return {"difference": self.estimate, "low": self.low, "high": self.high}

    @property
    def verdict(self) -> str:
        """What the interval says about the first method.

        "better" or "worse" if the interval excludes 0 and nothing speaks against it, otherwise "neither". "diverged" if
        one of the two diverged; "neither" if both did.
        """
        first, second = self.diverged
        if first != second or not (first or math.isfinite(self.estimate)):
            return "diverged"
        if first or self.doubt or not (self.low > 0 or self.high < 0):
            return "neither"
        return "better" if (self.high < 0) == (self.direction == "lower") else "worse"

    def better(self, first: str, second: str) -> str:
        """Return the entry of a column `better`: the better name, "neither" or "NAME diverged". See `outcome`.

        "neither" has its reason in brackets where it is a doubt, or where both diverged.
        """
        diverged = f"{second if self.diverged[1] else first} diverged"
        reason = "both diverged" if all(self.diverged) else self.doubt
        neither = f"neither ({reason})" if reason else "neither"
        return {"better": first, "worse": second, "diverged": diverged, "neither": neither}[self.verdict]

    def in_words(self, second: str) -> str:
        """Return the verdict for a sentence about the first method."""
        if self.verdict == "neither":
            reason = "both diverged" if all(self.diverged) else self.doubt
            return "not told apart" + (f" ({reason})" if reason else "")
        return f"{second} diverged" if self.diverged == (False, True) else self.verdict


def outcome(better: str, first: str) -> str:
    """Return the verdict on the first method from a column `better`; "rival diverged" if the second one diverged.

    "flag" if one of the two is full precision, and the other is beyond it.
    """
    if better == f"neither ({BEYOND})":
        return "flag"
    name = better.removesuffix(" diverged")
    if better.startswith("neither"):
        return "neither"
    if name != better:
        return "diverged" if name == first else "rival diverged"
    return "better" if name == first else "worse"


def has_diverged(cell: dict) -> bool:
    """Return whether a metric of the cell (see `quest.metrics.measure`) is not finite.

    Such a cell counts as diverged in all its metrics: its images were clipped to finite values, so a finite FID of them
    says nothing about the method.
    """
    return not all(math.isfinite(row["value"]) for row in cell["rows"])
