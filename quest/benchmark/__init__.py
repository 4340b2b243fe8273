"""Time layers and whole denoiser steps on the integer kernel and on its rivals on this machine.

Every contender of a comparison runs once in every round, so that other load on the machine affects all of them, and a
speedup is the median of the ratios within the rounds. A row also says what could not be measured, and why.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from quest.benchmark import trained, whole_steps
from quest.benchmark.machine import busy_elsewhere, free_memory, instruction_set, made_with, peaks, processor_time
from quest.benchmark.shapes import FIRST, Layer, layers
from quest.benchmark.single_layers import ATTENTION_KERNELS, LAYER_KERNELS, absent, bits_of, contenders, failed
from quest.benchmark.stopwatch import clock, seconds_in_rounds, shares, timed
from quest.benchmark.whole_steps import RIVALS
from quest.diffusion import published
from quest.diffusion.models import MODELS
from quest.report import speed

PARTS = ("peak", "layer", "step")
OURS = "integer w8a8"  # is timed beside every rival


class Point(NamedTuple):
    """One measurement. kernel: only of a step, "suite" (all kernels of the suite) or one of RIVALS."""

    part: str  # "peak", "layer" or "step"
    threads: int
    model: str = ""
    layer: Layer | None = None
    batch: int = 0
    kernel: str = ""

    def names(self) -> tuple[str, ...]:
        """The contenders, each of which gives a row."""
        if self.part == "peak":
            return ("integer", "fp32", "memory")
        if self.kernel == "suite":
            return ("fp32", *whole_steps.suite_kernels(MODELS[self.model]))
        if self.part == "step":
            return (self.kernel,)
        return ATTENTION_KERNELS if self.layer.kind == "attention" else LAYER_KERNELS


def sampled(model: str) -> int:
    """Rows of a model's denoiser call while it samples; guidance doubles a batch."""
    return MODELS[model].batch_size * MODELS[model].halves


def points(models: tuple[str, ...], threads: tuple[int, ...], parts: tuple[str, ...] = PARTS) -> list[Point]:
    """All measurements of these parts, those that say most about a machine first.

    A layer that two models share is measured once, for the first model.
    """
    zoo, paper = ([name for name in models if MODELS[name].ships == shipped] for shipped in (True, False))
    first, second, seen = [], {1: [], 2: []}, set()
    for name in models:
        for layer in layers(MODELS[name]):
            if (key := layer._replace(count=0)) in seen:
                continue
            seen.add(key)
            for batch in (1, 64) if MODELS[name].ships else (1, 2):
                early = MODELS[name].ships or (name == "sd14" and batch == 1 and layer.name in FIRST)
                into = first if early else second[batch]
                into += [Point("layer", n, name, layer, batch) for n in threads]

    def steps(names, batches, kernels):
        return [
            Point("step", n, name, batch=batch, kernel=kernel)
            for name in names
            for kernel in kernels
            # By default a batch of the sampler, and for the suite also 1.
            for batch in (batches or (sampled(name),) + (1,) * (kernel == "suite"))
            for n in threads
        ]

    peak = [Point("peak", n) for n in threads]
    result = peak + first + steps(zoo, None, ("suite",)) + steps(paper, (1,), ("suite",))
    result += second[1] + steps(zoo, None, RIVALS) + second[2] + steps(paper, (2,), ("suite",))
    result += [point for batch in (1, 2) for name in paper for point in steps([name], (batch,), RIVALS)]
    return [point for point in result if point.part in parts]


def measure(point: Point, folder: Path) -> list[dict]:
    """Measure all contenders of a point. Returns their rows, with the columns of `speed.COLUMNS`.

    folder: what is made of a model for several points lies there.
    Raises ValueError for a step whose kernel is neither "suite" nor one of RIVALS.
    """
    if point.part == "step" and point.kernel not in ("suite", *RIVALS):
        raise ValueError(f"{point.kernel!r} is no contender of a step; valid: suite, {', '.join(RIVALS)}")
    torch.set_num_threads(point.threads)
    before = processor_time()
    with torch.no_grad():
        if point.part == "step":
            rows = _measure_step(point, folder)
        else:
            rows = (_measure_peak if point.part == "peak" else _measure_layer)(point)
    others = round(busy_elsewhere(before), 2)
    return [row | {"others": others} for row in rows]


def measure_apart(point: Point, folder: Path) -> list[dict]:
    """`measure` in a separate process, because another project's converter or compiler may crash the process."""
    whole_steps.forget()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, point, folder).result()
        except BrokenProcessPool:
            return unmeasured(point, f"{point.kernel} crashed")


