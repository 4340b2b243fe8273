"""Safetensors files that are checked when they are read: a file that changed, or is cut off, is refused by name."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import safe_open


def tensor_hash(value) -> str:
    """SHA-256 of the dtype, shape and bytes of a torch tensor, on the CPU and contiguous."""
    import torch  # reports read headers without it

    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    found.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return found.hexdigest()


@contextmanager
def opened(path, framework: str = "pt") -> Iterator:
    """A safetensors file to read, as `safe_open` gives it; framework: "pt" for torch tensors, or "numpy".

    Raises ValueError, naming the file, for one that is corrupted or cannot be read.
    """
    try:
        with safe_open(path, framework) as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # safetensors' own error class has no public base but Exception
        if type(error).__module__.startswith("safetensors"):
            raise ValueError(f"{path} is corrupted, or no safetensors file: {error}") from error
        raise
