"""Keywords of a method that do not go together are refused when a config is read (`quest.config.rules`)."""

import pytest
from test_config import CONFIGS, _put, refused

from quest.config import read

FAULTS = {
    "groups that share rows unevenly": (
        _put(3, "methods", "quest-suite", "groups_per_step"),
        ["methods.quest-suite.groups_per_step: 3 is not one of 1, 2, 4, 8, 16", "preset='short'"],
    ),
    "groups that share a batch unevenly": (
        _put({"groups_per_step": 4, "batch": 6}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.batch: 6 is no multiple of 4"],
    ),
    "several groups in visits": (
        _put({"groups_per_step": 2, "schedule": "sequential"}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.schedule: 'sequential' is not one of interleaved"],
    ),
    "dynamic scales beside static levels": (
        _put({"dynamic": "token", "levels": "wide"}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.levels: 'wide' is not one of asymmetric with dynamic='token'", "static"],
    ),
    "dynamic scales of a method that sets static ones": (
        _put({"method": "quest-paper", "dynamic": "token"}, "methods", "mine"),
        ["methods.mine.dynamic: 'token' does not go with samples=256", "static"],
    ),
    "dynamic scales of each step": (
        _put({"method": "svdquant", "per_step": True}, "methods", "mine"),
        ["methods.mine.per_step: True is not one of False with dynamic='token'"],
    ),
    "clip ratios of static ranges": (
        _put({"method": "hadamard", "clip": "searched"}, "methods", "mine"),
        ["methods.mine.clip: 'searched' does not go with dynamic=None"],
    ),
    "a budget above the bits of a cell": (
        _put({"method": "mixed-precision", "budget": 5.0}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.budget: 5.0 is out of bounds; valid: 2 to 4"],
    ),
    "scales of activations that are floats": (
        lambda config: config["grid"].append({"model": ["photos-class"], "method": ["quest-suite"], "bits": ["w4a32"]}),
        ["methods.quest-suite: bits w4a32: QuEST tunes", "valid: 2 to 8"],
    ),
    "running ranges of a model in time groups": (
        lambda config: [
            _put({"method": "q-diffusion", "time_groups": 5}, "methods", "grouped")(config),
            config["grid"].append({"model": ["emoji-text"], "method": ["grouped"], "bits": ["w8a8"]}),
        ],
        ["methods.grouped.time_groups: 5 does not go with activation_ranges='ema'", "all timesteps"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_keywords_that_do_not_go_together_are_named_with_what_is_valid(fault):
    refused(read(CONFIGS[0].parent / "default.yaml"), *FAULTS[fault])
