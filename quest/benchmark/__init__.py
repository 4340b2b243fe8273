"""How long layers and whole denoiser steps take on the integer kernel, and on what else computes them on this machine.

Every contender of a comparison runs once in every round, so that what else a machine does falls on all of them, and a
speedup is the median of the rounds' own ratios. What cannot be measured is said, too.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import torch

from quest.benchmark.machine import busy_elsewhere, free_memory, instruction_set, made_with, peaks, processor_time
from quest.benchmark.shapes import FIRST, ZOO, Layer, layers
from quest.benchmark.single_layers import ATTENTION_KERNELS, LAYER_KERNELS, absent, bits_of, contenders, failed
from quest.benchmark.stopwatch import seconds_in_rounds, shares, timed
from quest.benchmark.whole_steps import FLOAT_STEPS, forget, full_precision, loaded, own, own_denoisers, rival, spared
from quest.diffusion import published
from quest.diffusion.models import MODELS, Model
from quest.planning.measure import inputs
from quest.report import speed


class Point(NamedTuple):
    """What is measured at a time. kernel: "own" (the suite's) or one of FLOAT_STEPS for a step; else all there are."""

    part: str  # "peak", "layer" or "step"
    threads: int
    model: str = ""
    layer: Layer | None = None
    batch: int = 0
    kernel: str = ""

    def names(self) -> tuple[str, ...]:
        """Contenders, each a row."""
        if self.part == "peak":
            return ("integer", "fp32", "memory")
        if self.part == "step":
            return ("fp32", *own(MODELS[self.model])) if self.kernel == "own" else (self.kernel,)
        return ATTENTION_KERNELS if self.layer.kind == "attention" else LAYER_KERNELS


def points(models: tuple[str, ...], threads: tuple[int, ...]) -> list[Point]:
    """Everything there is to measure, what says most about a machine first.

    Layers that two models share are measured once, under the first.
    """
    zoo, paper = ([name for name in models if (name in ZOO) == shipped] for shipped in (True, False))
    first, second, seen = [], {1: [], 2: []}, set()
    for name in models:
        for layer in layers(MODELS[name]):
            if (key := layer._replace(count=0)) in seen:
                continue
            seen.add(key)
            for batch in (1, 64) if name in ZOO else (1, 2):
                early = name in ZOO or (name == "sd14" and batch == 1 and layer.name in FIRST)
                into = first if early else second[batch]
                into += [Point("layer", n, name, layer, batch) for n in threads]

    def steps(names, batches, kernels):
        return [
            Point("step", n, name, batch=batch, kernel=kernel)
            for name in names
            for kernel in kernels
            for batch in (batches or (1, sampling_batch(MODELS[name])))
            for n in threads
        ]

    allowed = [Point("peak", n) for n in threads]
    found = allowed + first + steps(zoo, None, ("own",)) + steps(paper, (1,), ("own",))
    found += second[1] + steps(zoo, None, ("OpenVINO int8", "OpenVINO fp32", "bf16", "bf16 compiled"))
    found += second[2] + steps(paper, (2,), ("own",)) + steps(zoo, None, ("fp32 compiled",))
    rivals = ("OpenVINO int8", "OpenVINO fp32", "fp32 compiled", "bf16", "bf16 compiled")
    return found + [point for name in paper for point in steps([name], (1, 2), rivals)]


def sampling_batch(model: Model) -> int:
    """Samples of one denoiser call: both halves of a guided one."""
    return model.batch_size * (2 if model.guidance > 1 else 1)


def measure(point: Point) -> list[dict]:
    """Rows of a point, of `speed.COLUMNS`, for all of its contenders."""
    torch.set_num_threads(point.threads)
    before = processor_time()
    with torch.no_grad():
        rows = {"peak": _measure_peak, "layer": _measure_layer, "step": _measure_step}[point.part](point)
    others = round(busy_elsewhere(before), 2)
    return [row | {"others": others} for row in rows]


def measure_apart(point: Point) -> list[dict]:
    """The same in a process of its own, which a converter or compiler may take down with it."""
    forget()
    full_precision.cache_clear()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, point).result()
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
    try:
        found = peaks(point.threads)
    except AttributeError:
        return unmeasured(point, "the compiled core is older than its source; `pip install -e .` builds it")
    for name, value in found.items():
        if not value <= (best := _best.get((point.threads, name), 0.0)):
            _best[point.threads, name] = value
        else:
            found[name] = best
    return [_row(point, name) | {"gops" if name != "memory" else "gbs": found[name]} for name in point.names()]


