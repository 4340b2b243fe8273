"""Kernels compute quantized layers and attention. Each is a module with the functions of `reference`.

`reference` defines what each function computes: unavailable, supports, supports_attention, pack, linear, conv2d and
attention. Kernels whose operands contain the codes of a weight also have `unpack`, which returns the codes.
"""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

KERNELS = {  # modules by name, imported when they are needed
    "reference": "quest.kernels.reference",
    "integer": "quest.kernels.cpu.integer",
    "triton": "quest.kernels.triton.kernel",
}
# Kernels that "auto" tries in this order, by type of device; on others it takes the reference. "triton" will be added
# once it has run on a GPU.
FASTEST = {"cpu": ("integer", "reference")}

log = logging.getLogger(__name__)


@cache
def get(name: str) -> ModuleType:
    """Return the kernel of this name. Raises ValueError, which lists the valid names, for another one."""
    if name not in KERNELS:
        raise ValueError(f"kernel: {name!r} is not one of auto, {', '.join(KERNELS)}")
    return importlib.import_module(KERNELS[name])


def choose(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of a kernel that computes on this device in this dtype: `name` itself, or for "auto" the fastest.

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
