"""Images that an earlier run of the same job drew: with more images asked for, only new ones are drawn. No torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quest.runtime.files import loads, read_arrays

Arrays = dict[str, np.ndarray]
OF_THE_CELL = ("eps_error", "timesteps", "metadata")  # arrays that have no row for each image


def earlier(
    files: Sequence[str | Path], job: dict, starts: Sequence[int], size: int, end: int
) -> tuple[set[int], list[Arrays]]:
    """Batches that `files` hold whole, and of each file the rows of those batches.

    files: .npz with `index` [N] and arrays of as many rows, and with `metadata` that names the job it is of. job: all
    that an image depends on, fit for JSON. starts: the batches that are wanted, by their first image, each `size`
    images but the last, which ends at `end`. A file that is missing, damaged or of another job holds none.
    """
    nothing = set(), [{} for _ in files]
    try:
        found = [read_arrays(file) for file in files]
        jobs = [loads(str(arrays["metadata"]), file).get("job") for arrays, file in zip(found, files, strict=True)]
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return nothing
    index = found[0].get("index")
    if any(told != job for told in jobs) or any(not np.array_equal(index, of.get("index")) for of in found):
        return nothing
    have = set(index.tolist())
    whole = {start for start in starts if have.issuperset(range(start, min(start + size, end)))}
    rows = [row for row, i in enumerate(index.tolist()) if i - i % size in whole and i < end]
    return whole, [{k: v[rows] for k, v in of.items() if k not in OF_THE_CELL} for of in found]


def joined(old: Arrays, new: Arrays) -> Arrays:
    """The rows of both in the order of `index`; one of the two may be empty."""
    if not old or not new:
        return old or new
    rows = np.argsort(np.concatenate([old["index"], new["index"]]))
    return {name: np.concatenate([old[name], new[name]])[rows] for name in new}
