"""How much memory a job may hold, and arrays of calibration rows that lie in a file where memory is short."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quest.runtime.files import scratch

if TYPE_CHECKING:
    from torch import Tensor

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
ALIGNED = 64  # bytes, as torch aligns its own tensors: vectorized sums could depend on it
SHARE = 0.5  # of the budget, for tensors that wait; the rest is for what computes

VARIABLE = "QUEST_MEMORY"  # in the environment: the budget of every job, which a config sets by its key `memory`


def parse(value: int | str) -> int:
    """Bytes of a number, or of a text such as "20GB" (1e9 bytes). Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(value).strip(), re.IGNORECASE)
    if isinstance(value, bool) or not found or not (size := float(found[1]) * UNITS[(found[2] or "").upper()]) >= 1:
        raise ValueError(f'memory: {value!r} is no amount of memory; valid: bytes, or a text such as "20GB"')
    return int(size)


def budget(device: str = "cpu") -> int:
    """Bytes that a job may hold on this device: the limit in the environment, else what is free, of its parts of a GPU.

    Raises ValueError for a limit that is no amount of memory.
    """
    if limit := os.environ.get(VARIABLE):
        return parse(limit)
    if device == "cpu":
        return free()
    import torch

    from quest.runtime import gpu_lock

    unused, whole = torch.cuda.mem_get_info()
    taken, parts = gpu_lock.parts()
    # What torch's allocator keeps for new tensors is free, too.
    return min(unused + torch.cuda.memory_reserved(), whole * taken // parts) - torch.cuda.memory_allocated()


def left(device: str = "cpu") -> int:
    """Bytes that a job may take beside what it holds: what is left of its budget, and on a processor what is free."""
    if not os.environ.get(VARIABLE):
        return budget(device)  # of what is free
    if device == "cpu":
        return min(budget() - int(field("/proc/self/status", "VmRSS")), free())
    import torch

    return budget(device) - torch.cuda.memory_allocated()


@contextmanager
def limited(size: int) -> Iterator[None]:
    """While inside, the budget is so many bytes, at least one."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(max(1, size))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def waiting(device: str = "cpu") -> Waiting:
    """Room for tensors that wait for this device: half of the budget, or half of what the host has beside a GPU."""
    return Waiting(int(SHARE * (budget() if device == "cpu" else free())))


def free() -> int:
    """Bytes of host memory that this process may still take: of the machine, of its control group and of `ulimit`."""
    import resource

    found = [field("/proc/meminfo", "MemAvailable")]
    for folder, most, now in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        found.append(_number(f"{folder}/{most}") - _number(f"{folder}/{now}", 0))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit - field("/proc/self/status", "VmSize"))
    return max(0, int(min(found + [2**50])))


def trim() -> None:
    """Give memory that is free, but still with the C library's allocator, back to the system (glibc only)."""
    import ctypes

    if release := getattr(ctypes.CDLL(None), "malloc_trim", None):
        release(0)


def limit(size: int) -> None:
    """Let this process address no more than so many bytes, as `ulimit -v` does."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def field(file: str, name: str) -> float:
    """A field of a file of Linux such as /proc/self/status, in bytes; infinite where there is none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return math.inf


def _number(file: str, otherwise: float = math.inf) -> float:
    try:
        return int(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such control group, or "max"
        return otherwise


class Waiting:
    """Allocates tensors that wait on the CPU: in memory up to `budget` bytes in all, others in temporary files.

    `held` and `most`: bytes that wait now and that waited at most, in either place. Files are those of
    `files.scratch`.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.chunk = 1  # rows that are computed at once, see `quest.learning.units.walk`
        self.held = self.most = self.in_memory = 0

    def rows(self, part: Tensor, n: int) -> Tensor:
        """A tensor of n rows, unset, that has the type and the memory layout of `part`, which has fewer."""
        import torch

        # What a copy of it would have: of a slice, dense strides.
        row, stride = part.numel() // len(part), torch.empty_like(part, device="meta").stride()
        if len(part) > 1 and stride[0] != row:
            stride = torch.empty(part.shape, dtype=part.dtype, device="meta").stride()
        values = self._bytes(n * row * part.dtype.itemsize).view(part.dtype)
        return values.as_strided((n, *part.shape[1:]), (row, *stride[1:]))

    def _bytes(self, size: int) -> Tensor:
        import numpy
        import torch

        resident = self.in_memory + size <= self.budget
        if resident:
            array = numpy.empty(size + ALIGNED, numpy.uint8)
        else:
            with scratch(size) as file:
                array = numpy.memmap(file, numpy.uint8, "r+", shape=(size,))
        self.held += size
        self.in_memory += size * resident
        self.most = max(self.most, self.held)
        weakref.finalize(array, self._release, size, resident)
        start = -array.ctypes.data % ALIGNED if resident else 0
        return torch.from_numpy(array[start : start + size])

    def _release(self, size: int, resident: bool) -> None:
        self.held -= size
        self.in_memory -= size * resident
