"""The part `settle` of a config: which rows run with which seeds, and what identifies a row. Imports nothing heavy."""

from itertools import product

from quest.config import FULL_PRECISION, Run, parts_of, recipe_of, start_of
from quest.diffusion.models import Model
from quest.runtime import sums
from quest.runtime.download import sha256_of


def families(config: dict) -> dict[str, dict]:
    """{name: {"bits", "pairs"}} of `settle`: a family that is a list of pairs is judged at the bits of `settle`."""
    block = config["settle"]
    return {
        name: family if isinstance(family, dict) else {"bits": block["bits"], "pairs": family}
        for name, family in block["families"].items()
    }


def settled_runs(config: dict, seeds: tuple[int, ...]) -> list[Run]:
    """The cells of every row in `settle` with each of these seeds, and full precision of each model."""
    if "settle" not in config:
        return []
    rows = dict.fromkeys(
        (bits, row)
        for family in families(config).values()
        for bits, pair in product(family["bits"], family["pairs"])
        for row in pair
        if row != FULL_PRECISION[0]
    )
    cells = [Run(model, f"{row}@{seed}", bits) for model, (bits, row), seed in product(config["models"], rows, seeds)]
    return [*(Run(model, *FULL_PRECISION) for model in config["models"]), *cells]


def lottery_runs(config: dict) -> list[Run]:
    """The cells of `lottery` in `settle`: each row with every calibration draw and every quantization seed."""
    block = config.get("settle", {}).get("lottery")
    if block is None:
        return []
    cells = product(block["model"], config["settle"]["bits"], block["method"], block["draw"], block["seed"])
    return [
        Run(model, f"{row}@{draw}" if draw == seed else f"{row}@{draw}.{seed}", bits)
        for model, bits, row, draw, seed in cells
    ]


def told(config: dict, run: Run, model: Model, version: int) -> dict:
    """What all seeds of a row share, ready for JSON: weights, images, calibration, and the recipes it starts from."""
    settings = config["models"][run.model]
    chain, step = [], Run(run.model, parts_of(run.method)[0], run.bits)
    while step is not None:
        chain.append([*recipe_of(config, step.method), step.bits])
        step = start_of(config, step)
    first = settings.get("first", 0)
    return {
        "protocol": version,
        "weights": _weights(model),
        "images": f"{first}-{first + settings['images'] - 1}",
        "trajectories": settings.get("trajectories", model.trajectories),
        "recipes": chain,
    }


def _weights(model: Model) -> str | None:
    """Hash of the list of hashes of a model's files; None before they are there."""
    path = model.folder / sums.NAME
    return sha256_of(path) if path.is_file() else None
