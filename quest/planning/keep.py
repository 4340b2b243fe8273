"""Refuses a `keep` that names no layer of its model, before the first job.

Names of layers come from the headers of the model's weight files. Only a model whose files are not there yet is built,
without values, for which torch is imported.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

from quest.config import ConfigError, Run, recipe_of
from quest.diffusion.denoisers import NAMES
from quest.diffusion.models import find
from quest.quantization import layer_names
from quest.runtime.hashing import opened


def check(config: dict, cells: Iterable[Run]) -> None:
    """Raise ConfigError where the recipe of a cell keeps the bits of layers that its model does not have."""
    for run in cells:
        if not (keep := recipe_of(config, run.method)[1].get("keep")):
            continue
        own = config["models"][run.model].get("pipeline")
        folder = own or find(run.model).folder
        names = stored(folder) or (None if own else built(run.model))
        try:
            if names:  # a declared model without safetensors is checked by its jobs alone
                layer_names.check(names, keep)
        except ValueError as error:
            raise ConfigError(f"{run.method} on {run.model}: {error}") from None


@functools.cache
def stored(folder: str | Path) -> tuple[str, ...]:
    """Names of the layers that can be quantized in the denoiser of a folder in diffusers layout; () without files.

    They are those with a weight of a Linear or Conv2d, and the `processor` of every module with queries.
    """
    names = []
    for file in sorted(file for part in NAMES for file in Path(folder, part).glob("*.safetensors")):
        with opened(file, "numpy") as weights:
            for key in weights.keys():
                name, _, leaf = key.rpartition(".")
                # A table of class embeddings looks like a linear layer here.
                if (
                    leaf == "weight"
                    and not name.endswith(".embedding_table")
                    and len(weights.get_slice(key).get_shape()) in (2, 4)
                ):
                    names.append(name)
    queries = (name.removesuffix(".to_q") for name in names if name.endswith(".to_q"))
    return (*names, *(f"{name}.processor" for name in queries))


@functools.cache
def built(model: str) -> tuple[str, ...]:
    """The same names for a model of the suite whose files are not there yet."""
    from quest.diffusion import published
    from quest.quantization.swapping import quantizable

    layers, processors = quantizable(published.denoiser(find(model)))
    return *layers, *processors
