"""Weights of the networks behind the metrics: given by path, or fetched once, and checked. No torch.

They lie in the folder `resources/weights`, or the one that the environment variable QUEST_WEIGHTS names. What is not
there is fetched; without a network, the error says which file to put where.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from quest.runtime.download import fetch, sha256_of


@dataclass(frozen=True)
class Weights:
    file: str
    url: str
    sha256: str


WEIGHTS = {
    # The TensorFlow graph of 2015 that FID was defined with, converted by torch-fidelity.
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # OpenAI's CLIP, from where open_clip has it; the hash stands in the address.
    "ViT-B-16": Weights(
        "ViT-B-16.pt",
        "https://openaipublic.azureedge.net/clip/models/"
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
}


def folder() -> Path:
    return Path(os.environ.get("QUEST_WEIGHTS") or Path(__file__).parents[2] / "resources" / "weights")


def path(name: str) -> Path:
    """The checked file of a network in WEIGHTS, fetched if it is not there.

    Raises OSError where it can't be fetched, ValueError where the file has another hash; both name the file.
    """
    known = WEIGHTS[name]
    return fetch(known.url, folder() / known.file, known.sha256)


def sha256(name: str) -> str | None:
    """SHA-256 of the weights behind a metric, by the name of its extractor or CLIP; None for a name without weights.

    Shipped networks are hashed as they lie there; of the others the hash is known, and `path` has compared it.
    """
    from quest.diffusion.models import ZOO
    from quest.metrics import RESIZE

    if name in RESIZE:
        name = "inception"
    if name in WEIGHTS:
        return WEIGHTS[name].sha256
    shipped = {"scenes": ZOO / "scenes-extractor" / "model.safetensors"}
    shipped["scenes-clip"] = ZOO / "scenes-clip" / "open_clip_model.safetensors"
    return sha256_of(shipped[name]) if name in shipped else None
