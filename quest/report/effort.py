"""What making a checkpoint took, as its header says it. Needs no torch."""

import math
from pathlib import Path

from safetensors import safe_open

from quest.runtime.files import loads


def effort(path: str | Path) -> dict[str, float]:
    """seconds and peak_memory (1e6 bytes) of the quantize job, iterations of its stages of optimisation in all.

    seconds_before, peak_memory_before: of the checkpoint it started from, 0 where it started from full precision. NaN
    where the header says nothing. Raises ValueError naming a file that is not a quantized checkpoint.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = loads((file.metadata() or {})["quest"], path)
        stages = header["cost"]["stages"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a quantized checkpoint: its header lacks {error}") from error
    started = header.get("init") or {"seconds": 0.0, "peak_memory": 0}
    return {
        "seconds": header.get("seconds", math.nan),
        "seconds_before": started.get("seconds", math.nan),
        "peak_memory": header.get("peak_memory", math.nan),
        "peak_memory_before": started.get("peak_memory", math.nan),
        "iterations": sum(stage["iterations"] for stage in stages),
    }
