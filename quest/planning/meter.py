"""Runs a step of a run, and keeps its seconds and its memory as rows of the table of `costs`."""

import contextlib
import gc
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from baselines.method import Step
from quest.planning.costs import MEASURED, SECONDS, machine
from quest.runtime import memory

PAUSE = 0.01  # seconds between two looks at the memory of a copy of the process


def in_copy(work: Callable[[], object], log: Path) -> dict[str, float]:
    """Do some work in a copy of this process (Linux): {"seconds": of the processor, "memory_mb"}.

    What this process has imported costs the copy nothing. Memory is the most anonymous memory beyond that of the start:
    pages of files do not count, because the system can drop them. What the work prints goes to the log.
    Raises ChildProcessError that names the log where the work fails.
    """
    gc.collect()
    memory.trim()
    held = most = memory.field("/proc/self/status", "RssAnon")
    if not (copy := os.fork()):
        _work_and_end(work, log)
    ended = 0
    while not ended:
        now = memory.field(f"/proc/{copy}/status", "RssAnon")
        most = max(most, now if now < math.inf else 0)  # a process that has ended has no memory
        ended, status, used = os.wait4(copy, os.WNOHANG)
        if not ended:
            time.sleep(PAUSE)
    if status:
        raise ChildProcessError(f"a job that is measured failed; its log is {log}")
    return {"seconds": used.ru_utime + used.ru_stime, "memory_mb": (most - held) / 1e6}


def _work_and_end(work: Callable[[], object], log: Path) -> None:
    """In the copy: nothing that this process does at its end may happen there."""
    status = 1
    try:
        with log.open("w", encoding="utf-8") as file:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                try:
                    work()
                    status = 0
                except BaseException:
                    traceback.print_exc()
    finally:
        os._exit(status)


