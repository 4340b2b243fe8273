"""Threads of the compiled core: torch's own, for any number of callers, and none of a parent's."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operands import activation, needs_core, weight

from quest.kernels.cpu import integer

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]


def large_linear(rows=600):
    """A layer that is worth two threads, and its result on one."""
    torch.manual_seed(0)
    w, qparams, x = integer.pack(weight(96, 128, bits=8)), activation(8, 100.0), torch.randn(rows, 128)
    torch.set_num_threads(1)
    return lambda: integer.linear(x, qparams, w, None), integer.linear(x, qparams, w, None)


def test_two_callers_at_once():
    call, expected = large_linear()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as callers:
            for found in callers.map(lambda _: call(), range(200)):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
def test_the_threads_are_torchs_own():
    """Others would share a processor with those of torch, which wait there for the next operation."""
    call, expected = large_linear()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).exp()
        before = os.listdir("/proc/self/task")
        assert torch.equal(call(), expected)
        assert os.listdir("/proc/self/task") == before
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_computes_on():
    """It has the memory of its parent, but none of its threads."""
    call, expected = large_linear()
    torch.set_num_threads(2)
    assert torch.equal(call(), expected)
    child = os.fork()
    if child == 0:
        # numpy compares: torch's own threads do not survive a fork.
        os._exit(0 if (call().numpy() == expected.numpy()).all() else 1)
    torch.set_num_threads(1)
    for _ in range(100):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0
