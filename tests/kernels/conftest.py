"""Tests with `isa` run on every instruction set of this machine, those with `threads` on one thread and on two."""

import pytest
import torch

from quest.kernels.cpu import core


@pytest.fixture(params=["portable", "avx2", "avx512vnni", "amx"])
def isa(request):
    best = core.best()
    try:
        core.use(request.param)
    except OSError as error:
        pytest.skip(str(error))
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
