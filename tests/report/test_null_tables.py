"""Floors from null controls to tables, through the files of a run."""

import numpy as np
import pandas as pd
import pytest
from drawn import measured, stored

from quest.metrics import intervals
from quest.report import nulls, rendering, tables
from quest.report.cells import NULLS as COLUMNS
from quest.report.cells import read_cells, read_floors
from quest.runtime.files import dumps

VALUES = {"rtn": {"latent_mse": 0.31, "psnr": 21.0, "is": 8.5}, "quest": {"latent_mse": 0.30, "psnr": 24.0, "is": 8.2}}
NULLS = {
    "batches": {"latent_mse": 1e-6, "psnr": 80.0, "is": 9.0},
    "bf16": {"latent_mse": 0.02, "psnr": 40.0, "is": 8.9},
}
EXACT = {"is": 9.0}


def content(method, bits, values, **more):
    """A metrics.json with intervals so narrow that they exclude 0."""
    spread = 1e-6 * np.random.default_rng(0).normal(size=intervals.RESAMPLES)
    resampled = {name: value + spread for name, value in values.items()}
    isa = [{"core": {"isa": "avx2", "torch": "AVX2"}}]
    return measured("scenes-class", method, bits, resampled, values, images="0-99", sampled=isa, provenance={}, **more)


@pytest.fixture
def run(tmp_path):
    """A run with two methods, full precision and its null controls: (folder, write, files of the cells)."""

    def write(method, bits, values, **more):
        (file,) = stored([content(method, bits, values, **more)], tmp_path)
        return file

    cells = [write("fp", "w32a32", EXACT), *(write(method, "w4a4", values) for method, values in VALUES.items())]
    controls = [write(f"fp-{null}", "w32a32", values, full_precision=EXACT) for null, values in NULLS.items()]
    return tmp_path, cells, controls


def better(files):
    paired = tables.paired_frame(read_cells(files))
    return {row.metric: row.better for row in paired[paired["versus"] == "rtn"].itertuples()}


def test_tables_take_floors_where_there_are_some(run):
    folder, cells, controls = run
    assert better(cells) == {"latent_mse": "quest", "psnr": "quest", "is": "rtn"}
    nulls.write(controls, folder / "tables")
    floors = read_floors(folder / "tables" / "nulls.csv")["scenes-class"]
    assert floors == pytest.approx({"latent_mse": 0.02, "psnr": 1e-4, "is": 0.1})
    assert better(cells) == {"latent_mse": "neither (below the floor)", "psnr": "quest", "is": "rtn"}
    found = read_cells(cells)
    best = tables.best_values(tables.main_frame(found), tables.paired_frame(found))
    assert {name for _, _, name in best} == {"psnr", "is"}


def test_the_table_shows_distances_and_changes(run):
    folder, _, controls = run
    nulls.write(controls, folder / "tables")
    text = (folder / "tables" / "nulls.md").read_text(encoding="utf-8")
    assert "| layers of the denoiser in bfloat16 | -0.1 |" in text.replace("  ", " ")
    assert "change of IS" in text and "PSNR to FP [dB]" in text
    frame = nulls.frame(read_cells(controls))
    assert set(frame["isa"]) == {"avx2 AVX2"} and set(frame["n"]) == {100}


def test_two_methods_beyond_full_precision_are_not_ranked(run):
    _, cells, _ = run
    for file, value in zip(cells[1:], (9.5, 9.7), strict=True):
        method = file.parts[-3]
        file.write_text(dumps(content(method, "w4a4", VALUES[method] | {"is": value})), encoding="utf-8")
    assert better(cells)["is"] == "neither (both beyond full precision)"
    paired = tables.paired_frame(read_cells(cells))
    assert set(paired[paired["versus"] == "fp"]["better"]) == {"neither (beyond full precision)"}


@pytest.mark.parametrize("errors", [["nan", "0.02", "0.01"], ["0.01", "0.02", "nan"]])
def test_a_control_without_an_error_takes_no_floor_away(tmp_path, errors):
    rows = [{"model": "m", "metric": "is", "apart": error} for error in errors]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    rendering.write(tmp_path / "nulls.csv", frame)
    assert read_floors(tmp_path / "nulls.csv") == {"m": {"is": 0.02}}


def test_a_file_of_floors_with_no_numbers_is_named(run):
    folder, cells, controls = run
    nulls.write(controls, folder / "tables")
    file = folder / "tables" / "nulls.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("0.02,", "much,"), encoding="utf-8")
    with pytest.raises(ValueError, match="nulls.csv: line [0-9]+: apart: 'much' is no number"):
        read_cells(cells)
