"""Kernels: a module each with supports, pack, linear, conv2d and attention. What they mean is `reference`.

Those that keep a weight as its codes have `unpack`, which gives them back.
"""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

KERNELS = {  # imported when asked for
    "reference": "quest.kernels.reference",
    "integer": "quest.kernels.cpu.integer",
    "triton": "quest.kernels.triton.kernel",
}
# What "auto" tries, in order; elsewhere the reference. "triton" joins when it has run on a GPU.
FASTEST = {"cpu": ("integer", "reference")}

log = logging.getLogger(__name__)


@cache
def get(name: str) -> ModuleType:
    """The kernel of that name. Raises ValueError with the valid names otherwise."""
    if name not in KERNELS:
        raise ValueError(f"kernel: {name!r} is not one of auto, {', '.join(KERNELS)}")
    return importlib.import_module(KERNELS[name])


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """A name in KERNELS that computes on this device, in this dtype: the one asked for; "auto": the fastest.

    Raises ValueError for an unknown name and for a kernel that is not available.
    """
    if name != "auto":
        if reason := get(name).unavailable(device, dtype):
            raise ValueError(f"kernel: {name} is not available: {reason}")
        return name
    for candidate in FASTEST.get(device.type, ("reference",)):
        reason = get(candidate).unavailable(device, dtype)
        if reason is None:
            return candidate
        log.warning("kernel %s is not available: %s", candidate, reason)
    raise AssertionError("the reference kernel is always available")
