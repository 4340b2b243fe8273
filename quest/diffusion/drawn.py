"""Keep what is sampled, and reuse what an earlier run of the same job sampled. No torch."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quest.runtime.files import loads, merged, read_arrays

Arrays = dict[str, np.ndarray]
# Arrays about the whole cell, without a row for each image.
OF_THE_CELL = ("eps_error", "guided_eps_error", "timesteps", "metadata")


def earlier(
    files: Sequence[str | Path], job: dict, starts: Sequence[int], size: int, end: int
) -> tuple[set[int], list[Arrays], float]:
    """What `files` contain: complete batches (their first images), the rows of these in each file, and their seconds.

    files: .npz with `index` [N], arrays with N rows, and `metadata` with the job that wrote them. job: everything that
    an image depends on, ready for JSON. starts: first images of the requested batches, each of `size` images except the
    last, which ends at `end`. A file that is missing, damaged or from another job contains no batch. The seconds are a
    share of those in the metadata of the first file, which all of its rows took; 0 where it has none.
    """
    nothing = set(), [{} for _ in files], 0.0
    try:
        contents = [read_arrays(file) for file in files]
        told = [loads(str(arrays["metadata"]), file) for arrays, file in zip(contents, files, strict=True)]
        jobs = [one.get("job") for one in told]
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return nothing
    index = contents[0].get("index")
    if any(other != job for other in jobs) or any(not np.array_equal(index, a.get("index")) for a in contents):
        return nothing
    have = set(index.tolist())
    whole = {start for start in starts if have.issuperset(range(start, min(start + size, end)))}
    rows = [row for row, i in enumerate(index.tolist()) if i - i % size in whole and i < end]
    kept = slice(None) if len(rows) == len(index) else rows  # all of them need no copy in memory
    seconds = told[0].get("seconds", 0.0) * len(rows) / max(1, len(index))
    return whole, [{k: v[kept] for k, v in arrays.items() if k not in OF_THE_CELL} for arrays in contents], seconds


def joined(old: Arrays, new: Arrays) -> Arrays:
    """Merge the rows of both in the order of `index`; one of the two may be empty."""
    if not old or not new:
        return old or new
    rows = np.argsort(np.concatenate([old["index"], new["index"]]))
    return {name: merged([old[name], new[name]], rows) for name in new}


class Collected:
    """Rows of arrays, added batch by batch. They lie in temporary files, so memory does not depend on their number."""

    def __init__(self):
        self.files: dict[str, tuple] = {}  # name -> file, type and shape of a row

    def add(self, rows: Arrays) -> None:
        for name, array in rows.items():
            if name not in self.files:
                self.files[name] = tempfile.TemporaryFile(), array.dtype, array.shape[1:]
            self.files[name][0].write(array.tobytes())

    def arrays(self) -> Arrays:
        """All rows, under their names. Nothing may be added afterwards."""
        found = {}
        for name, (file, dtype, shape) in self.files.items():
            with file:
                file.flush()
                n = file.tell() // (dtype.itemsize * math.prod(shape))
                found[name] = np.asarray(np.memmap(file, dtype, "r+", shape=(n, *shape)))
        return found
