import copy
from functools import partial

import torch

import quest
from quest.properties.lookup import look_up, seconds_in_turns, single
from quest.quantization.layers import input_quantizers
from quest.quantization.placement import place


def test_steps_take_turns_after_one_to_warm_up():
    order: list[str] = []
    seconds = seconds_in_turns({name: partial(order.append, name) for name in "ab"}, repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_a_single_group_computes_the_same_in_its_own_timesteps_only(class_pipe, class_calibration):
    student = quest.quantize(
        class_pipe,
        "quest-suite",
        "w4a4",
        calibration=class_calibration,
        samples=4,
        time_groups=2,
        tla_iterations=0,
        cma_iterations=0,
    ).unet
    place(student, "reference")
    middle, other = class_calibration.timesteps[2], class_calibration.timesteps[-1]
    one = single(copy.deepcopy(student), torch.tensor([middle]))
    for timestep, equal in ((middle, True), (other, False)):
        inputs = class_calibration.inputs((class_calibration.timestep == timestep).nonzero().flatten())
        with torch.no_grad():
            assert torch.equal(student(**inputs).sample, one(**inputs).sample) is equal
    assert {len(q.scale) for q in input_quantizers(one).values()} == {1}
    asked = []
    student.time_groups.inside, inside = lambda t: asked.append(t) or inside(t), student.time_groups.inside
    look_up(student, torch.tensor([other]))
    assert asked == [other]
