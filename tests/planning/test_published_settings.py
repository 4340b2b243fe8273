"""The settings of workflow/config/paper.yaml, resolved, against the list in docs/reproduce.md."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from baselines import METHODS, efficient_dm, quest
from baselines.adaround import TRAVEL, preset_of, uniform_rows
from baselines.method import keywords
from quest.config import read, recipe_of, runs
from quest.diffusion.models import MODELS

ROOT = Path(__file__).parents[2]
PAPER = read(ROOT / "workflow/config/paper.yaml")
BEGIN = "| row | model | setting | published | source | here |"


def listed() -> list[list[str]]:
    """The lines of the list: row, models, setting, published, source, here."""
    lines = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(BEGIN) + 2
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[start:end]]


def resolved(row: str, name: str, bits: str) -> dict:
    """What a row of the paper's config sets for a model, presets included, under the names of the list."""
    method, recipe = recipe_of(PAPER, row)
    model, activation_bits = MODELS[name], int(bits.partition("a")[2])
    function = METHODS[method].quantize
    defaults = {key: parameter.default for key, parameter in keywords(function).items()}
    # As in the quantize script, the recipe overrides what the row fixes, which overrides the model's protocol.
    found = defaults | model.recipe(function, activation_bits) | METHODS[method].fixed | recipe
    settings = SimpleNamespace(**found)
    if "weight_iterations" in found:
        preset = preset_of(settings)
        found["rows"] = uniform_rows(settings, model, PAPER["models"][name].get("trajectories", model.trajectories))
        found |= {"weight_iterations": preset.weight_iterations, "weight_lr": TRAVEL / preset.weight_iterations}
        found |= {"batch": preset.batch, "activation_lr": preset.activation_lr}
        found["activation_iterations"] = preset.activation_iterations
    elif "tla_iterations" in found:
        recipe = quest.resolve(quest.FinetuneRecipe(**{k: v for k, v in found.items()}), None, activation_bits)
        found |= vars(recipe) | {"tla_batch": recipe.batch[0], "cma_batch": recipe.batch[1]}
    elif "lr_weight_scale" in found:
        found["iterations"], found["batch"] = efficient_dm.sizes(settings)
    return found


def value(text: str):
    """A cell of the list: a number, a yes, a no, or a word."""
    text = text.replace(",", "")
    if text in ("yes", "no"):
        return text == "yes"
    return float(text) if re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", text) else text


@pytest.mark.parametrize("row, names, setting, published, source, here", listed())
def test_a_setting_is_as_listed(row, names, setting, published, source, here):
    first, _, reason = here.partition(" ")
    assert source
    assert value(published) == value(first) or reason, "a value that differs from the published one needs a reason"
    setting, _, bits = setting.partition(" at ")
    for name in names.split(", "):
        cells = [run.bits for run in runs(PAPER) if (run.model, run.method) == (name, row)]
        if METHODS[recipe_of(PAPER, row)[0]].weights_only:
            cells = ["w8a32", "w4a32"]
        assert cells, f"{row} is not run on {name}"
        for cell in [bits] if bits else cells:
            found = resolved(row, name, cell)[setting]
            assert found == pytest.approx(value(first)) if isinstance(found, float) else found == value(first), cell


def test_every_row_of_the_config_is_listed():
    rows = {row for row, *_ in listed()}
    assert rows == set(PAPER["methods"]) - {"fp"}
    for key in ("weight_iterations", "rows", "batch"):
        assert {
            name
            for row, names, setting, *_ in listed()
            if (row, setting) == ("adaround", key)
            for name in names.split(", ")
        } == set(PAPER["models"])


def test_every_method_runs_at_both_granularities_at_4_bits():
    """The published rows, and the same with the other granularity of activation scales."""
    pairs = {(run.model, *granularity(run)) for run in runs(PAPER) if run.bits == "w4a4"}
    assert {(model, method) for model, method, _ in pairs} == {
        (model, method) for model, method, kind in pairs if kind == "tensor"
    }
    assert {(model, method) for model, method, _ in pairs} == {
        (model, method) for model, method, kind in pairs if kind == "released"
    }


def granularity(run) -> tuple[str, str]:
    method, _ = recipe_of(PAPER, run.method)
    return method, resolved(run.method, run.model, run.bits)["granularity"]
