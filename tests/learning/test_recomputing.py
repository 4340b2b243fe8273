"""Blocks that are computed again on the way back: the same bits, in less memory."""

import pytest
import torch

import quest
from quest.learning import recomputing
from quest.quantization.swapping import swap

RECIPES = {
    "quest-suite": dict(tla_iterations=2, cma_iterations=3, batch=2, samples=4, qkv_as_one=True),
    "qalora": dict(tla_iterations=1, cma_iterations=2, batch=2, samples=4),
    "efficient-dm": dict(iterations=4, batch=2, samples=4, guidance=3.0),
}


@pytest.mark.parametrize("method", RECIPES)
def test_what_is_learned_is_the_same_bit_for_bit(method, class_pipe, class_calibration, monkeypatch):
    found, calls = {}, []
    checkpoint = recomputing.checkpoint
    monkeypatch.setattr(recomputing, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    for size in (0, 2**60):  # of the graph of a row
        monkeypatch.setattr(recomputing, "graph_bytes", lambda *_, size=size: (size, 0))
        made = quest.quantize(class_pipe, method, "w4a4", calibration=class_calibration, **RECIPES[method])
        assert not any("forward" in m.__dict__ for m in made.unet.modules())
        found[size] = (made.unet.state_dict(), len(calls))
    (kept, none), (again, some) = found.values()
    assert none == 0 and some > 10
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_the_bytes_of_a_graph_grow_with_its_rows_and_not_without_a_gradient(class_pipe, class_calibration):
    student = swap(class_pipe, 32, 32)
    one, two = (class_calibration.inputs(torch.zeros(n, dtype=torch.long)) for n in (1, 2))
    assert recomputing.graph_bytes(student.unet, one) == (0, 0)
    student.unet.conv_in.weight.requires_grad_()
    (small, _), (large, _) = (recomputing.graph_bytes(student.unet, inputs) for inputs in (one, two))
    assert 10**4 < small < large <= 2 * small


def test_blocks_that_are_computed_again_keep_their_inputs_and_the_largest_its_graph(class_pipe, class_calibration):
    student, one = swap(class_pipe, 32, 32), class_calibration.inputs(torch.zeros(1, dtype=torch.long))
    student.unet.conv_in.weight.requires_grad_()
    blocks = recomputing.outermost(student.unet)
    whole, again = recomputing.graph_bytes(student.unet, one, blocks)
    parts = [recomputing.graph_bytes(student.unet, one, [block])[1] for block in blocks]
    assert 0 < again < min(parts) <= max(parts) and whole > 2 * again


@pytest.mark.parametrize("method", RECIPES)
def test_a_mini_batch_in_several_passes_learns_the_same_up_to_rounding(
    method, class_pipe, class_calibration, monkeypatch
):
    found = []
    recipe = RECIPES[method] | {"batch": 3} | ({"iterations": 1} if method == "efficient-dm" else {})
    for left in (2**50, 2**20):  # bytes of memory: for all rows, for one
        monkeypatch.setattr(recomputing, "graph_bytes", lambda *_: (2**60, 2**19))
        monkeypatch.setattr(recomputing.memory, "left", lambda _device, left=left: left)
        made = quest.quantize(class_pipe, method, "w4a4", calibration=class_calibration, **recipe)
        found.append(made.unet.state_dict())
    whole, parts = found
    differ = [name for name, value in whole.items() if not torch.equal(value, parts[name])]
    assert differ  # gradients were summed in another order
    for name in differ:
        torch.testing.assert_close(parts[name], whole[name], rtol=2e-3, atol=2e-5)
