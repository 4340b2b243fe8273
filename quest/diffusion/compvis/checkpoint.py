"""Tensors of a checkpoint, read as data: nothing in it is ever run."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from quest.runtime.sums import check_archive


class ModelCheckpoint:
    """Stands in for the callback class that PyTorch Lightning of 2022 names in its checkpoints; holds nothing."""


LIGHTNING = [(ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read(checkpoint) -> dict[str, Tensor]:
    """The tensors of a `.ckpt` or `.safetensors` file by name, on the CPU.

    Raises FileNotFoundError, and ValueError for a file that is truncated, of another kind, or holds code: a pickle is
    read as data only, so nothing in it is ever run.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a CompVis checkpoint (.ckpt or .safetensors)")
    size = f"{path.stat().st_size} bytes"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} ({size}): truncated, or not a safetensors file: {error}") from None
    check_archive(path)
    try:
        with torch.serialization.safe_globals(LIGHTNING):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path}: refused, its pickle holds code ({code[1]}) and not only tensors; nothing was run. Take the "
                "file from its publisher, or save its tensors as .safetensors where you trust it"
            ) from None
        raise ValueError(f"{path} ({size}): truncated, or not a PyTorch checkpoint") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} ({size}): truncated, or not a PyTorch checkpoint: {reason}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state_dict of tensors, as CompVis checkpoints do")
    return state