def unmeasured(point: Point, why: str) -> list[dict]:
    """Rows that say why a point's contenders are not measured."""
    return [_row(point, name) | {"note": f"not measured: {why}"} for name in point.names()]


def _row(point, kernel):
    row = {"part": point.part, "model": point.model, "batch": point.batch, "threads": point.threads, "kernel": kernel}
    if point.layer is None:
        return row
    return row | {"layer": point.layer.name, "count": point.layer.count}


def _measure_peak(point):
    rates = peaks(point.threads)
    for name, value in rates.items():
        if not value <= (best := _best.get((point.threads, name), 0.0)):
            _best[point.threads, name] = value
        else:
            rates[name] = best
    return [_row(point, name) | {"gops" if name != "memory" else "gbs": rates[name]} for name in point.names()]


_best: dict[tuple[int, str], float] = {}  # (threads, peak) -> best rate; a busy machine needs several tries


def _measure_layer(point):
    calls = contenders(point.layer, point.batch, point.names())
    calls_of = {name: call for name, call in calls.items() if callable(call)}
    seconds = seconds_in_rounds(calls_of, 0.4, (3, 25), clock(point.threads))
    rows = []
    for name, call in calls.items():
        if not callable(call):
            rows.append(_row(point, name) | {"note": f"not measured: {call}"})
            continue
        macs, bits = point.layer.macs(point.batch), bits_of(name)[0] if "w" in name else 8 if "int8" in name else 32
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        row |= {"gops": 2e-6 * macs / row["ms"], "intensity": 2 * macs / point.layer.bytes(point.batch, bits)}
        rows.append(row)
    return rows


def _measure_step(point, folder):
    size = 4 * sum(p.numel() for p in published.denoiser(MODELS[point.model]).parameters())  # on the meta device
    needed, free = 4 * size, free_memory()
    if point.kernel != "suite" and (reason := absent(point.kernel)):
        return unmeasured(point, reason)
    if free is not None and needed > free and point.model not in whole_steps.cached:
        return unmeasured(point, f"it takes {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} are free")
    if point.kernel == "suite":
        calls = whole_steps.quantized_denoisers(point.model, folder)
    else:
        try:
            calls = {point.kernel: whole_steps.rival(point.model, point.kernel, point.batch, folder)}
            if not absent(OURS):  # beside each rival, since other processes and rounds have other conditions
                calls[OURS] = whole_steps.quantized(point.model, OURS, folder)
        except Exception as error:  # another project's converter or compiler may raise anything
            return unmeasured(point, failed(error))
    arguments = whole_steps.arguments(point.model, point.batch, folder)
    calls = {"fp32": whole_steps.full_precision(point.model)} | calls
    timed_calls = {name: partial(call, **arguments) for name, call in calls.items()}
    seconds = seconds_in_rounds(timed_calls, 10.0, (3, 25), clock(point.threads))
    rows = []
    for name in point.names():
        if name not in seconds:
            rows.append(_row(point, name) | {"note": f"not measured: {whole_steps.reason_to_skip(point.model, name)}"})
            continue
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        if OURS in seconds and point.kernel != "suite":
            row["ours"] = statistics.median(map(truediv, seconds[name], seconds[OURS]))
        if name.startswith("integer"):
            row |= {f"in_{kind}": share for kind, share in shares(timed_calls[name]).items()}
        if MODELS[point.model].ships and point.batch == sampled(point.model) and name != "fp32":
            row["error"] = trained.error(point.model, calls[name], folder)
        rows.append(row)
    return rows


def run(
    models: tuple[str, ...],
    threads: tuple[int, ...],
    budget: float,
    known: set[tuple] = frozenset(),
    parts: tuple[str, ...] = PARTS,
) -> Iterator:
    """Measure every point of these parts and yield its rows; after `budget` minutes, rows that say what was left out.

    known: keys (`speed.key`) of rows that an earlier run measured; their points come last.
    """
    where = {"isa": instruction_set(), "machine": speed.machine(), **made_with()}
    where |= {"load": round(os.getloadavg()[0], 2)}
    until = time.monotonic() + 60 * budget
    everything = points(models, threads, parts)
    everything.sort(key=lambda p: p.part != "peak" and all(speed.key(_row(p, n)) in known for n in p.names()))
    with TemporaryDirectory() as folder:
        for point in everything + [point for point in everything if point.part == "peak"]:
            if time.monotonic() > until and point.part != "peak":
                rows = unmeasured(point, f"the {budget:g} minutes of this run were over")
            else:
                apart = point.kernel in RIVALS and not absent(point.kernel)
                rows = (measure_apart if apart else measure)(point, Path(folder))
            yield [{"note": ""} | row | where for row in rows]
