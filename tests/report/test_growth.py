"""Exponents of growth: found again, with intervals that hold them, and told where they cannot be known."""

import numpy as np
import pandas as pd
import pytest

from quest.report import growth

SIZES = np.repeat([1.0, 2, 5, 10], 3) * 1e6


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("fixed", [0, 3])
def test_an_exponent_is_found(power, fixed):
    noise = np.random.default_rng(0).normal(1, 0.02, len(SIZES))
    seconds = (fixed + 5 * (SIZES / 1e6) ** power) * noise
    found, low, high = growth.exponent(SIZES, seconds)
    assert low <= power <= high and high - low < 0.7 and abs(found - power) < 0.25


def test_a_job_of_any_size_has_no_exponent():
    seconds = np.random.default_rng(0).normal(8, 0.2, len(SIZES))
    assert np.ptp(growth.exponent(SIZES, seconds)[1:]) > 1.5
    with pytest.raises(ValueError, match="needs four measurements, got 3"):
        growth.exponent(SIZES[:3], seconds[:3])


def frame(**powers):
    told = {"axis": "images", "others": 0.1, "versions": "torch 2", "commit": "abc", "machine": "Some CPU", "date": "x"}
    rows = [
        told | {"job": job, "size": int(size), "seconds": 1 + (size / 1e6) ** power, "memory_mb": size / 1e5}
        for job, power in powers.items()
        for size in SIZES
    ]
    return pd.DataFrame(rows, columns=growth.COLUMNS)


def test_tables_name_what_grows_faster_than_linearly(tmp_path):
    growth.write(frame(sample=1, metrics=2), tmp_path)
    table = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert "| images | sample | 1e+06 to 1e+07 | 2 to 11 | 1.00 [1.00, 1.00] | 10 to 100 | no |" in table
    assert "| images | metrics | 1e+06 to 1e+07 | 2 to 101 | 2.00 [2.00, 2.00] | 10 to 100 | yes |" in table
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert growth.read(tmp_path / "growth.csv").equals(frame(sample=1, metrics=2))
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"other\.csv: columns are a; needed: axis"):
        growth.read(tmp_path / "other.csv")
