"""What this machine allows and has: peaks, instructions, free memory, other load, packages."""

import ctypes
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from quest.benchmark.stopwatch import seconds_of
from quest.kernels.cpu import integer
from quest.kernels.cpu.core import best, core
from quest.runtime.provenance import provenance


def missing(*packages: str) -> str | None:
    """How to get the first of these packages that is not installed; None where all are."""
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return f'{package} is not installed: pip install -e ".[kernels]"'
    return None


@cache
def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16; without them torch converts back and forth."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" in text


def peaks(threads: int) -> dict[str, float]:
    """What the machine allows: GOP/s (two to a multiply-accumulate) of the integer kernel's own instructions and of
    float32's, on registers alone, and GB/s of a copy that no cache holds. Raises AttributeError for an older core."""
    peak = core().quest_peak
    peak.restype, peak.argtypes = ctypes.c_int64, [ctypes.c_char_p, ctypes.c_int64]
    found = {}

    def rate(isa):
        start = time.thread_time()  # not wall time: it is registers that are measured, whoever else computes
        return 2e-9 * peak(isa.encode(), 5_000_000) / (time.thread_time() - start)

    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        for name, isa in (("integer", best()), ("fp32", "float")):
            found[name] = max(sum(pool.map(rate, [isa] * threads)) for _ in range(5)) or math.nan
    source = torch.ones(64 << 20)  # 256 MB
    target = torch.empty_like(source)
    target.copy_(source)
    found["memory"] = 2e-9 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(7))
    return found


def free_memory() -> int | None:
    """Bytes of memory that are free; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def processor_time() -> tuple[float, float, float] | None:
    """(wall time, seconds that all processors were busy, seconds of this process); None where the system is mute."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def busy_elsewhere(before: tuple[float, float, float] | None) -> float:
    """Processors that others kept busy since `before`, on average."""
    if before is None:
        return math.nan
    wall, busy, mine = (now - then for now, then in zip(processor_time(), before, strict=True))
    return max(0.0, busy - mine) / wall


def instruction_set() -> str:
    """What the integer kernel computes with here; empty where it has no compiled core."""
    return "" if integer.unavailable(torch.device("cpu")) else best()


def made_with() -> dict[str, str]:
    """Versions, commit and date, as `speed.COLUMNS` has them."""
    made = provenance()
    versions = {"torch": torch.__version__}
    for package in ("openvino", "torchao"):
        if missing(package) is None:
            versions[package] = metadata.version(package)
    commit = made["commit"] and made["commit"] + ("-dirty" if made["dirty"] else "")
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {"versions": told, "commit": commit or "", "date": made["date"]}
