"""Seeded random cases: a test with the fixture `draw` runs many times, each time with random numbers of its own.

QUEST_FUZZ_CASES (default 200) says how many times. A case depends on its test's name, its number and QUEST_FUZZ_SEED
(default 0) alone, so its id repeats it; where the process crashes, `pytest -v` shows the id. MALLOC_PERTURB_=85 fills
new memory, so that results show what was not written.
"""

import os
import random

import pytest
import torch


def pytest_generate_tests(metafunc):
    if "draw" in metafunc.fixturenames:
        share = metafunc.definition.get_closest_marker("fuzz").kwargs.get("share", 1)  # more or fewer than other tests
        cases = round(share * int(os.environ.get("QUEST_FUZZ_CASES", 200)))
        metafunc.parametrize("draw", range(max(cases, 1)), indirect=True)


@pytest.fixture
def draw(request) -> random.Random:
    draw = random.Random(f"{os.environ.get('QUEST_FUZZ_SEED', 0)} {request.node.name}")
    torch.manual_seed(draw.getrandbits(32))
    return draw
