"""Read the tensors of a checkpoint as data: no code in the file is ever run."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from quest.runtime.sums import check_archive


class ModelCheckpoint:
    """An empty substitute for the callback class that checkpoints of PyTorch Lightning (2022) refer to."""


LIGHTNING = [(ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read(checkpoint) -> dict[str, Tensor]:
    """The tensors of a `.ckpt` or `.safetensors` file by name, on the CPU.

    Raises FileNotFoundError if the file is missing, and ValueError if it is truncated, has another format or contains
    code: a pickle is read as data only.
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
            content = torch.load(path, map_location="cpu", weights_only=True)
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
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state_dict of tensors, as CompVis checkpoints do")
    return state
