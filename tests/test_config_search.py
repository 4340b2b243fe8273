"""The part `search` of a config: the recipes that are tried, and which are refused."""

import copy
from pathlib import Path

import pytest

from quest.config import ConfigError, read, searched, validate

CONFIG = read(Path(__file__).parents[1] / "workflow/config/search.yaml")


def test_every_row_tries_as_many_different_recipes_and_first_what_ships():
    for row, space in CONFIG["search"]["methods"].items():
        tried = searched.trials(CONFIG, row)
        assert len(tried) == CONFIG["search"]["trials"] and tried[0] == {}
        assert len({repr(recipe) for recipe in tried}) == len(tried)
        assert all(value in space[name][1:] for recipe in tried for name, value in recipe.items())
        for name, values in space.items():  # in random order, all before any again
            assert {recipe.get(name) for recipe in tried} >= set(values) or len(values) > 4, (row, name)


def test_more_trials_begin_with_the_same_ones_and_end_when_there_are_no_more():
    more = copy.deepcopy(CONFIG)
    more["search"]["trials"] = 1000
    few, many = searched.trials(CONFIG, "q-diffusion"), searched.trials(more, "q-diffusion")
    assert many[: len(few)] == few and len(many) == 4 * 3 * 3


def test_starting_points_are_those_of_every_seed_and_of_a_start_that_is_tried():
    paths = {run.path for run in searched.starts(CONFIG)}
    names = [f"adaround{kind}{seed}" for kind in ("", "-ndtc") for seed in ("", "@1")]
    assert paths == {f"scenes-class/{name}/w4a32" for name in names}
    only = copy.deepcopy(CONFIG)
    only["search"]["methods"] = {"efficient-dm": {"init": [None, "adaround"]}}
    assert [run.path for run in searched.starts(only)] == [f"scenes-class/adaround{s}/w4a32" for s in ("", "@1")]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quest": {"lr_weight": [None, 1.0]}}, ["search.methods.quest", "not under methods"]),
        ({"quest-suite": {"lr_weights": [None, 1.0]}}, ["search.methods.quest-suite", "lr_weights"]),
        ({"quest-suite": {"lr_weight": [None, -1.0]}}, ["search.methods.quest-suite.lr_weight", "-1.0"]),
        ({"quest-suite": {"lr_weight": [1.0, 2.0]}}, ["begins with 1.0", "None"]),
        ({"quest-suite": {"lr_weight": [None, 2.0, 2.0]}}, ["lr_weight", "twice"]),
        ({"quest-suite": {"time_groups": [None, 3]}}, ["time_groups: 3 does not divide", "scenes-class"]),
        (
            {"quest-suite": {"groups_per_step": [None, 4], "schedule": [None, "sequential"]}},
            ["methods.quest-suite.schedule: 'sequential' is not one of interleaved with groups_per_step=4"],
        ),
        ({"quest-suite": {"init": ["adaround", "gptq"]}}, ["init", "'gptq' is no starting point"]),
        ({"quest-suite": {"lr_weight": [None]}}, ["search.methods.quest-suite.lr_weight", "what ships first"]),
        ({}, ["search.methods"]),
    ],
)
def test_what_cannot_be_tried_is_refused_in_one_line(change, words):
    config = copy.deepcopy(CONFIG)
    config["search"]["methods"] = change
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert "\n" not in str(caught.value) and [word for word in words if word not in str(caught.value)] == []
