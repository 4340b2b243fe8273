"""Where rows stand by themselves, the table at equal granularity, and what both take from several processors."""

import math

import numpy as np
import pytest
from test_settle import FULL, GOOD, N, evidence, record, row_of, seeds_of

from quest.report.settle import SEEDS, levels


def test_rows_and_columns_at_equal_granularity(tmp_path):
    names = ["mse-tensor", "mse-step", "mse-token", "smooth-tensor", "smooth-token", "quest-suite"]
    rows = [one for name in names for one in seeds_of(name, GOOD)]
    (table,) = levels.by_granularity(levels.frame(evidence(*rows)), "psnr")
    assert [column.label for column in table.columns] == [
        "before rounding", "tensor, static", "tensor and step, static", "token"
    ]  # fmt: skip
    lines = [line.strip("| ").split(" | ") for line in table.markdown().splitlines() if line.startswith("| ")]
    of = {line[0]: line[1:] for line in lines[2:]}
    assert len(of) == len(levels.BEFORE_ROUNDING)
    assert all("21.9" in cell for cell in of["nothing but ranges of least error"])
    assert of["smoothing"][1] == "–" and "21.9" in of["smoothing"][2]
    assert of["AdaRound and QuEST's finetuning"][0] == "–" and "21.9" in of["AdaRound and QuEST's finetuning"][1]
    levels.granularity_figure(levels.frame(evidence(*rows)), "psnr", tmp_path / "granularity.png")
    assert (tmp_path / "granularity.png").stat().st_size > 10_000
    # Two granularities are no table.
    few = [one for name in names[:1] + names[2:5] for one in seeds_of(name, GOOD)]
    assert levels.by_granularity(levels.frame(evidence(*few)), "psnr") == []


def test_an_endpoint_is_of_the_cells_that_have_it_and_integers_of_the_last_record():
    old = seeds_of("good", GOOD, date="2026-11-29", footprint={"effective_bits": 4.5, "realizable": 0.3})
    for one in old:
        del one["values"]["agreement"]
    new = [
        record(
            "good", 9.0, seed, isa="amx-avx512", date="2026-11-30", footprint={"effective_bits": 4.5, "realizable": 1.0}
        )
        for seed in SEEDS[:3]
    ]
    found = levels.frame(evidence(*old, *new))
    psnr, agreement = (row_of(found, method="good", endpoint=name) for name in ("psnr", "agreement"))
    assert (psnr.seeds, agreement.seeds) == (5, 3)
    assert psnr.value < 23 and agreement.value == pytest.approx(0.8)
    assert psnr.realizable == agreement.realizable == 1.0
    (table,) = levels.tables(found)
    assert table.rows[0][2] == "3-5"


def test_rows_stand_with_their_interval_and_stored_bits(tmp_path):
    told = {"footprint": {"effective_bits": 4.5, "realizable": 0.5}}
    rows = [
        FULL,
        *seeds_of("good", GOOD, **told),
        *seeds_of("close", [0.0, math.nan, 0.1]),
        *seeds_of("two", [0.0, 0.1]),
    ]
    found = levels.frame(evidence(*rows, record("good", 9.0, SEEDS[0], isa="avx512vnni-avx512")))  # of a seed twice
    assert set(found["method"]) == {"fp", "good"}  # a cell that diverged has no level, two seeds are too few
    psnr = row_of(found, method="good", endpoint="psnr")
    values = [one["values"]["psnr"] for one in rows[1:6]]
    means = np.mean(values, axis=1)
    images = np.mean(np.var(values, axis=1, ddof=1) / N)
    half = math.sqrt(1.96**2 * images + 2.776**2 * means.var(ddof=1) / 5)
    assert (psnr.value, psnr.seeds, psnr.effective_bits) == (pytest.approx(means.mean()), 5, 4.5)
    assert psnr.high - psnr.value == pytest.approx(half, rel=1e-3)
    (table,) = levels.tables(found)
    assert [row[0] for row in table.rows] == ["fp", "good"] and "| 4.5 | 50% |" in table.markdown()
    levels.figure(found, "psnr", tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 10_000
    alone = record("fp", seed=0, footprint={"effective_bits": 32.0, "realizable": None})
    (table,) = levels.tables(levels.frame(evidence(alone)))
    assert [row[0] for row in table.rows] == ["fp"]
