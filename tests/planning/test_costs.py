"""Costs measured on tiny pipelines, and the meter that measures them."""

import pytest
import torch

from baselines.method import Step
from quest.diffusion.models import MODELS
from quest.metrics import features
from quest.planning import costs as table
from quest.planning import measure
from quest.planning.meter import Meter, _line


def test_measured_costs_of_a_tiny_pipeline(uncond_model, monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "scenes", lambda: lambda images: {"pool": images.float().mean((2, 3))})

    def once(_meter, learn, batch):
        learn(1, batch)
        return 0.1 + 0.01 * batch

    monkeypatch.setattr(Meter, "iteration", once)  # every step runs, once
    rows = measure.measure(uncond_model, "cpu", batch=2, repeats=1)
    found = {row["what"]: float(row["value"]) for row in rows}
    assert set(found) == set(table.WHAT)
    stages = ("temporal alignment", "critical alignment")
    learned = {
        f"{what}{row}"
        for what in ("rounding", "step learning", "distillation", "full finetuning", *stages)
        for row in ("", " row")
    }
    assert {what: found.pop(what) for what in learned} == {w: 0.01 if w.endswith("row") else 0.1 for w in learned}
    for what in [what for what in found if what.endswith(" row") or what in ("threshold search", "ranges")]:
        assert found.pop(what) >= 0  # a difference of two times, or of two peaks, can be lost in their noise
    assert [what for what, value in found.items() if not value > 0] == [] and found["memory"] > 50
    assert {row["machine"] for row in rows} == {table.machine("cpu")} and rows[0]["weights"] == "trained"


def test_an_iteration_is_the_time_between_two_updates_of_an_optimizer(monkeypatch):
    """Of units that learn one after the other, the sum; a disturbance of one iteration does not count."""
    clock, meter = [0.0], Meter("a", "cpu", "random", 3, None, lambda rows: None)
    monkeypatch.setattr(meter, "now", lambda: clock[0])

    def learn(iterations, batch):
        for unit in (1.0, 10.0):
            clock[0] += 1000  # what comes before the first iteration
            adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
            for i in range(iterations):
                clock[0] += unit * batch + (500 if i == 2 else 0)
                adam.step()

    assert meter.iteration(learn, 4) == 44
    assert _line(4, 16, 3 + 0.5 * 4, 3 + 0.5 * 16) == (3, 0.5)
    assert _line(1, 2, 2.0, 1.0) == (1.0, 0.0)  # noise makes nothing negative


def test_a_step_that_does_not_fit_is_named():
    meter = Meter("a", "cpu", "random", 1, None, lambda rows: None)
    with pytest.raises(MemoryError, match=r"decode of 2 rows does not fit beside the \d+\.\d GB held already"):
        meter.per_row("decode", lambda rows: torch.empty(2**50), 2, 2)
    with pytest.raises(RuntimeError, match="must match the size"):
        meter.per_row("decode", lambda rows: torch.ones(2) + torch.ones(3), 2, 2)


def test_few_rows_stand_for_many_that_do_not_fit():
    meter = Meter("a", "cpu", "random", 1, None, lambda rows: None)

    def learn(iterations, rows):
        adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        kept = torch.ones(10**7 if rows <= most else 2**50)  # 40 MB
        for _ in range(iterations):
            adam.step()
        return kept

    most = 1
    meter.iterations("distillation", Step(learn, ()), 1, 2)
    (fixed, row, memory_fixed, memory_row) = meter.rows
    whole = "distillation", "memory of distillation"
    assert [one["what"] for one in meter.rows] == [f"{one}{row}" for one in whole for row in ("", " row")]
    assert fixed["value"] == "0" and float(row["value"]) >= 0 and float(memory_fixed["value"]) > 50
    assert 20 < float(memory_row["value"]) < 80
    assert {one["how"] for one in meter.rows} == {"measured; 2 rows do not fit, so in proportion to 1"}
    assert {one["batch"] for one in meter.rows} == {1}
    most = 0
    with pytest.raises(MemoryError, match="distillation of 1 rows does not fit"):
        meter.iterations("distillation", Step(learn, ()), 1, 2)


OF_CAPTIONS = ["call", "quantized call", "features", "weight ranges", "rounding", "step learning"]
OF_CAPTIONS += ["distillation", "critical alignment"]


@pytest.mark.parametrize("name, wanted", [("tiny-imagenet", table.HELD), ("tiny-sd", OF_CAPTIONS)])
def test_without_weights_everything_wanted_is_measured_on_random_ones(name, wanted, monkeypatch):
    monkeypatch.setattr(Meter, "iteration", lambda _meter, learn, batch: learn(1, batch) or 0.1)
    seen = []
    rows = measure.measure(MODELS[name], "cpu", random=True, wanted=set(wanted), done=seen.extend)
    steps = {what: what.removeprefix("memory of ").removesuffix(" row") for what in table.WHAT}
    expected = {what for what, step in steps.items() if step in {*wanted, "start", "copy", "memory"}}
    assert {row["what"] for row in rows} == expected and rows[0]["weights"] == "random" and seen == rows
    held = [float(row["value"]) for row in rows if row["what"] in {f"memory of {what}" for what in table.HELD}]
    assert min(held) > 50
    how = {row["what"]: row["how"] for row in rows}
    assert how["rounding"] == how["step learning row"] == table.SCALED and how["weight ranges"] == table.SAMPLED
    assert how["call"] == how["distillation"] == table.MEASURED