class Meter:
    """Runs steps and keeps their costs as rows of the table, one call of `done` for each step.

    wanted: which steps to measure, names of `costs.SECONDS`; None: all.
    """

    def __init__(self, model: str, device: str, weights: str, repeats: int, wanted: set[str] | None, done: Callable):
        self.model, self.device, self.weights, self.repeats, self.done = model, device, weights, repeats, done
        self.wanted = set(SECONDS) if wanted is None else {what.removesuffix(" row") for what in wanted}
        self.machine, self.rows = machine(device), []
        self.most = 0.0

    def add(self, rows: int, how: str = MEASURED, **costs: float) -> None:
        """Keep costs, {what: seconds or MB}, that were measured on so many rows."""
        now = datetime.now(UTC).date().isoformat()
        found = [
            {"model": self.model, "machine": self.machine, "what": what, "value": f"{value:.4g}"}
            | {"unit": "MB" if what.startswith("memory") else "s", "batch": rows, "weights": self.weights}
            | {"how": how, "date": now}
            for what, value in costs.items()
        ]
        self.rows += found
        self.done(found)

    def per_row(self, what: str, step: Callable[[int], object], few: int, many: int, less: float = 0) -> None:
        """Measure a step whose time is that of its rows. less: bytes that are in memory but that it does not need."""
        if what not in self.wanted:
            return
        held, most = [], []
        for rows in dict.fromkeys((few, many)):  # the first run warms up
            with self.peak(what, rows) as peak:
                seconds = self.seconds(partial(step, rows))
            held.append(peak["held"]), most.append(peak["most"])
        if few == many:
            fixed, row = held[0], (most[0] - held[0]) / many
        else:
            fixed, row = _line(few, many, *most)
        seconds = min([seconds, *(self.seconds(partial(step, many)) for _ in range(self.repeats - 1))])
        found = {what: seconds / many, f"memory of {what}": max(0, fixed - less / 1e6), f"memory of {what} row": row}
        self.add(many, **found)

    def once(self, what: str, step: Callable[[], object], rows: int, scale: float = 1, how: str = MEASURED) -> None:
        """Measure a step that a job takes once, on so many rows; its time is multiplied by `scale`."""
        if what in self.wanted:
            with self.peak(what, rows) as peak:
                seconds = self.seconds(step)
            self.add(rows, how, **{what: seconds * scale, f"memory of {what}": peak["most"]})

    def line(self, what: str, step: Callable[[int], object], few: int, many: int) -> None:
        """Measure a step that has a fixed cost and one per row."""
        if what not in self.wanted:
            return
        found = []
        for rows, with_memory in self._alike(few, many):
            with with_memory, self.peak(what, rows) as peak:
                seconds = min(self.seconds(partial(step, rows)) for _ in range(self.repeats))
            found.append((seconds, peak["most"]))
        self._line(what, few, many, *found)

    def iterations(
        self, what: str, step: Step, few: int, many: int, scales: tuple[float, float] = (1, 1), how: str = MEASURED
    ) -> None:
        """Measure one iteration of a training step. scales: of its fixed part and of its part per row.

        Memory is that of the second iteration, when the optimizer holds its state beside the graph. Where many rows
        do not fit, few stand for them: seconds are then in proportion to the rows, and so is memory beyond what was
        held before.
        """
        if what not in self.wanted:
            return
        found = []
        for rows, with_memory in self._alike(*((few, many) if step.rows is None else (step.rows,))):
            try:
                with with_memory, self.peak(what, rows) as peak:
                    seconds = self.iteration(step.learn, rows)
            except MemoryError:
                if not found:
                    raise
                break
            found.append((seconds, peak["most"]))
            held = peak["held"]
        if step.rows is not None:
            self.add(step.rows, how, **{what: found[0][0] * scales[0], f"memory of {what}": found[0][1]})
        elif len(found) == 1:
            seconds, most = found[0]
            costs = {what: 0.0, f"{what} row": seconds / few * scales[1]}
            costs |= {f"memory of {what}": held, f"memory of {what} row": (most - held) / few}
            self.add(few, f"{how}; {many} rows do not fit, so in proportion to {few}", **costs)
        else:
            self._line(what, few, many, *found, scales, how)

    def _alike(self, *counts: int) -> Iterator[tuple[int, AbstractContextManager]]:
        """Each number of rows, and a context in which a job may hold memory in proportion to it.

        What fits itself to the memory, such as `quest.learning.recomputing`, then decides alike for few and many rows.
        Where it did not, many rows could take less memory than few, and a row would seem to take none.
        """
        most = memory.budget(self.device)
        for rows in counts:
            yield rows, memory.limited(most * rows // counts[-1])

    def _line(self, what, few, many, of_few, of_many, scales=(1, 1), how=MEASURED) -> None:
        (fixed, row), (held, held_row) = (_line(few, many, *pair) for pair in zip(of_few, of_many, strict=True))
        seconds = {what: fixed * scales[0], f"{what} row": row * scales[1]}
        self.add(many, how, **seconds, **{f"memory of {what}": held, f"memory of {what} row": held_row})

    def iteration(self, learn: Callable[[int, int], object], rows: int) -> float:
        """Seconds of one iteration: the median time between two updates of the optimizer, the first one to warm up.

        Where several units learn one after the other, the sum over them.
        """
        from torch.optim.optimizer import register_optimizer_step_post_hook

        updates: list[tuple[object, float]] = []
        with register_optimizer_step_post_hook(lambda optimizer, *_: updates.append((optimizer, self.now()))):
            learn(1 + self.repeats, rows)
        between: dict[int, list[float]] = {}
        for (last, start), (optimizer, end) in zip(updates, updates[1:], strict=False):
            if optimizer is last:
                between.setdefault(id(optimizer), []).append(end - start)
        return sum(map(statistics.median, between.values()))

    def seconds(self, step: Callable[[], object]) -> float:
        start = self.now()
        step()
        return self.now() - start

    def now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def peak(self, what: str, rows: int) -> Iterator[dict[str, float]]:
        """MB that the process held before (held) and at most inside (most): of the GPU, else resident (on Linux).

        Raises MemoryError that names the step, where there is not enough.
        """
        import torch

        gc.collect()
        memory.trim()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            found = {"held": torch.cuda.memory_allocated() / 1e6}
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what is held now
            found = {"held": memory.field("/proc/self/status", "VmRSS") / 1e6}
        try:
            yield found
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            held = found["held"] / 1e3
            raise MemoryError(f"{what} of {rows} rows does not fit beside the {held:.1f} GB held already") from error
        if self.device == "cuda":
            found["most"] = torch.cuda.max_memory_allocated() / 1e6
        else:
            found["most"] = memory.field("/proc/self/status", "VmHWM") / 1e6
        self.most = max(self.most, found["most"])


def _line(few: int, many: int, of_few: float, of_many: float) -> tuple[float, float]:
    """The fixed part and the part per row of what few and many rows cost; noise makes neither negative."""
    row = max(0.0, of_many - of_few) / (many - few)
    return max(0.0, of_many - many * row), row
