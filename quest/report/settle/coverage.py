"""How often the looks of PROTOCOL.md err, by simulation: `python -m quest.report.settle.coverage -o FILE.csv`.

Simulated seeds have deviation 1, and an error over images that all seeds of a comparison share. Judged by the same code
as real cells (`looks.settle`), beside a reader who looks at a 95 % interval of Student's t after 3, 5, 8 and 12 seeds.
"""

import argparse
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from quest.report import rendering
from quest.report.settle import LOOKS
from quest.report.settle.looks import Estimate, settle

# difference and margin, in deviations of a seed; standard error over images, likewise; comparisons in a family
SCENARIOS = [
    {"difference": 0.0, "margin": 0.1, "images": images, "family": family, "seeds": law}
    for images in (0.0, 0.3, 1.0)
    for family in (1, 3)
    for law in ("normal", "heavy tails")
]
SCENARIOS += [{"difference": 0.0, "margin": m, "images": 0.1, "family": 3, "seeds": "normal"} for m in (2.0,)]
SCENARIOS += [{"difference": m, "margin": m, "images": 0.1, "family": 3, "seeds": "normal"} for m in (0.5, 1.0, 2.0)]
SCENARIOS += [{"difference": d, "margin": 0.1, "images": 0.1, "family": 3, "seeds": "normal"} for d in (1.0, 2.0, 4.0)]


def simulate(scenario: dict, trials: int, seed: int = 0) -> dict:
    """Shares of families, of `trials`, in which something happens; seeds of normal, or of Student's t with 3 degrees.

    false_difference: a comparison without a difference is called decided, or one with a difference in the wrong
    direction. false_equivalence: one whose difference reaches the margin is called equivalent. covered: share of
    comparisons whose last interval holds the difference. decided, equivalent: shares of comparisons. stopped_at: mean
    number of seeds. naive: share of families in which one of four ordinary 95 % intervals excludes zero although there
    is no difference.
    """
    rng, d, m = np.random.default_rng(seed), scenario["difference"], scenario["margin"]
    shape = (trials, scenario["family"], LOOKS[-1])
    noise = rng.normal(size=shape) if scenario["seeds"] == "normal" else rng.standard_t(3, size=shape) / math.sqrt(3)
    shared = scenario["images"] * rng.normal(size=shape[:2])
    values = d + noise + shared[:, :, None]
    totals: Counter = Counter()
    for trial in values:
        family = {i: [Estimate.of(one[:k], scenario["images"]) for k in LOOKS] for i, one in enumerate(trial)}
        plain = [[replace(estimate, images=0.0) for estimate in looks] for looks in family.values()]
        found = settle(family, m).values()
        totals["false_difference"] += any(one.verdict == "lower" or one.verdict == "higher" and d == 0 for one in found)
        totals["false_equivalence"] += d >= m and any(one.verdict == "equivalent" for one in found)
        totals["naive"] += d == 0 and any(naive.excludes_zero(0.05) for looks in plain for naive in looks)
        totals["covered"] += sum(abs(one.estimate.value - d) <= one.estimate.half(one.level) for one in found)
        totals["decided"] += sum(one.verdict in ("lower", "higher") for one in found)
        totals["equivalent"] += sum(one.verdict == "equivalent" for one in found)
        totals["stopped_at"] += sum(one.look for one in found)
    of_families = ("false_difference", "false_equivalence", "naive")
    counts = {name: trials if name in of_families else trials * scenario["family"] for name in totals}
    return scenario | {name: total / counts[name] for name, total in totals.items()} | {"trials": trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=4000, help="families in a scenario (default %(default)s)")
    arguments = parser.parse_args()
    found = pd.DataFrame([simulate(scenario, arguments.trials) for scenario in SCENARIOS])
    rendering.write(arguments.output, found.round(4))
    print(found.to_string())


if __name__ == "__main__":
    main()
