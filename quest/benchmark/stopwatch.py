"""Time calls in rounds in which every contender runs once, and measure where a denoiser step spends its time."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable

from quest.kernels.cpu.core import core


def clock(threads: int) -> Callable[[], float]:
    """What times calls: of one thread the processor time, which other processes lengthen little; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def seconds_in_rounds(
    calls: dict[str, Callable], seconds: float, rounds: tuple[int, int], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call in each round by a clock, {name: [rounds]}.

    Each call first runs once (twice if it is short). A short call is repeated until it takes two milliseconds, and its
    mean counts. As many rounds run as fit into `seconds`, within (least, most) = `rounds`; each starts at another call.
    """
    repeats, estimate = {}, 0.0
    for name, call in calls.items():
        duration = seconds_of(call, clock=clock)
        duration = duration if duration > 0.5 else seconds_of(call, clock=clock)
        repeats[name] = math.ceil(2e-3 / duration)
        estimate += duration * repeats[name]
    number = min(max(int(seconds / estimate), rounds[0]), rounds[1])
    names, result = list(calls), {name: [] for name in calls}
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            result[name].append(seconds_of(calls[name], repeats[name], clock))
    return result


def seconds_of(call: Callable, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean seconds of a call over `repeats` runs."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def shares(call: Callable) -> dict[str, float]:
    """Shares of the time of a denoiser step on the integer kernel: "layers" and "attention" (products of integers),
    "norms" (fused norms) and "rest" (float operations and Python)."""
    kinds = ("layers", "attention", "norms")  # in the order of `Kind` in csrc/driver.h
    spent = (ctypes.c_double * len(kinds))()
    core().quest_time(ctypes.addressof(spent))
    try:
        whole = seconds_of(call)
    finally:
        core().quest_time(None)
    result = {kind: seconds / whole for kind, seconds in zip(kinds, spent, strict=True)}
    return result | {"rest": 1 - sum(result.values())}


def timed(seconds: list[float], fp32: list[float]) -> dict[str, float]:
    """Median and quartiles of the milliseconds, and of the speedup over fp32 in the same round."""
    row = {"rounds": len(seconds)}
    for name, values in (
        ("ms", [1e3 * s for s in seconds]),
        ("speedup", [f / s for f, s in zip(fp32, seconds, strict=True)]),
    ):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return row
