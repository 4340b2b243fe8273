"""`snakemake growth`, and QuEST's finetuning against the released code's schedule, with as little as they take."""

import json
from dataclasses import replace

import pandas as pd
import torch

import quest
from baselines.quest import FinetuneRecipe, resolve
from baselines.selection import selected
from quest.report import rendering
from quest.report.growth import COLUMNS, read
from quest.report.rendering import read_csv
from workflow.scripts import growth, released_loop


def run(script, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
    script.main()


def test_growth_measures_the_scripts_and_keeps_other_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "TIMES", (1, 2))
    monkeypatch.setenv("QUEST_RESULTS", "")  # the script sets it
    before = dict.fromkeys(COLUMNS, "x") | {
        "axis": "images",
        "size": 1,
        "seconds": 0.5,
        "memory_mb": 0.5,
        "others": 0.5,
    }
    before = pd.DataFrame([before, before | {"axis": "cells"}], columns=COLUMNS)
    rendering.write(tmp_path / "growth.csv", before)
    run(growth, monkeypatch, "--axes", "cells", "--repeats", 2, "-o", tmp_path)
    found = read(tmp_path / "growth.csv")
    assert found["axis"].tolist() == ["images"] + ["cells"] * 12
    found = found[1:]
    sizes = {"seeds": [9, 18], "tables": [9, 18], "settle": [36, 72]}
    assert {job: sorted(set(rows["size"])) for job, rows in found.groupby("job")} == sizes
    assert (found["seconds"] > 0).all() and (found["memory_mb"] >= 0).all() and (found["machine"] != "x").all()
    assert (tmp_path / "growth.png").exists()
    settled = read_csv(tmp_path / "work/cells/tables/settled.csv")
    assert set(settled["model"]) >= {"m0", "m1"}


def test_both_loops_are_measured(tmp_path, monkeypatch, class_model, class_calibration):
    model = replace(class_model, steps=2, time_groups=2)
    monkeypatch.setattr("quest.diffusion.models.get", lambda name: model)
    rows = ((class_calibration.call < 2) & (class_calibration.trajectory < 2)).nonzero().flatten()
    class_calibration.subset(rows).save(tmp_path / "set.safetensors")
    words = ["tiny-class", "--calibration", tmp_path / "set.safetensors", "-o", tmp_path / "found.json"]
    run(released_loop, monkeypatch, *words, "--iterations", 2, 2, "--batch", 4, "--repeats", 1)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(found["medians"]) == ["here", "here, short of memory", "released"]
    assert all(one["seconds"] > 0 for one in found["medians"].values())


def test_the_released_loop_tunes_the_layers_of_both_stages(monkeypatch, class_pipe, class_calibration, first_calls):
    class_calibration = first_calls(class_calibration)
    still = dict(tla_iterations=0, cma_iterations=0, ranges="minmax", samples=2)
    student = quest.quantize(class_pipe, "quest-suite", "w4a4", calibration=class_calibration, **still).unet
    recipe = FinetuneRecipe(preset="full", tla_iterations=4, cma_iterations=2, batch=4, selection="imagenet")
    recipe = resolve(recipe, class_pipe, 4)
    for _, module in student.named_modules():
        if hasattr(module, "thaw"):
            module.thaw()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    visits, write = [], released_loop.write_features

    def writing(teacher, layers, calibration, rows, folder):
        visits.append((len(layers), calibration.timestep[rows].unique().tolist(), len(rows)))
        return write(teacher, layers, calibration, rows, folder)

    monkeypatch.setattr(released_loop, "write_features", writing)
    released_loop.released(student, class_pipe.unet, class_calibration, recipe)
    stages = selected(student, recipe.selection, recipe.time_embedding)
    # 2 timesteps of 8 rows each: mini-batches of 2 in the first stage, of 4 in the second.
    timesteps = class_calibration.timesteps
    first = [(len(stages[0][0]), [t], 2) for t in timesteps for _ in range(4)]
    assert visits == first + [(len(stages[1][0]), [t], 4) for t in timesteps for _ in range(2)]
    tuned = {f"{name}.weight" for layers, _ in stages for name in layers}
    moved = {n for n, p in student.named_parameters() if n.endswith("weight") and not torch.equal(p, before[n])}
    assert moved == tuned
