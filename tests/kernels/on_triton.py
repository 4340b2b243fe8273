"""What tests of the Triton programs share.

Triton is interpreted in a process that has TRITON_INTERPRET=1 before anything imports it. There tests that compute run
on a CPU (`test_triton.test_interpreted` starts one); everywhere else they are marked `gpu`.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def computes(test):
    """A test that runs the programs."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def setting(request, monkeypatch):
    needs_gpu = request.node.get_closest_marker("gpu") is not None
    if needs_gpu and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the reference is float32
    torch.manual_seed(0)
    with torch.no_grad(), torch.device(DEVICE if needs_gpu or INTERPRETED else "cpu"):
        yield


def poison(monkeypatch):
    """What is not written shows: new tensors start as NaN, or as a code."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        new = empty(*args, **kwargs)
        return new.fill_(torch.nan if new.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def close(a, e):
    torch.testing.assert_close(a, e, rtol=0, atol=2e-6 * e.abs().max().item())
