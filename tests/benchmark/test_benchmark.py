"""What is measured and how it is told; the numbers themselves are those of a machine."""

import copy
import dataclasses
import math
import time
from functools import partial

import pytest
import torch

from quest import benchmark
from quest.benchmark import machine, shapes, single_layers, stopwatch, trained, whole_steps
from quest.diffusion import published
from quest.diffusion.models import MODELS
from quest.kernels.cpu import integer
from quest.kernels.cpu.core import core
from quest.planning.shapes import inputs
from quest.quantization import cost
from quest.report import speed

needs_core = pytest.mark.skipif(integer.unavailable(torch.device("cpu")) is not None, reason="no compiled core")


@pytest.mark.parametrize("name", ["scenes-uncond", "scenes-text"])
def test_layers_are_those_of_the_architecture(name):
    """Together they make up all of its multiply-accumulates."""
    model = MODELS[name]
    denoiser = published.denoiser(model)
    layers = shapes.layers(model)
    assert len({layer.name for layer in layers}) == len(layers)
    work = cost.macs(denoiser, inputs(denoiser, model, 1, "meta"))
    assert sum(layer.count * layer.macs(1) for layer in layers) == sum(work.values())
    assert sum(layer.count for layer in layers) == len(work)


def test_what_comes_first_is_there():
    assert set(shapes.FIRST) <= {layer.name for layer in shapes.layers(MODELS["sd14"])}


CONV = shapes.Layer("conv2d", "convolution", (16, 6, 6), 24, 3, 2, 1)
LINEAR = shapes.Layer("linear", "linear", (7, 48), 40)
PRODUCTS = shapes.Layer("attention", "self-attention", (9, 32), 32, heads=4, keys=9)


def test_work_of_a_layer():
    assert CONV.output == (24, 3, 3) and CONV.macs(2) == 2 * 9 * 24 * 16 * 9
    assert LINEAR.macs(1) == 7 * 48 * 40 and PRODUCTS.macs(1) == 2 * 9 * 9 * 32
    assert LINEAR.bytes(1, 4) == 4 * 7 * (48 + 40) + 48 * 40 / 2


@needs_core
@pytest.mark.parametrize("layer", [CONV, LINEAR, PRODUCTS], ids=lambda layer: layer.kind)
def test_contenders_compute_the_same_layer(layer):
    """Each to its own precision: the weight and the input are the same, so a mix-up of either would show."""
    names = single_layers.ATTENTION_KERNELS if layer.kind == "attention" else single_layers.LAYER_KERNELS
    made = single_layers.contenders(layer, 2, tuple(n for n in names if "torchao" not in n and "bf16" not in n))
    assert all(callable(call) for name, call in made.items() if "OpenVINO" not in name), made
    outputs = {name: torch.as_tensor(call()) for name, call in made.items() if callable(call) and "Open" not in name}
    for name, found in outputs.items():
        bits = min(single_layers.bits_of(name)) if "w" in name else 8
        exact = outputs["fp32"].reshape(found.shape)
        error = ((found - exact).norm() / exact.norm()).item()
        # oneDNN's sums saturate on processors without VNNI.
        assert error < (1e-5 if "fp32" in name else 0.3 if bits == 4 else 0.15 if "oneDNN" in name else 0.03), name
    torch.testing.assert_close(
        outputs["integer w8a8"].reshape(outputs["reference w8a8"].shape), outputs["reference w8a8"]
    )


@needs_core
def test_speed_and_error_of_a_model_that_ships_stand_in_one_row(class_pipe, class_model, monkeypatch, tmp_path):
    name, model = "scenes-class", dataclasses.replace(class_model, name="scenes-class", batch_size=2)
    whole_steps.forget()
    whole_steps.full_precision.cache_clear()
    monkeypatch.setitem(MODELS, name, model)
    monkeypatch.setattr(trained, "pipeline", lambda name: copy.deepcopy(class_pipe))
    few = partial(stopwatch.seconds_in_rounds, seconds=0, rounds=(3, 3))
    monkeypatch.setattr(benchmark, "seconds_in_rounds", lambda calls, _seconds, _rounds, clock: few(calls, clock=clock))
    monkeypatch.setattr(whole_steps, "SUITE_KERNELS", ("reference w8a8", "integer w8a8", "integer w4a4"))
    point = benchmark.Point("step", 1, name, batch=benchmark.sampled(name), kernel="suite")
    rows = {row["kernel"]: row for row in benchmark.measure(point, tmp_path)}
    assert list(rows) == ["fp32", "integer w8a8", "integer w4a4", "reference w8a8"]
    assert "error" not in rows["fp32"] and all(row["ms"] > 0 and row["rounds"] == 3 for row in rows.values())
    assert 0 < rows["integer w8a8"]["error"] < 0.02 < rows["integer w4a4"]["error"]
    assert rows["integer w8a8"]["error"] == pytest.approx(rows["reference w8a8"]["error"], rel=0.05)
    single = {row["kernel"]: row for row in benchmark.measure(point._replace(batch=1), tmp_path)}
    assert all("error" not in row for row in single.values())  # errors are of a sampling batch
    (row,) = benchmark.measure(point._replace(kernel="bf16"), tmp_path)
    assert "not measured" in row.get("note", "") or (row["error"] < 0.01 and row["ours"] > 0)
    whole_steps.forget()
    whole_steps.full_precision.cache_clear()


