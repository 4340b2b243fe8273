"""The part `settle` of a config: which cells it has, what identifies a row, and which faults are refused."""

import copy

import pytest
from test_config import _put

from quest.config import LAST_DRAW, ConfigError, Run, recipe_of, starting_points, validate
from quest.config.settled import lottery_runs, settled_runs, told
from quest.diffusion.models import MODELS
from quest.report.settle import SEEDS


@pytest.fixture
def settling():
    methods = {"fp": {}, "rtn": {}, "adaround": {}}
    return {
        "name": "settling",
        "models": {"scenes-uncond": {"images": 500}, "scenes-class": {"images": 500}},
        "grid": [{"model": ["scenes-class"], "method": ["fp"], "bits": ["w32a32"]}],
        "methods": methods | {"q-diffusion": {"init": "adaround"}, "quest-suite": {"init": "adaround"}},
        "settle": {"bits": ["w4a4"], "families": {"rivals": [["quest-suite", "q-diffusion"], ["rtn", "fp"]]}},
    }


def test_cells_that_settle_a_family(settling):
    validate(settling)
    cells = [run.path for run in settled_runs(settling, (3, 4))]
    assert cells[:2] == [f"{model}/fp/w32a32" for model in settling["models"]]
    assert cells[2:8] == [
        f"scenes-uncond/{row}@{s}/w4a4" for row in ("quest-suite", "q-diffusion", "rtn") for s in (3, 4)
    ]
    assert settled_runs({}, (3,)) == []
    starts = [run.path for run in starting_points(settling, settled_runs(settling, (3,)))]
    assert "scenes-uncond/adaround@3/w4a32" in starts


def test_a_family_may_have_bits_of_its_own(settling):
    settling["settle"]["families"]["eight"] = {"bits": ["w8a8"], "pairs": [["rtn", "fp"]]}
    validate(settling)
    cells = [run.path for run in settled_runs(settling, (3,)) if run.model == "scenes-class"]
    assert cells == [
        f"scenes-class/{cell}"
        for cell in ("fp/w32a32", "quest-suite@3/w4a4", "q-diffusion@3/w4a4", "rtn@3/w4a4", "rtn@3/w8a8")
    ]


def test_captions_must_do_for_every_draw_that_a_protocol_may_come_to(settling):
    assert LAST_DRAW == SEEDS[-1]
    settling["models"] = {"emoji-text": {"images": 100, "trajectories": 70}}
    settling["grid"] = [{"model": ["emoji-text"], "method": ["fp"], "bits": ["w32a32"]}]
    with pytest.raises(ConfigError, match="1500 captions are needed"):
        validate(settling)


def test_cells_of_the_lottery_cross_draws_and_seeds(settling):
    settling["settle"]["lottery"] = {
        "model": ["scenes-class"],
        "method": ["q-diffusion"],
        "draw": [3, 4],
        "seed": [3, 4],
    }
    validate(settling)
    cells = lottery_runs(settling)
    assert [run.method for run in cells] == [f"q-diffusion@{numbers}" for numbers in ("3", "3.4", "4.3", "4")]
    assert [recipe_of(settling, run.method)[1]["seed"] for run in cells] == [3, 4, 3, 4]
    starts = [run.path for run in starting_points(settling, cells)]
    assert starts == [f"scenes-class/adaround@{numbers}/w4a32" for numbers in ("3", "3.4", "4.3", "4")]
    assert lottery_runs({}) == []


def test_what_identifies_a_row_is_the_same_for_all_seeds_and_changes_with_its_recipe_and_start(settling):
    def of(method, config=settling):
        return told(config, Run("scenes-class", method, "w4a4"), MODELS["scenes-class"], 1)

    assert of("quest-suite@3") == of("quest-suite@7.3") == of("quest-suite")
    assert of("quest-suite")["images"] == "0-499" and len(of("quest-suite")["weights"]) == 64
    assert [name for name, _, _ in of("quest-suite")["recipes"]] == ["quest-suite", "adaround"]
    changed = copy.deepcopy(settling)
    changed["methods"]["adaround"] = {"rows": 512}
    assert of("quest-suite", changed) != of("quest-suite") and of("rtn", changed) == of("rtn")
    changed["models"]["scenes-class"]["first"] = 500
    assert of("rtn", changed)["images"] == "500-999"


LOTTERY = {"model": ["x"], "method": ["rtn"], "draw": [3, 4], "seed": [3, 4]}


@pytest.mark.parametrize(
    "change, words",
    [
        (_put([["rtn", "rtn"]], "settle", "families", "x"), ["settle.families.x[0]: rtn against rtn"]),
        (_put([["fp", "rtn"]], "settle", "families", "x"), ["settle.families.x[0]: fp against rtn"]),
        (_put([["rtnn", "rtn"]], "settle", "families", "x"), ["settle.families.x.method: 'rtnn'", "'rtn'"]),
        (_put([["rtn"]], "settle", "families", "x"), ["settle.families.x[0]"]),
        (_put(7, "methods", "quest-suite", "time_groups"), ["quest-suite.time_groups: 7 does not divide the 40"]),
        (_put({"model": ["scenes-class"]}, "settle", "lottery"), ["settle.lottery", "method"]),
        (
            _put(LOTTERY, "settle", "lottery"),
            ["settle.lottery.model: 'x'", "scenes-class"],
        ),
        (
            lambda config: config.update(
                models={"emoji-text": {"images": 9}},
                grid=[{"model": ["emoji-text"], "method": ["fp"], "bits": ["w32a32"]}],
                settle=config["settle"] | {"lottery": LOTTERY | {"model": ["emoji-text"], "draw": [3, 99]}},
            ),
            ["models.emoji-text.trajectories", "captions are needed", "for calibration there are those of 1000"],
        ),
        (_put(["w4"], "settle", "bits"), ["settle.families.rivals.bits", "'w4'"]),
        (_put({"bits": ["w4"], "pairs": [["rtn", "fp"]]}, "settle", "families", "x"), ["families.x.bits", "'w4'"]),
        (_put({"pairs": [["rtn", "fp"]]}, "settle", "families", "x"), ["settle.families.x", "'bits'"]),
        (_put(30, "models", "scenes-class", "first"), ["models.scenes-class.first: 30", "50"]),
    ],
)
def test_faults_in_what_is_to_be_settled(settling, change, words):
    change(settling)
    with pytest.raises(ConfigError) as caught:
        validate(settling)
    assert [word for word in words if word not in str(caught.value)] == []
