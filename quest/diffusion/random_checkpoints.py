"""Small random checkpoints in CompVis's format for tests and the rehearsal: four architectures with few channels.

Weights are drawn in the order listing in `resources/compvis/<model>.json` (name, shape, scale, shift) from numpy's
frozen legacy generator and rounded to float16, so the files are equal on every machine.
"""

from pathlib import Path

from quest.runtime import command_line
from quest.runtime.files import atomic, read_json

COMPVIS = Path(__file__).resolve().parents[2] / "resources" / "compvis"
MODELS = ("tiny-bedrooms", "tiny-churches", "tiny-imagenet", "tiny-sd")


def state_dict(model: str, text: bool = True) -> dict:
    """The tensors of a checkpoint by name, with `text` including those of tiny-sd's text encoder.

    Raises ValueError if `model` is not one of MODELS.
    """
    import numpy as np
    import torch

    if model not in MODELS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(MODELS)}")
    listing = read_json(COMPVIS / f"{model}.json")
    draw = np.random.RandomState(listing["seed"])
    state = {}
    for name, shape, scale, shift in listing["tensors"] + (listing["text"] if text else []):
        values = draw.standard_normal(shape) * scale + shift
        state[name] = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    return state | {name: torch.tensor(value) for name, value in listing["scalars"].items()}


def main() -> None:
    parser = command_line.parser(__doc__, "file")
    parser.add_argument("model", choices=MODELS)
    arguments = parser.parse_args()

    import torch

    state = state_dict(arguments.model)
    with atomic(arguments.output) as file:
        torch.save({"state_dict": state, "epoch": 0, "global_step": 0}, file)


if __name__ == "__main__":
    main()