_best: dict[tuple[int, str], float] = {}  # by threads and peak: a busy machine needs several tries


def _measure_layer(point):
    made = contenders(point.layer, point.batch, point.names())
    seconds = seconds_in_rounds({name: call for name, call in made.items() if callable(call)}, 0.4, (3, 25))
    rows = []
    for name, call in made.items():
        if not callable(call):
            rows.append(_row(point, name) | {"note": f"not measured: {call}"})
            continue
        macs, bits = point.layer.macs(point.batch), bits_of(name)[0] if "w" in name else 8 if "int8" in name else 32
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        row |= {"gops": 2e-6 * macs / row["ms"], "intensity": 2 * macs / point.layer.bytes(point.batch, bits)}
        rows.append(row)
    return rows


def _measure_step(point):
    model = MODELS[point.model]
    denoiser = published.denoiser(model)  # on the meta device
    size = 4 * sum(p.numel() for p in denoiser.parameters())
    needed, there = (3.7 if point.kernel == "own" else 6) * size, free_memory()
    if point.kernel != "own" and (reason := absent(point.kernel)):
        return unmeasured(point, reason)
    if there is not None and needed > there and point.model not in loaded:
        return unmeasured(point, f"it takes {needed / 1e9:.0f} GB of memory, of which {there / 1e9:.0f} are free")
    given = inputs(denoiser, model, point.batch, "cpu")
    if point.kernel == "own":
        calls = {name: partial(one, **given) for name, one in own_denoisers(point.model).items()}
    else:
        try:
            calls = {point.kernel: rival(point.model, point.kernel, given)}
        except Exception as error:  # of another project's converter or compiler
            return unmeasured(point, failed(error))
    seconds = seconds_in_rounds({"fp32": partial(full_precision(point.model), **given)} | calls, 10.0, (3, 25))
    rows = []
    for name in point.names():
        if name not in seconds:
            rows.append(_row(point, name) | {"note": f"not measured: {spared(point.model, name)}"})
            continue
        row = _row(point, name) | timed(seconds[name], seconds["fp32"])
        if name.startswith("integer"):
            row |= {f"in_{kind}": share for kind, share in shares(calls[name]).items()}
        rows.append(row)
    return rows


def run(models: tuple[str, ...], threads: tuple[int, ...], budget: float, known: set[tuple] = frozenset()) -> Iterator:
    """Yield the rows of every point, one point after the other; after `budget` minutes, rows that say what is left out.

    known: keys of rows (`speed.key`) that are there already; their points come last.
    """
    where = {"isa": instruction_set(), "machine": speed.machine(), **made_with()}
    where |= {"load": round(os.getloadavg()[0], 2)}
    until = time.monotonic() + 60 * budget
    everything = points(models, threads)
    everything.sort(key=lambda p: p.part != "peak" and all(speed.key(_row(p, n)) in known for n in p.names()))
    for point in everything + [point for point in everything if point.part == "peak"]:
        if time.monotonic() > until and point.part != "peak":
            rows = unmeasured(point, f"the {budget:g} minutes of this run were over")
        else:
            rows = (measure_apart if point.kernel in FLOAT_STEPS and not absent(point.kernel) else measure)(point)
        yield [{"note": ""} | row | where for row in rows]
