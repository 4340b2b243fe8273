"""The memory of a job against its budget, before it starts, and what jobs ask of a cluster."""

from pathlib import Path

import pytest

from quest.__main__ import main
from quest.config import read
from quest.diffusion.models import MODELS
from quest.planning import budget, costs, plan
from quest.runtime import memory
from quest.runtime.files import read_rows

CONFIGS = Path(__file__).parents[2] / "workflow" / "config"
MODEL = MODELS["scenes-class"]


def measured(machine: str = "box", **memory_of) -> list[dict]:
    """Costs of scenes-class: every step takes a second and 1,000 MB beside 10 MB a row, unless memory_of says so."""
    found = dict.fromkeys(costs.SECONDS, 1.0) | {f"memory of {what}": 1000.0 for what in costs.HELD}
    found |= {f"memory of {what} row": 10.0 for what in costs.HELD}
    found |= {what.replace("_", " "): value for what, value in memory_of.items()}
    rest = {"model": MODEL.name, "machine": machine, "unit": "s", "batch": "1", "weights": "trained"}
    rest |= {"how": costs.MEASURED, "date": "2026-11-29"}
    return [rest | {"what": what, "value": value} for what, value in found.items()]


@pytest.fixture
def known(monkeypatch):
    def know(*arguments, **memory_of):
        monkeypatch.setattr(costs, "read", lambda: measured(*arguments, **memory_of))

    return know


def check(method, bits="w4a4", **recipe):
    return budget.check(MODEL, method, recipe, bits, 50)


def test_a_job_says_what_it_takes_and_what_there_is(known, monkeypatch):
    known()
    monkeypatch.setenv(memory.VARIABLE, "2GB")
    assert check("rtn-mse") == (
        "memory: rtn-mse at w4a4 takes 1.0 GB on scenes-class (ranges, 1 rows at once), the budget is 2.0 GB"
    )
    monkeypatch.setattr(costs, "read", lambda: [])
    assert check("rtn-mse") == "memory: 2.0 GB; what rtn-mse takes on scenes-class was not measured"


def test_a_job_that_does_not_fit_is_refused_with_what_would(known, monkeypatch):
    known("another box", **{"memory_of_rounding_row": 100.0})  # tensors are the same everywhere
    monkeypatch.setenv(memory.VARIABLE, "1500MB")
    with pytest.raises(ValueError, match=r"\(rounding, 16 rows at once\).*what fits: batch: 5, or memory: 3GB"):
        check("adaround", "w4a32")
    assert "takes 1.5 GB" in check("adaround", "w4a32", batch=5)
    monkeypatch.setenv(memory.VARIABLE, "900MB")
    with pytest.raises(ValueError, match="the budget is 0.9 GB; what fits: memory: 2GB"):
        check("rtn-mse")
    # One step measured here does not hide what another machine knows of the others.
    here = [row for row in measured(costs.machine("cpu")) if row["what"] == "memory of call"]
    both = measured("another box") + [row | {"value": 2000.0} for row in here]
    monkeypatch.setattr(costs, "read", lambda: both)
    monkeypatch.setenv(memory.VARIABLE, "3GB")
    assert "adaround at w4a32 takes 1.2 GB" in check("adaround", "w4a32")
    assert "rtn-mse at w4a4 takes 1.0 GB" in check("rtn-mse")


def test_what_fits_itself_to_the_memory_is_not_refused(known, monkeypatch):
    known(
        "box",
        memory_of_critical_alignment_row=300.0,
        memory_of_call_row=100.0,
        memory_of_ranges_row=100.0,
    )
    monkeypatch.setenv(memory.VARIABLE, "1400MB")
    assert "takes 1.3 GB" in check("quest-suite", init="rtn")  # 16 rows would take 5.8
    with pytest.raises(ValueError, match="critical alignment, 1 rows at once"):
        monkeypatch.setenv(memory.VARIABLE, "1200MB")
        check("quest-suite", init="rtn", samples=8)


def test_jobs_ask_for_what_the_plan_has_and_a_margin():
    smoke = read(CONFIGS / "smoke.yaml")
    found = {(row["rule"], row["method"], row["bits"]): row for row in budget.jobs(smoke, measured(), "box")}
    expected = {("trajectories", "", ""), ("evaluation", "", ""), ("redraw", "", ""), ("sample", "fp", "w32a32")}
    expected |= {(rule, m, "w4a4") for rule in ("quantize", "sample") for m in ("rtn", "quest-suite")}
    assert set(found) == expected
    sampled = plan.sample(MODEL, plan.known_of(measured(), MODEL.name, "box"), 60, exact=True)
    row = found["sample", "fp", "w32a32"]
    assert sampled.memory == 2000 and (row["least_mb"], row["mem_mb"]) == (2000, 2400)  # 100 samples in a call
    assert row["runtime"] == 64  # 60 images of 40 samples, a decoding and features, and a start: 2,521 s; half more
    assert budget.jobs(smoke, measured(), "another box") == []


def test_the_steps_of_a_job_are_counted_once(monkeypatch):
    asked, count = [], plan.quantizing
    monkeypatch.setattr(plan, "quantizing", lambda *job: asked.append(job[0]) or count(*job))
    found = budget.jobs(read(CONFIGS / "smoke.yaml"), measured(), "box")
    assert sorted(asked) == sorted(row["method"] for row in found if row["rule"] == "quantize") != []


def test_the_command_writes_them_where_the_workflow_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "read", lambda _path: measured())
    monkeypatch.chdir(tmp_path)
    main(["plan", str(CONFIGS / "smoke.yaml"), "--machine", "box", "--jobs"])
    assert "results/smoke/jobs.csv: memory and time of 8 kinds of jobs" in capsys.readouterr().out
    assert len(read_rows("results/smoke/jobs.csv", budget.JOBS)) == 8
