"""A small run of drawn cells, and its report."""

from pathlib import Path

import pandas as pd
import pytest
from drawn import METHODS, draw

from quest.report import figures, tables
from quest.report import page as report
from quest.runtime.files import dumps

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run(tmp_path_factory, write_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("report") / "tiny"
    cells = [("fp", "w32a32"), *((method, bits) for bits in ("w8a8", "w4a4") for method in ("rtn", "quest"))]
    files = []
    for model in ("scenes-uncond", "scenes-class"):
        for method, bits in cells:
            file = folder / model / method / bits / "metrics.json"
            file.parent.parent.mkdir(parents=True, exist_ok=True)
            found = draw(folder, model, method, bits, write_checkpoint)
            file.write_text(dumps(found), encoding="utf-8")
            files.append(file)
    tables.write(files, folder / "tables")
    eps_error = pd.read_csv(folder / "tables/eps_error.csv")
    figures.eps_error_curves(eps_error, folder / "figures/eps_error_vs_timestep.png")
    return folder


@pytest.fixture(scope="session")
def written(run) -> Path:
    file = run / "report.html"
    report.write(
        run,
        file,
        ROOT / "workflow/report/report.html.j2",
        methods=METHODS,
        references=ROOT / "resources/references.bib",
    )
    return file
