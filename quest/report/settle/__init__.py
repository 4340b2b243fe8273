"""Verdicts on methods, reached in looks at a growing number of quantization seeds (PROTOCOL.md). Needs no torch.

`looks` has the statistics, `cells` reads what cells left in results/settled, `verdicts` judges pairs of methods,
`lottery` says how far each source of chance moves an endpoint, `facts` answers claims that are not about a pair, and
`claims` writes docs/claims.md.
"""

import hashlib
import json

RECORDS = 1  # the version of PROTOCOL.md since which records hold what they hold; part of the identity of a row
LOOKS = (3, 5, 8, 12)  # seeds
SEEDS = tuple(range(3, 3 + LOOKS[-1]))  # held out: seeds 0 to 2 were looked at while methods were developed
FP, FP_BITS = "fp", "w32a32"


def identity(told: dict) -> str:
    """Hash of what all seeds of a row share, such as weights, recipe and images."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
