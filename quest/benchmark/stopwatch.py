"""Seconds of calls, in rounds in which every contender runs once, and where they are spent."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable

from quest.kernels.cpu.core import core


def seconds_in_rounds(calls: dict[str, Callable], seconds: float, rounds: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds of every call in each of some rounds, {name: [rounds]}.

    Each runs once before (twice if it is short). Short ones are repeated until they take two milliseconds, of which the
    mean counts. There are as many rounds as fit into `seconds`, within `rounds`; each begins with another call.
    """
    repeats, estimate = {}, 0.0
    for name, call in calls.items():
        took = seconds_of(call)
        took = took if took > 0.5 else seconds_of(call)
        repeats[name] = math.ceil(2e-3 / took)
        estimate += took * repeats[name]
    number = min(max(int(seconds / estimate), rounds[0]), rounds[1])
    names, found = list(calls), {name: [] for name in calls}
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(seconds_of(calls[name], repeats[name]))
    return found


def seconds_of(call: Callable, repeats: int = 1) -> float:
    """Seconds of one call, the mean of some."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def shares(call: Callable) -> dict[str, float]:
    """Shares of a denoiser step on the integer kernel: in quantized layers and attention products on integers, in fused
    norms, and in all the rest, which is float (and Python)."""
    kinds = ("layers", "attention", "norms")  # in the order of `Kind` in csrc/driver.h
    spent = (ctypes.c_double * len(kinds))()
    core().quest_time(ctypes.addressof(spent))
    try:
        whole = seconds_of(call)
    finally:
        core().quest_time(None)
    found = {kind: seconds / whole for kind, seconds in zip(kinds, spent, strict=True)}
    return found | {"rest": 1 - sum(found.values())}


def timed(seconds: list[float], fp32: list[float]) -> dict[str, float]:
    """Median and quartiles of the milliseconds, and of how many times as fast as fp32 of the same round."""
    found = {"rounds": len(seconds)}
    for name, values in (
        ("ms", [1e3 * s for s in seconds]),
        ("speedup", [f / s for f, s in zip(fp32, seconds, strict=True)]),
    ):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return found