def test_one_thread_is_timed_by_processor_time():
    """Which waiting does not lengthen, nor do other processes."""
    assert stopwatch.seconds_of(lambda: time.sleep(0.05), clock=stopwatch.clock(1)) < 0.04
    assert stopwatch.seconds_of(lambda: time.sleep(0.05), clock=stopwatch.clock(2)) >= 0.05


def test_parts_of_a_run():
    kinds = {part: benchmark.points(("photos-class", "sd14"), (1, 2), (part,)) for part in benchmark.PARTS}
    assert all(points and {point.part for point in points} == {part} for part, points in kinds.items())
    assert sum(map(len, kinds.values())) == len(benchmark.points(("photos-class", "sd14"), (1, 2)))
    batches = {(point.model, point.batch) for point in kinds["step"]}
    assert batches == {("photos-class", 1), ("photos-class", 100), ("sd14", 1), ("sd14", 2)}


def test_rounds_are_interleaved():
    clock, order = [0.0], []

    def now():
        return clock[0]

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds * (1 + len(order) / 100)  # the machine gets slower

        return run

    found = stopwatch.seconds_in_rounds({"a": call("a", 4e-3), "b": call("b", 8e-3)}, 0.04, (2, 3), now)
    assert "".join(order) == "aabb" + "abbaab"  # twice to warm up, then three rounds
    rows = stopwatch.timed(found["b"], found["a"])
    assert rows["rounds"] == 3 and rows["ms"] == pytest.approx(8 * 1.07, rel=0.03)
    assert rows["speedup"] == pytest.approx(0.5, rel=0.02)
    assert rows["speedup_low"] < rows["speedup"] < rows["speedup_high"]
    order.clear()
    stopwatch.seconds_in_rounds({"a": call("a", 1.0), "b": call("b", 1e-3)}, 0.04, (2, 3), now)
    assert "".join(order) == "abb" + "abb" + "bba"  # one second needs no second try, one millisecond is taken twice


@needs_core
def test_shares_of_a_step_add_up_and_leave_no_timer_behind():
    before = core().quest_conv2d
    (layer,) = single_layers.contenders(CONV, 2, ("integer w8a8",)).values()
    found = stopwatch.shares(lambda: (layer(), time.sleep(0.01)))
    assert sum(found.values()) == pytest.approx(1) and 0 < found["layers"] < 0.5 and found["rest"] > 0.5
    assert found["attention"] == found["norms"] == 0
    assert core().quest_conv2d is before


@needs_core
def test_a_run_tells_what_its_budget_left_out(monkeypatch):
    monkeypatch.setattr(benchmark, "points", lambda models, threads, parts: [
        benchmark.Point("layer", 1, "scenes-text", LINEAR, 1), benchmark.Point("layer", 1, "scenes-text", CONV, 1)
    ])  # fmt: skip
    monkeypatch.setattr(benchmark, "LAYER_KERNELS", ("fp32", "integer w8a8"))
    first = [row for rows in benchmark.run(("scenes-text",), (1,), 0.0) for row in rows]
    assert len(first) == 4 and all(row["note"] == "not measured: the 0 minutes of this run were over" for row in first)
    known = {speed.key(row) for row in first[:2]}
    rows = [row for rows in benchmark.run(("scenes-text",), (1,), 1.0, known) for row in rows]
    assert [row["layer"] for row in rows] == [CONV.name] * 2 + [LINEAR.name] * 2  # what is known comes last
    for row in rows:
        assert row["ms"] > 0 and row["machine"] == speed.machine() and row["load"] >= 0 and row["others"] >= 0
        assert set(row) <= set(speed.COLUMNS)
    assert rows[0]["speedup"] == 1 and not math.isnan(rows[1]["speedup"])


def test_a_step_of_no_contender_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'integer w4a8' is no contender of a step; valid: suite, OpenVINO int8, "):
        benchmark.measure(benchmark.Point("step", 1, "scenes-class", batch=1, kernel="integer w4a8"), tmp_path)


def test_absent_rivals_are_named(monkeypatch):
    monkeypatch.setattr(machine.metadata, "version", lambda name: (_ for _ in ()).throw(
        machine.metadata.PackageNotFoundError(name)))  # fmt: skip
    single_layers.absent.cache_clear()
    assert single_layers.absent("OpenVINO int8") == 'openvino is not installed: pip install -e ".[kernels]"'
    single_layers.absent.cache_clear()
    error = NotImplementedError("no such operator\nand more")
    assert single_layers.failed(error) == "NotImplementedError: no such operator"


def test_a_rival_that_crashes_takes_nothing_with_it(monkeypatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def submit(self, function, point, folder):
            raise benchmark.BrokenProcessPool("a process in the process pool was terminated abruptly")

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *arguments: Broken())
    (row,) = benchmark.measure_apart(benchmark.Point("step", 1, "scenes-text", batch=1, kernel="OpenVINO int8"), None)
    assert row["note"] == "not measured: OpenVINO int8 crashed" and row["kernel"] == "OpenVINO int8"


def test_rows_say_whether_the_c_library_keeps_memory(monkeypatch):
    for setting, said in ((None, "given back"), ("1073741824", "kept")):
        if setting:
            monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", setting)
        else:
            monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
        assert machine.made_with()["versions"].endswith(f", memory {said}")
