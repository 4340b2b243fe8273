"""Tests with `isa` run on every instruction set of this machine, those with `threads` on one thread and on two."""

import pytest
import torch

from quest.kernels.cpu import core


@pytest.fixture(params=core.ISAS)
def isa(request):
    best = core.best()
    if request.param not in core.instruction_sets():
        pytest.skip(f"this machine lacks {request.param}")
    core.use(request.param)
    yield request.param
    core.use(best)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
