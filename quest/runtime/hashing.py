"""Hashes of tensors, and safetensors files whose errors name the file that is corrupted or truncated."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import safe_open


def tensor_hash(value) -> str:
    """SHA-256 of the dtype, shape and bytes of a torch tensor, on the CPU and contiguous."""
    import torch  # imported here, because the report reads headers without torch

    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()


@contextmanager
def opened(path, framework: str = "pt") -> Iterator:
    """Open a safetensors file for reading, like `safe_open`; framework: "pt" for torch tensors, or "numpy".

    Raises ValueError that names the file if it is corrupted or cannot be read.
    """
    try:
        with safe_open(path, framework) as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the error class of safetensors has no public base class but Exception
        if type(error).__module__.startswith("safetensors"):
            raise ValueError(f"{path} is corrupted, or no safetensors file: {error}") from error
        raise
