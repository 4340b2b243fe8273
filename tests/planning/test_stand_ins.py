"""Costs of another processor that stand in for those that were not measured here."""

import re

import pytest
from test_plan import CONFIGS, config, costs

from quest.__main__ import main
from quest.planning import costs as table
from quest.planning import plan


def test_another_processor_stands_in_for_what_was_not_measured_here_and_the_plan_says_so():
    here, other, third = (f"{name}, one thread" for name in ("here", "other", "third"))
    of_other = costs("scenes-class", other, call=0.004, start=20, quantized_call=1, decode=1, features=1)
    rows = costs("scenes-class", here, call=0.002) + costs("scenes-class", third, call=9, start=9) + of_other
    filled = table.with_stand_ins(rows, here)
    assert plan.known_of(filled, "scenes-class", here) == {
        "call": 0.002, "start": 20, "quantized call": 1, "decode": 1, "features": 1
    }  # fmt: skip
    assert table.with_stand_ins(rows, "a GPU") == rows
    told = plan.report(config("smoke"), filled, here)
    assert re.search(r"\| scenes-class \| sample, quantized \| 4 \| about \d", told)
    assert "1 costs, measured on 2026-11-22" in told
    assert "4 costs are those of another processor (other, one thread)." in told


@pytest.mark.parametrize("gpu", [False, True])
def test_a_forecast_uses_all_that_stands_in(gpu, tmp_path, monkeypatch, capsys):
    """Also on a machine whose GPU was not measured: then its processor's costs are scaled."""
    here, file = table.machine("cpu"), tmp_path / "costs.csv"
    everything = {what.replace(" ", "_"): 0.1 for what in table.WHAT}
    table.record(costs("scenes-class", "other, one thread", **everything) + costs("scenes-class", here, start=1), file)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another GPU")
    main(["plan", str(CONFIGS / "smoke.yaml"), "--machine", "NVIDIA RTX 4090", "--costs", str(file)])
    told = capsys.readouterr().out
    assert "| not measured" not in told and re.search(r"\| scenes-class \| quantize \| 2 \| about \d", told)
