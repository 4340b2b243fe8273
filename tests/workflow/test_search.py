"""`snakemake search`: trials are measured once, each row has as many seconds, and the best of seeds decides."""

import json
from dataclasses import replace

import pytest

import quest
from quest.report import searches
from workflow.scripts import search

CONFIG = {
    "name": "mine",
    "models": {"tiny-class": {"images": 4, "evaluation": 2}},
    "methods": {"fp": {}, "one": {"method": "rtn-mse"}, "other": {"method": "rtn-mse", "softmax_bits": 4}},
    "search": {
        "bits": "w4a4",
        "trials": 2,
        "seconds": 1000,
        "seeds": [1],
        "methods": {"one": {"samples": [None, 4, 2]}, "other": {"samples": [None, 3]}},
    },
}
DIVERGES = 3


@pytest.fixture
def run(tmp_path, monkeypatch, class_model, class_calibration):
    """run(**changes): run the script on the tiny model; it returns the log and the recipes that it quantized by."""
    monkeypatch.setattr("quest.diffusion.models.get", lambda name: replace(class_model, steps=2, time_groups=2))
    calls = class_calibration.call < 2
    calibration = class_calibration.subset(calls.nonzero().flatten())
    for name in ("calibration", "calibration-1"):
        calibration.save(tmp_path / "tiny-class" / f"{name}.safetensors")
    quantize, objective, made = quest.quantize, searches.objective, []

    def quantizing(*arguments, **recipe):
        made.append(recipe)
        if recipe.get("samples") == DIVERGES:
            raise FloatingPointError("the loss is nan")
        return quantize(*arguments, **recipe)

    def preferred(line):  # any change to what ships, unless it diverged
        return objective(line) if line["note"] else -len(line["recipe"])

    monkeypatch.setattr("quest.quantize", quantizing)
    monkeypatch.setattr(searches, "objective", preferred)

    def run(methods=CONFIG["methods"], **changes):
        made.clear()
        config = CONFIG | {"methods": methods, "search": CONFIG["search"] | changes}
        log, table = tmp_path / "search.csv", tmp_path / "search.md"
        words = [tmp_path, "--config", json.dumps(config), "--log", log, "-o", table]
        monkeypatch.setattr("sys.argv", ["search", *map(str, words)])
        search.main()
        return searches.read(log), list(made), table.read_text(encoding="utf-8")

    return run


def test_trials_are_measured_once_and_the_best_is_confirmed_with_other_seeds(run):
    lines, made, table = run()
    # What ships is the best of a row whose other recipe diverged, so it needs no other seed.
    asked = [(line["method"], line["seed"]) for line in lines]
    assert asked == [("one", "0")] * 2 + [("one", "1")] * 2 + [("other", "0")] * 2
    assert len(made) == 6 and [recipe.get("seed", 0) for recipe in made] == [0, 0, 1, 1, 0, 0]
    assert lines[5]["note"] == "diverged; the loss is nan" and lines[5]["guided_eps_error"] == "nan"
    assert all(0 < float(line["guided_eps_error"]) < 10 and float(line["latent_mse"]) > 0 for line in lines[:5])
    assert len({line["guided_eps_error"] for line in lines[:3]}) == 3
    assert "| one | 2 |" in table and "| other | 2 |" in table and "what ships" in table
    again, made, _ = run()
    assert again == lines and made == []
    # Each row has had a recipe beside the first, so without seconds there is no third.
    spent, made, _ = run(trials=3, seconds=1e-9)
    assert spent == lines and made == []
    # With another recipe that ships, trials are others. The table shows them alone.
    methods = CONFIG["methods"] | {"one": {"method": "rtn-mse", "softmax_bits": 4}}
    more, made, table = run(methods, trials=1)
    assert more[:6] == lines and len(made) == 1 and len(more) == 7
    assert "| one | 1 | 0 | what ships | 1 |" in table and f"| {float(more[6]['latent_mse']):.3f} |" in table


def line(seed: int, recipe: dict, guided: float, mse: float) -> dict:
    told = {"model": "x", "method": "m", "bits": "w4a4", "seed": seed, "recipe": json.dumps(recipe)}
    told |= {"guided_eps_error": guided, "eps_error": guided, "latent_mse": mse, "seconds": 10}
    return dict.fromkeys(searches.COLUMNS, "") | told


@pytest.mark.parametrize(
    "shipped, best, said",
    [
        ([(0.5, 0.4), (0.51, 0.41)], [(0.3, 0.2), (0.31, 0.21)], "yes"),
        ([(0.5, 0.4), (0.51, 0.41)], [(0.3, 0.4), (0.31, 0.45)], "in noise prediction only"),
        ([(0.5, 0.4), (0.51, 0.41)], [(0.5, 0.2), (0.52, 0.21)], "in latent MSE only"),
        ([(0.5, 0.4), (0.7, 0.7)], [(0.4, 0.3), (0.6, 0.6)], "no"),  # ahead with each seed, but seeds differ by more
        ([(0.5, 0.4), (0.51, 0.41)], [(float("nan"), 0.2), (0.31, 0.21)], "in latent MSE only"),
        ([(0.5, 0.4)], [(0.3, 0.2)], "open"),  # one seed has no spread
    ],
)
def test_better_is_by_more_than_seeds_differ(shipped, best, said):
    pairs = zip(shipped, best, strict=True)
    assert searches.verdict([(line(0, {}, *one), line(0, {"a": 1}, *other)) for one, other in pairs]) == said


def test_the_table_has_the_best_recipe_of_seed_0_and_the_seeds_it_ran_with():
    lines = [line(0, {}, 0.5, 0.4), line(0, {"a": 1}, 0.3, 0.2), line(0, {"a": 2}, 0.4, 0.1)]
    lines += [line(1, {}, 0.52, 0.4), line(1, {"a": 1}, 0.32, 0.2)]
    (table,) = searches.tables(lines)
    assert "| m | 3 | 20 | a 1 | 2 | 0.510 → 0.310 | 0.400 → 0.200 | yes |" in table.markdown()
    (table,) = searches.tables(lines[:1] + lines[3:4])
    assert "| m | 1 | 0 | what ships | 1 | 0.500 | 0.400 | – |" in table.markdown()
