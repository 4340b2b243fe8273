"""Properties of this machine: peak rates, instruction sets, free memory, load of other processes, packages."""

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
from quest.runtime import memory
from quest.runtime.provenance import provenance


def missing(*packages: str) -> str | None:
    """How to install the first of these packages that is missing; None if all are installed."""
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
    """Peak rates: GOP/s of the integer kernel's instructions and of float32 on registers (a multiply-accumulate counts
    as 2), and GB/s of a copy too large for every cache."""
    peak, rates = core().quest_peak, {}

    def rate(isa):
        start = time.thread_time()  # not wall time, so that the load of other processes does not count
        return 2e-9 * peak(isa.encode(), 5_000_000) / (time.thread_time() - start)

    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock
        for name, isa in (("integer", best()), ("fp32", "float")):
            rates[name] = max(sum(pool.map(rate, [isa] * threads)) for _ in range(5)) or math.nan
    source = torch.ones(64 << 20)  # 256 MB
    target = torch.empty_like(source)
    target.copy_(source)
    rates["memory"] = 2e-9 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(7))
    return rates


def free_memory() -> int | None:
    """Free memory in bytes; None if the system does not report it."""
    free = memory.field("/proc/meminfo", "MemAvailable")
    return None if free == math.inf else int(free)


def processor_time() -> tuple[float, float, float] | None:
    """(wall time, busy seconds of all processors, seconds of this process); None if the system does not report it."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def busy_elsewhere(before: tuple[float, float, float] | None) -> float:
    """Average number of processors that other processes kept busy since `before`; NaN if unknown."""
    if before is None:
        return math.nan
    wall, busy, mine = (now - then for now, then in zip(processor_time(), before, strict=True))
    return max(0.0, busy - mine) / wall


def instruction_set() -> str:
    """The instruction set that the integer kernel uses on this machine; empty without a compiled core."""
    return "" if integer.unavailable(torch.device("cpu")) else best()


def made_with() -> dict[str, str]:
    """Versions, commit and date, under their names in `speed.COLUMNS`.

    Versions also say whether the C library keeps freed memory, as in jobs of the workflow. Where it does not, every
    large tensor costs page faults, which slow some runtimes more than others.
    """
    record = provenance()
    versions = {"torch": torch.__version__}
    for package in ("openvino", "torchao"):
        if missing(package) is None:
            versions[package] = metadata.version(package)
    commit = record["commit"] and record["commit"] + ("-dirty" if record["dirty"] else "")
    versions["memory"] = "kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "given back"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {"versions": text, "commit": commit or "", "date": record["date"]}
